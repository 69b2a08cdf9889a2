"""The record of the codes that a prior is trained on, beside the prior (stage1_vqvae/data/record.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from configs.parts import as_dict
from stage1_vqvae.data.record import Record, split_record
from stage2_prior.codes.store import CodeStore

CODES = "data.json"
"""Name of the file."""


def codes_record(stores: Mapping[str, CodeStore]) -> Record:
    """The record of splits of codes, with their augmentation, condition and the tokenizer that made them."""
    record: Record = {}
    for name, store in stores.items():
        manifest = store.manifest
        names = list(manifest.condition.class_names) or None
        labels = None if store.condition is None or names is None else store.condition.numpy()
        sums = hashlib.sha256("".join(manifest.sha256).encode()).hexdigest()
        condition = as_dict(manifest.condition)
        own = {"augmentation": manifest.augmentation, "tokenizer_sha256": manifest.tokenizer_sha256, "condition": condition}
        record[name] = split_record(len(store), labels, names, sums) | own
    return record

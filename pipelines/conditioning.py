"""The condition of images in a pipeline: what a user requests with `--label`, or what the images have themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError, say
from pipelines.inputs.images import Images
from stage2_prior.conditions.contract import Label
from stage2_prior.conditions.none import NoCondition
from stage2_prior.priors.prior_file import PriorHeader


def label_option(parser: Any, which: str, default: str) -> None:
    """Add `--label`, or `--condition`, for `which` images."""
    text = f"condition of {which}: a class by name or number, or what another kind of condition takes (default: {default})"
    parser.add_argument("--label", "--condition", type=str, help=text)


def requested_condition(
    header: PriorHeader | None, label: Label | Sequence[Label] | None, count: int, default: Tensor | None = None
) -> Tensor | None:
    """Rows (N, ...) of a prior's condition: those that a user requests, one for all images or one each, or else the default.

    Args:
        header: the prior's; None: the uniform prior, which has no condition.
        label: in the form that `Condition.parse` takes.
        count: number of images.
        default: rows to use where nothing is requested; None: no condition.
    Errors: UserError for a label that there is not, another number of labels than images, or none where the prior needs one.
    """
    condition = NoCondition() if header is None else header.condition
    if isinstance(label, torch.Tensor | np.ndarray | np.generic):
        label = label.tolist()
    if isinstance(label, str | int | float):
        row = condition.parse(label, "label")
        return row.repeat(count, *[1] * row.dim())
    if label is not None:
        if len(label) != count:
            raise UserError(f"label: expected one, or {count}, found {len(label)}")
        parsed = {text: condition.parse(text, "label") for text in dict.fromkeys(label)}
        return torch.stack([parsed[text] for text in label]) if label else condition.null(0)
    if default is None and header is not None and not header.supports_unconditional:
        raise UserError("label: expected one, for a prior trained with stage2.condition_dropout 0, found none")
    return default


def sample_condition(header: PriorHeader | None, label: Label | Sequence[Label] | None, count: int) -> Tensor | None:
    """Rows (N, ...) of samples: as requested, or else the classes in turn. Errors: as `requested_condition`."""
    return requested_condition(header, label, count, None if header is None else header.condition.in_turn(count))


def image_condition(header: PriorHeader | None, label: str | None, images: Images, lenient: bool = False) -> Tensor | None:
    """Rows (N, ...) of given images: as requested, or else the images' own; None where there are none.

    Args:
        header, label: as in `requested_condition`.
        images: whose classes are compared with the prior's by name.
        lenient: if the prior does not know the class of some image, take all without, so that their bits can be compared.
    Errors: UserError for a class that the prior does not know, or none, where it needs one.
    """
    own = None
    if label is None and header is not None:
        own = header.condition.encode(images.split(), slice(None))
        known = None if own is None else header.condition.known(own)
        if known is not None and images.labels is not None and not bool(known.all()):
            unknown = images.labels[int(known.int().argmin())]
            if not (lenient and header.supports_unconditional):
                expected = f"expected images with labels that the prior knows ({header.condition.describe()}), or one for all"
                raise UserError(f"label: {expected}, found {unknown}")
            say(f"the prior does not know the label {unknown}: all images are taken without labels (--label names one for all)")
            own = None
    return requested_condition(header, label, len(images.pixels), own)

"""The condition of images in a pipeline: from `--label`, or from the images' own labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError, say
from pipelines.inputs.images import Images
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.contract import Label
from stage2_prior.conditions.none import NoCondition
from stage2_prior.priors.prior_file import PriorHeader


def label_option(parser: Any, images: str, default: str) -> None:
    """Add the option `--label`, or `--condition`. `images`, `default`: words for the help."""
    text = f"condition of {images}: a class by name or number, or the text of another kind of condition (default: {default})"
    parser.add_argument("--label", "--condition", type=str, help=text)


def requested_condition(
    header: PriorHeader | None, label: Label | Sequence[Label] | None, count: int, default: Tensor | None = None
) -> Tensor | None:
    """Return rows (N, ...) of a prior's condition from the user's label, one for all images or one per image, or else the default.

    Args:
        header: header of the prior; None: the uniform prior, which has no condition.
        label: texts for `Condition.parse`; None: not requested.
        count: number of images.
        default: rows if no label is requested; None: no condition.
    Errors: UserError for an unknown label, another number of labels than images, or none where the prior needs one.
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


def need_classes(header: PriorHeader | None, command: str) -> None:
    """Errors: UserError for a prior with a condition other than classes, which `command` has no field for."""
    if header is not None and not isinstance(header.condition, NoCondition | Classes):
        found = header.condition.describe()
        raise UserError(f"{command}: expected a prior conditioned on classes, or without a condition, found condition {found}")


def sample_condition(header: PriorHeader | None, label: Label | Sequence[Label] | None, count: int) -> Tensor | None:
    """Return rows (N, ...) for samples: as requested, or else the classes in turn. Errors: as `requested_condition`."""
    return requested_condition(header, label, count, None if header is None else header.condition.in_turn(count))


def image_condition(header: PriorHeader | None, label: str | None, images: Images, lenient: bool = False) -> Tensor | None:
    """Return rows (N, ...) for images: as requested, or else from the images' labels or columns; None: no condition.

    Args:
        header, label: as in `requested_condition`.
        images: images whose classes are matched to the prior's by name.
        lenient: if the prior does not know the class of an image, use no condition for any, so that their bits remain comparable.
    Errors: UserError for a class that the prior does not know, or none, where it needs one.
    """
    encoded = None
    if label is None and header is not None:
        encoded = header.condition.encode(images.split(), slice(None))
        known = None if encoded is None else header.condition.known(encoded)
        if known is not None and images.labels is not None and not bool(known.all()):
            unknown = images.labels[int(known.int().argmin())]
            if not (lenient and header.supports_unconditional):
                expected = f"expected images with labels that the prior knows ({header.condition.describe()}), or one for all"
                raise UserError(f"label: {expected}, found {unknown}")
            say(f"the prior does not know the label {unknown}: all images are scored without labels (--label sets one for all)")
            encoded = None
    return requested_condition(header, label, len(images.pixels), encoded)

"""Parts: the choices of a recipe by `kind`, where every kind has its own fields.

The fields of a kind are a frozen dataclass, defined beside the code that it builds: a new part is one new file and one line
in a table here. The tables name classes by address, as Python's entry points do. An address is imported only when a recipe
chooses it, so this package needs no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from configs.errors import UserError
from configs.run_dir import ROOT

Section = TypeVar("Section")

FAMILIES: dict[str, dict[str, str]] = {
    "data.transform": {
        "center": "stage1_vqvae.data.transforms.center:CenterPart",
        "random_crop": "stage1_vqvae.data.transforms.random_crop:RandomCropPart",
    },
    "tokenizer.quantizer": {
        "ema": "stage1_vqvae.quantizers.learned:EMAPart",
        "gradient": "stage1_vqvae.quantizers.learned:GradientPart",
        "simvq": "stage1_vqvae.quantizers.learned:SimVQPart",
        "fsq": "stage1_vqvae.quantizers.scalar:FSQPart",
        "lfq": "stage1_vqvae.quantizers.scalar:LFQPart",
        "multiscale": "stage1_vqvae.quantizers.multiscale:MultiscalePart",
    },
    "tokenizer.network": {
        "convolutional": "stage1_vqvae.networks.convolutional:ConvolutionalPart",
        "hierarchical": "stage1_vqvae.networks.hierarchical:HierarchicalPart",
        "vqgan": "stage1_vqvae.networks.vqgan:VQGANPart",
        "vit": "stage1_vqvae.networks.vit:ViTPart",
    },
    "tokenizer.objective": {
        "mse": "stage1_vqvae.objectives.pixels:MSEPart",
        "bce": "stage1_vqvae.objectives.pixels:BCEPart",
        "logistic": "stage1_vqvae.objectives.likelihoods:LogisticPart",
        "categorical": "stage1_vqvae.objectives.likelihoods:CategoricalPart",
        "bernoulli": "stage1_vqvae.objectives.likelihoods:BernoulliPart",
    },
    "stage1.perceptual": {
        "none": "stage1_vqvae.objectives.image_terms:NoPerceptualPart",
        "features": "stage1_vqvae.objectives.perceptual:FeaturesPart",
        "lpips": "stage1_vqvae.objectives.perceptual:LPIPSPart",
    },
    "stage1.adversarial": {
        "none": "stage1_vqvae.objectives.adversarial:NoAdversaryPart",
        "patch": "stage1_vqvae.objectives.discriminators:PatchPart",
        "projected": "stage1_vqvae.objectives.discriminators:ProjectedPart",
    },
    "condition": {
        "classes": "stage2_prior.conditions.classes:Classes",
        "none": "stage2_prior.conditions.none:NoCondition",
    },
    "prior": {
        "transformer": "stage2_prior.priors.transformer:TransformerPart",
        "pixelcnn": "stage2_prior.priors.pixelcnn:PixelCNNPart",
        "masked": "stage2_prior.priors.masked:MaskedPart",
        "next_scale": "stage2_prior.priors.next_scale:NextScalePart",
        "levelwise": "stage2_prior.priors.levelwise:LevelwisePart",
    },
}
"""Kinds per family, the key of the recipe that chooses a part: name -> module:class. The first kind is the default."""


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """Fields of one kind in a recipe, which refuses invalid values when it is created."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ()
    """Fields that a resumed training may change; see `keys_that_may_change`."""

    @property
    def kind(self) -> str:
        """Name of the class in the tables."""
        address = f"{type(self).__module__.removeprefix(ROOT)}:{type(self).__qualname__}"
        return next(kind for kinds in FAMILIES.values() for kind, kind_address in kinds.items() if kind_address == address)

    @abstractmethod
    def build(self, *arguments: Any) -> Any:
        """Build the object that the fields configure; its family's base class documents the arguments."""


def part_class(family: str, kind: str) -> type[Part]:
    """Return the class with the fields of a kind. Errors: UserError for an unknown kind."""
    kinds = FAMILIES[family]
    if kind not in kinds:
        raise UserError(f"{family}.kind: expected one of {', '.join(kinds)}, found {kind}")
    module, _, name = kinds[kind].partition(":")
    part: type[Part] = getattr(importlib.import_module(ROOT + module), name)
    assert issubclass(part, Part)
    return part


def default_kind(family: str) -> str:
    """Return the kind for recipes that name none."""
    return next(iter(FAMILIES[family]))


def default_part(family: str) -> Any:
    """Build the default kind with its default fields."""
    return part_class(family, default_kind(family))()


def part_from(family: str, content: dict[str, Any]) -> Any:
    """Build a part from the dictionary that `as_dict` returns. Errors: UserError for an unknown kind, TypeError for an unknown field."""
    fields = {name: value for name, value in content.items() if name != "kind"}
    return part_class(family, content.get("kind", default_kind(family)))(**fields)


def as_dict(section: Any) -> dict[str, Any]:
    """Convert a dataclass to plain dictionaries, for YAML and JSON; a part's kind comes before its fields."""
    kind = {"kind": section.kind} if isinstance(section, Part) else {}
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return kind | {name: as_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def as_class(section: Any, target: type[Section]) -> Section:
    """Convert a section to another class. Fields that both classes inherit from the same base keep their values; all others take the
    target's defaults, even if the names are equal.
    """
    if type(section) is target:
        return section
    fields = dataclasses.fields(target)  # type: ignore[arg-type]  # all targets are dataclasses
    shared = {field.name for field in fields if _defined_in(target, field.name) is _defined_in(type(section), field.name)}
    return target(**{name: getattr(section, name) for name in shared})


def _defined_in(part: type, field: str) -> object:
    """Return the class whose body defines the field; `part` itself, if none does."""
    return next((base for base in part.__mro__ if field in inspect.get_annotations(base)), part)

"""Parts: the choices of a recipe by `kind`, where every kind has its own fields.

The fields of a kind are a frozen dataclass, defined beside the code that it builds: a new part is one new file and one line
in a table here. The tables name classes by address, as Python's entry points do. An address is imported only when a recipe
chooses it, so this package needs no torch. The base classes of all kinds (of transforms: data.py) are at the end.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from configs.errors import UserError, require
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


@dataclass(frozen=True, kw_only=True)
class QuantizerPart(Part):
    """The vector quantizer. `build(dim)` returns the quantizer of vectors of `dim` channels."""

    def check(self, dim: int) -> None:
        """Errors: ValueError that names the key, if the fields do not fit latents of `dim` channels."""

    def for_grid(self, height: int, width: int) -> QuantizerPart:
        """Return the part with those fields filled in that depend on the latents' grid; by default there are none.

        Errors: ValueError that names the key, if the fields do not fit the grid.
        """
        return self

    @property
    def needs_whole_batch(self) -> bool:
        """Whether its loss depends on the batch of a step as a whole, which rules out gradient accumulation."""
        return False

    @property
    def starts_by_kmeans(self) -> bool:
        """Whether its codebooks are initialised with k-means centroids of the first batches' latents."""
        return False

    @property
    def advice_on_collapse(self) -> str:
        """Advice for a codebook of which few codes are in use."""
        return "lower stage1.lr"


@dataclass(frozen=True, kw_only=True)
class NetworkPart(Part):
    """Encoder and decoder. `build(image_channels, code_dim, output_channels)` returns both. An encoder of several grids also takes a
    function that quantizes: from a grid's latents, coarse to fine, to the vectors of their codes. Its decoder takes the vectors of all
    grids.
    """

    MAY_CHANGE = ("gradient_checkpointing",)

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Pixels per side that a code of the finest grid spans."""

    @property
    def downsamplings(self) -> list[int]:
        """Pixels per side that a code spans, per grid, coarse to fine; most networks have one grid."""
        return [self.downsampling]


@dataclass(frozen=True, kw_only=True)
class ObjectivePart(Part):
    """The training loss of reconstructions. `build(image_shape)` returns the objective for images of (channels, height, width)."""

    @property
    def image_is_learned(self) -> bool:
        """Whether a gradient at the reconstructed image reaches the decoder, so that loss terms on images can be added."""
        return True


@dataclass(frozen=True, kw_only=True)
class PerceptualPart(Part):
    """The perceptual loss, added to the objective. `build(folder, source, device, seed)` returns a module from images and originals
    (B, C, H, W) in [-1, 1] to a scalar; None: no such loss. It may train a network on the source's images and save it in the folder.
    """

    MAY_CHANGE = ("weights",)


@dataclass(frozen=True, kw_only=True)
class AdversarialPart(Part):
    """The adversarial loss: a discriminator learns to tell reconstructions from real images, and the tokenizer to deceive it. Kinds with a
    discriminator are `DiscriminatorPart`s.
    """

    MAY_CHANGE = ("weights",)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorPart(AdversarialPart):
    """A discriminator. `build(channels, folder, source, device, seed)` returns it: images (B, C, H, W) in [-1, 1] to a list of logits, one
    tensor (B, ..) per scale.
    """

    weight: float = 0.5
    """Norm of the adversarial gradient at the decoder's last layer, relative to that of all other loss terms; after the ramp, before
    `bound`."""
    start: float = 0.5
    """Share of the steps before the discriminator starts, so that reconstructions are good by then."""
    ramp: float = 0.05
    """Share of the steps in which only the discriminator learns; over as many more steps, the adversarial weight rises from 0."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """Loss: hinge (Lim & Ye 2017), or the non-saturating logistic loss (Goodfellow et al. 2014)."""
    bound: float = 0.3
    """Cap on the adversarial gradient at an image, relative to the gradient of its squared error."""
    penalty: Literal["none", "r1", "lecam"] = "none"
    """Regularisation of the discriminator: R1, its gradient at real images (Mescheder et al. 2018), or LeCam (Tseng et al. 2021)."""
    penalty_weight: float = 1.0
    """Weight of the penalty in the discriminator's loss."""
    lr_share: float = 0.5
    """Learning rate of the discriminator as a share of the tokenizer's."""

    def __post_init__(self) -> None:
        where = "stage1.adversarial"
        # From 1 on it would outweigh all other terms; worse reconstructions raise their gradients, and with these its own.
        require(0 <= self.weight < 1, f"{where}.weight", "at least 0, below 1", self.weight)
        require(0 <= self.penalty_weight < float("inf"), f"{where}.penalty_weight", "at least 0, and finite", self.penalty_weight)
        require(0 <= self.start < 1, f"{where}.start", "0 <= share < 1", self.start)
        fits = self.ramp >= 0 and self.start + 2 * self.ramp <= 1
        require(fits, f"{where}.ramp", f"a share of which two fit after start {self.start}", self.ramp)
        require(self.bound > 0, f"{where}.bound", "above 0", self.bound)
        require(0 < self.lr_share < float("inf"), f"{where}.lr_share", "above 0, and finite", self.lr_share)


@dataclass(frozen=True, kw_only=True)
class ConditionPart(Part):
    """The prior's condition, which is stored with the codes. `build(source)` completes it from the data set, such as the class names."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the data set that it is read from, other than the images and their labels."""
        return ()

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, where stored rows are their numbers; empty for other kinds."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of all kinds of prior.

    A kind with more settings adds them in a subclass, which its part names.
    """

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("batch_size",)
    temperature: float = 1.0
    """Divisor of the logits; below 1: less varied, above 1: more varied; 0: the most likely code."""
    guidance: float = 1.0
    """Classifier-free guidance s: logits(no label) + s (logits(label) - logits(no label)); 1 = off, any real number."""
    guidance_schedule: Literal["constant", "linear", "cosine", "power_cosine"] = "constant"
    """Guidance while an image is drawn: s throughout, or rising from 1 at the first position to s at the last; with `power_cosine` late
    if `guidance_power` is above 1."""
    guidance_power: float = 2.75
    """Exponent of `power_cosine`: at a share t of the positions, guidance is 1 + (s - 1) (1 - cos(pi t^power)) / 2. The default is that of
    RAR-B (Yu et al. 2024), which takes less for larger priors."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """First and last guided position, as shares of the positions; outside, guidance is 1 (Kynkäänniemi et al. 2024)."""
    batch_size: int = 64
    """Samples per batch; on a CPU, it does not change them."""
    precision: Literal["float64", "float32", "bfloat16"] | None = None
    """Precision of the prior while drawing. Null: float64 on a CPU, where it takes 1.7 times as long as float32 and makes samples
    independent of the batch size; on a GPU bfloat16 if it has it, otherwise, and with compute.mixed_precision no, float32. Codes drawn in
    bfloat16 may differ from those of float32, and in both another batch size may change a sample."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        require(abs(self.guidance) < float("inf"), "guidance", "a finite number", self.guidance)
        require(0 < self.guidance_power < float("inf"), "guidance_power", "above 0, and finite", self.guidance_power)
        interval = list(self.guidance_interval)
        fits = len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
        require(fits, "guidance_interval", "two shares from 0 to 1, the first at most the second", interval)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        for name, known in (
            ("guidance_schedule", ("constant", "linear", "cosine", "power_cosine")),
            ("precision", ("float64", "float32", "bfloat16", None)),
        ):
            require(getattr(self, name) in known, name, f"one of {', '.join(map(str, known))}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PriorPart(Part):
    """The model of codes. `build(layout, condition, num_variants)` returns it; kinds conditioned on coarser levels take one more
    argument, `build(.., given)`: the layout of the levels above those of `layout`.
    """

    # Without an annotation: jsonargparse resolves those in the module of a subclass, which need not know the name.
    SAMPLING = Sampling
    """The class of the recipe's section `sampling` beside this kind."""
    MAY_BE_GIVEN_LEVELS: ClassVar[bool] = False
    dropout: float = 0.1
    """Share of activations dropped in training."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "prior.dropout", "0 <= dropout < 1", self.dropout)

    def resolved(self) -> PriorPart:
        """Return the part with all sizes filled in, as in the prior's file."""
        return self

"""The recipe: frozen dataclasses, one a section, every field with its unit and what its special values mean.

Quantizer, network, objective and prior are parts: their fields stand beside their code (parts.py), and only what a recipe
asks of all kinds stands here.

A `configs/NAME.yaml` names only what differs from the defaults here. Values that cannot work are refused when the
section is built, with the key's name; what takes two sections to judge is refused by `Recipe.check`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal

from configs.data import Augmentation, Data
from configs.errors import require
from configs.parts import Part, as_class, default_part, part_from


@dataclass(frozen=True, kw_only=True)
class QuantizerPart(Part):
    """How latents become codes. `build(dim)` makes the quantizer of vectors of `dim` channels."""

    def check(self, dim: int) -> None:
        """Errors: ValueError that names the key, if the fields do not fit latents of `dim` channels."""

    @property
    def needs_whole_batch(self) -> bool:
        """Whether its loss is of a step's batch as one, so that the batch cannot be accumulated from micro-steps."""
        return False

    @property
    def starts_by_kmeans(self) -> bool:
        """Whether its codebooks start at k-means centroids of the first batches' latents."""
        return False

    @property
    def advice_on_collapse(self) -> str:
        """What to change first if few of its codes are in use."""
        return "lower stage1.lr"


@dataclass(frozen=True, kw_only=True)
class NetworkPart(Part):
    """Encoder and decoder. `build(image_channels, code_dim, output_channels)` makes both. An encoder of several grids is called with a
    function besides, to which it hands each grid's latents, coarse to fine, and which gives back their codes' vectors; its decoder takes
    the vectors of all grids.
    """

    MAY_CHANGE = ("gradient_checkpointing",)

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Pixels a code of the finest grid spans along each side."""

    @property
    def downsamplings(self) -> list[int]:
        """Pixels that a code of each grid spans, coarse to fine; most networks have but one grid."""
        return [self.downsampling]


@dataclass(frozen=True, kw_only=True)
class ObjectivePart(Part):
    """What a reconstruction is judged by in training. `build(image_shape)` makes the objective of images of (channels, height, width)."""

    @property
    def image_is_learned(self) -> bool:
        """Whether a gradient at the image that it shows reaches the decoder, so that terms on whole images can be added."""
        return True


@dataclass(frozen=True, kw_only=True)
class PerceptualPart(Part):
    """How different a reconstruction looks from its original, added to the objective. `build(folder, source, device, seed)` makes a module,
    from images and originals (B, C, H, W) in [-1, 1] to the scalar to add, or None: there is no such term. It may keep a network that it
    trains on the source's images in the folder.
    """

    MAY_CHANGE = ("weights",)


@dataclass(frozen=True, kw_only=True)
class AdversarialPart(Part):
    """Who tells reconstructions from real images while the tokenizer learns to be taken for real; kinds with a discriminator are
    `DiscriminatorPart`s.
    """

    MAY_CHANGE = ("weights",)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorPart(AdversarialPart):
    """`build(channels, folder, source, device, seed)` makes the discriminator: images (B, C, H, W) in [-1, 1] to a list of logits, each
    (B, ..), one for each scale at which it judges.
    """

    weight: float = 0.5
    """How strong its pull at the decoder's last layer is beside that of all other terms, once it is fully there, before `bound`."""
    start: float = 0.5
    """Share of the steps after which it begins: by then reconstructions are good."""
    ramp: float = 0.05
    """Share of the steps that it first learns alone, and over which its weight then rises from 0."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """Hinge loss (Lim & Ye 2017) or the logistic one whose gradient does not vanish (Goodfellow et al. 2014)."""
    bound: float = 0.3
    """The strongest pull at an image beside that of its squared error; what is stronger is shortened."""
    penalty: Literal["none", "r1", "lecam"] = "none"
    """What keeps it from being too sure: R1, its gradient at real images (Mescheder et al. 2018), or LeCam (Tseng et al. 2021)."""
    penalty_weight: float = 1.0
    """Weight of the penalty in its loss."""
    lr_share: float = 0.5
    """Its learning rate as a share of the tokenizer's."""

    def __post_init__(self) -> None:
        where = "stage1.adversarial"
        # From 1 on it would win over all other terms, and what it ruins makes their gradients, and so its weight, larger still.
        require(0 <= self.weight < 1, f"{where}.weight", "at least 0, below 1", self.weight)
        require(0 <= self.penalty_weight < float("inf"), f"{where}.penalty_weight", "at least 0, and finite", self.penalty_weight)
        require(0 <= self.start < 1, f"{where}.start", "0 <= share < 1", self.start)
        fits = self.ramp >= 0 and self.start + 2 * self.ramp <= 1
        require(fits, f"{where}.ramp", f"a share of which two fit after start {self.start}", self.ramp)
        require(self.bound > 0, f"{where}.bound", "above 0", self.bound)
        require(0 < self.lr_share < float("inf"), f"{where}.lr_share", "above 0, and finite", self.lr_share)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The VQ-VAE (van den Oord et al. 2017): encoder, vector quantizer, decoder."""

    code_dim: int = 64
    """D, the channels of the latents that are quantized, and of what the decoder gets."""
    quantizer: QuantizerPart = field(default_factory=lambda: default_part("tokenizer.quantizer"))
    network: NetworkPart = field(default_factory=lambda: default_part("tokenizer.network"))
    objective: ObjectivePart = field(default_factory=lambda: default_part("tokenizer.objective"))

    def __post_init__(self) -> None:
        require(self.code_dim >= 1, "tokenizer.code_dim", "at least 1", self.code_dim)
        self.quantizer.check(self.code_dim)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What the sections of both training loops have in common."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *("steps", "lr", "clip_norm"),  # to train longer, or to tame a loss that diverges
        *("accumulation", "log_interval", "validation_interval", "checkpoint_interval", "keep_checkpoints"),
    )
    seed: int = 0
    """Seed of initial weights, order, augmentation, dropout and restarts."""
    steps: int = 10_000
    """Optimiser steps in all."""
    minutes: float = 0.0
    """Time budget: when the stage begins, a step is measured on this machine, and `steps` becomes what fits; 0 = `steps` as given."""
    batch_size: int = 128
    """Images a step, over all processes and accumulation."""
    accumulation: int = 1
    """Micro-steps a step: their gradients are averaged, so memory falls and the result stays (but for the prior's dropout)."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up; after them the rate falls along a cosine to `final_lr_share`."""
    final_lr_share: float = 0.01
    """The last step's learning rate as a share of the peak."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices and kernels (not of biases, gains, embeddings)."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    log_interval: int = 50
    """Steps between lines of metrics.jsonl."""
    validation_interval: int = 1000
    """Steps between validation passes; the last step always has one."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""

    def __post_init__(self) -> None:
        section = type(self).__name__.lower()
        for name in ("steps", "batch_size", "accumulation", "log_interval", "validation_interval"):
            require(getattr(self, name) >= 1, f"{section}.{name}", "at least 1", getattr(self, name))
        for name in ("checkpoint_interval", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"{section}.{name}", "at least 1", getattr(self, name))
        for name in ("minutes", "warmup_steps", "weight_decay", "clip_norm"):
            require(0 <= getattr(self, name) < float("inf"), f"{section}.{name}", "at least 0, and finite", getattr(self, name))
        require(self.lr > 0, f"{section}.lr", "above 0", self.lr)
        require(0 <= self.final_lr_share <= 1, f"{section}.final_lr_share", "0 to 1", self.final_lr_share)
        micro_batch = self.batch_size % self.accumulation
        require(micro_batch == 0, f"{section}.batch_size", f"a multiple of accumulation {self.accumulation}", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Stage1(_Loop):
    """Training of the tokenizer."""

    MAY_CHANGE = (*_Loop.MAY_CHANGE, "init_from")  # the run may have moved
    weight_average: float = 0.999
    """Decay a step of the moving average of encoder's and decoder's weights, which validation and extraction use; 0 = the
    last step's weights."""
    restart_interval: int = 10
    """Steps between restarts of dead codes; none in the last tenth of the steps, so that the decoder knows every code."""
    augmentation: Augmentation = "none"
    """Variants of which training draws one per image: the image and its mirror image; the image and its eight shifts by one pixel; five
    crops, the image and the four corners of the image enlarged by a tenth; ten crops, these five and their mirror images. Crops need
    data.decode each_time."""
    init_from: str | None = None
    """Run with whose tokenizer training begins (--init-from); its section `tokenizer` becomes this run's. Null: random weights."""
    trained: Literal["all", "decoder"] = "all"
    """What learns: of `decoder`, codes stay what they are in the run that `init_from` names."""
    perceptual: PerceptualPart = field(default_factory=lambda: default_part("stage1.perceptual"))
    adversarial: AdversarialPart = field(default_factory=lambda: default_part("stage1.adversarial"))

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = self.trained == "all" or self.init_from is not None
        require(fixed, "stage1.trained", "all without a run to begin from (stage1.init_from)", self.trained)
        require(0 <= self.weight_average < 1, "stage1.weight_average", "0 <= decay < 1", self.weight_average)
        require(self.restart_interval >= 1, "stage1.restart_interval", "at least 1", self.restart_interval)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Turning every image into its codes."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("batch_size",)
    augmentation: Augmentation = "none"
    """Variants whose codes are stored for each training image, as in stage1.augmentation; for crops, images are decoded each time."""
    batch_size: int = 256
    """Images a pass, of each process."""
    shard_rows: int = 4096
    """Images a shard: a file, which one process writes at once; an interrupted extraction begins again at the shards that are missing."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "extraction.batch_size", "at least 1", self.batch_size)
        require(self.shard_rows >= 1, "extraction.shard_rows", "at least 1", self.shard_rows)


@dataclass(frozen=True, kw_only=True)
class ConditionPart(Part):
    """What the prior's codes are conditioned on, and what is stored with them. `build(source)` completes it with what a data set says."""

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
    """How codes are drawn from the prior.

    These settings are for all kinds of prior; a kind adds its own in a subclass that its part names.
    """

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("batch_size",)
    temperature: float = 1.0
    """Divides the logits; below 1 is safer, above 1 more varied; 0 takes the likeliest code."""
    guidance: float = 1.0
    """Classifier-free guidance s: logits(no label) + s (logits(label) - logits(no label)); 1 = off, any real number."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Guidance while an image is drawn: s throughout, or rising from 1 at the first position to s at the last."""
    batch_size: int = 64
    """Samples drawn at once; it does not change them."""
    precision: Literal["float64", "float32", "bfloat16"] | None = None
    """Precision of the prior while drawing. Null: float64 on a CPU, where it takes 1.7 times as long as float32 and makes samples
    independent of the batch size; on a GPU bfloat16 if it has it, otherwise, and with compute.mixed_precision no, float32. Codes drawn in
    bfloat16 may differ from those of float32, and in both another batch size may change a sample."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        require(abs(self.guidance) < float("inf"), "guidance", "a finite number", self.guidance)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        for name, known in (
            ("guidance_schedule", ("constant", "linear", "cosine")),
            ("precision", ("float64", "float32", "bfloat16", None)),
        ):
            require(getattr(self, name) in known, name, f"one of {', '.join(map(str, known))}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class PriorPart(Part):
    """The model of the codes. `build(layout, condition, num_variants)` makes it; a kind that may be given levels has one more argument,
    `build(.., given)`: the layout of the levels above those of `layout`.
    """

    # Without an annotation: jsonargparse resolves those in the module of a subclass, which need not know the name.
    SAMPLING = Sampling
    """The class of the recipe's section `sampling` beside this kind."""
    MAY_BE_GIVEN_LEVELS: ClassVar[bool] = False
    dropout: float = 0.1
    """Share of activations dropped in training, where the kind says."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, "prior.dropout", "0 <= dropout < 1", self.dropout)

    def resolved(self) -> PriorPart:
        """The part with all sizes written out, as a prior file keeps it."""
        return self


@dataclass(frozen=True, kw_only=True)
class Stage2(_Loop):
    """Training of the prior."""

    MAY_CHANGE = (*_Loop.MAY_CHANGE, "gradient_checkpointing")
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the steps of the hidden matrices: far fewer steps, each a sixth dearer in a small transformer (Jordan et
    al. 2024); the rest stays with AdamW. Where a GPU trains in bf16, so are its matrix products; several processes share them out."""
    weight_decay: float = 0.05
    """Decay of matrices (not of gains and embeddings)."""
    condition_dropout: float = 0.1
    """Share of conditions replaced by the null in training, so that the prior also learns p(codes), which guidance needs; 0 = none."""
    weight_average: float = 0.999
    """Decay a step of the moving average of the weights, which validation and sampling use; 0 = the last step's weights."""
    gradient_checkpointing: bool = False
    """Keep no layer's inside for the backward pass but compute it twice: less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.weight_average < 1, "stage2.weight_average", "0 <= decay < 1", self.weight_average)
        require(0 <= self.condition_dropout < 1, "stage2.condition_dropout", "0 <= share < 1", self.condition_dropout)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a run is judged by."""

    features: str = "auto"
    """What images are compared by: `inception` (FID's own network); `classifier` (a small one, trained once on the run's labelled
    training images); `rotation` (the same without labels: it tells how images were turned); `auto` (inception where its weights
    are at hand or can be fetched, otherwise rotation); or a network of torchvision by its name, such as resnet50, with `weights`."""
    weights: str | None = None
    """File of the network's weights. Null: inception's are looked for in the cache and then downloaded."""
    n: int = 10_000
    """Samples to draw, labels in turns; Fréchet distances are comparable at equal numbers only."""
    seed: int = 0
    """Seed of the samples and of all random subsets."""
    batch_size: int = 256
    """Images at once through tokenizer and network."""

    def __post_init__(self) -> None:
        require(self.n >= 2, "n", "at least 2", self.n)
        require(0 <= self.seed < 2**32, "seed", "0 to 4294967295", self.seed)  # what NumPy's generators take
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the machine is used. Any command may set it: it is no part of what a run is."""

    threads: int = 0
    """CPU threads a process; 0 = the cores it may use, shared by the processes of this machine."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the networks in training, by autocast. Null: fp16 or bf16 as `accelerate config` or `accelerate launch` say; if they
    say nothing, or no, which `accelerate launch` also hands on if nobody said anything: bf16 on a GPU that has it, otherwise float32. On
    such a GPU all other float32 products are TF32 (10 of 23 bits), but for the nearest-code search, likelihoods and evaluation. `no` is
    exact: full float32 everywhere, draws too. Extraction and decoding are float32 (by default with TF32 products)."""
    compile: bool = False
    """Train through torch.compile."""
    sharded: bool | None = None
    """Whether several processes share out a prior's weights, gradients and moments in training (FSDP2), which then take less memory on
    each; null = as `accelerate config` or `accelerate launch` say."""
    hang_timeout_minutes: float = 30.0
    """Minutes without progress on any rank after which the slowest is named and all ranks end."""
    tracker: Literal["tensorboard"] | None = None
    """Also log there through Accelerate's tracker; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        require(self.threads >= 0, "compute.threads", "at least 0", self.threads)
        finite = 0 < self.hang_timeout_minutes < float("inf")
        require(finite, "compute.hang_timeout_minutes", "above 0, and finite", self.hang_timeout_minutes)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run's whole recipe."""

    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    stage1: Stage1 = field(default_factory=Stage1)
    condition: ConditionPart = field(default_factory=lambda: default_part("condition"))
    extraction: Extraction = Extraction()
    prior: PriorPart = field(default_factory=lambda: default_part("prior"))
    stage2: Stage2 = Stage2()
    sampling: Sampling = field(default_factory=lambda: default_part("prior").SAMPLING())
    evaluation: Evaluation = Evaluation()
    compute: Compute = Compute()

    def check(self) -> None:
        """Errors: ValueError that names the key, for sections that do not go together. Not when a recipe is made: on the way to the one
        that the user asks for, parts are exchanged one by one.
        """
        whole = not self.tokenizer.quantizer.needs_whole_batch or self.stage1.accumulation == 1
        require(whole, "stage1.accumulation", "1 with an entropy term, which needs the whole batch at once", self.stage1.accumulation)
        for name in ("perceptual", "adversarial"):
            chosen = getattr(self.stage1, name).kind
            fits = chosen == "none" or self.tokenizer.objective.image_is_learned
            require(fits, f"stage1.{name}", f"none with the objective {self.tokenizer.objective.kind}, which is a likelihood", chosen)
        fits = type(self.sampling) is self.prior.SAMPLING
        require(fits, "sampling", f"settings for a prior of kind {self.prior.kind}", type(self.sampling).__name__)
        step = max(self.tokenizer.network.downsamplings)
        for name in ("height", "width"):
            pixels = getattr(self.data, name)
            require(pixels % step == 0, f"tokenizer.network.downsampling {step}", f"a divisor of data.{name}", pixels)


def with_prior(recipe: Recipe, prior: PriorPart) -> Recipe:
    """Return the recipe with another prior; settings of `sampling` that both kinds share keep their values."""
    return replace(recipe, prior=prior, sampling=as_class(recipe.sampling, prior.SAMPLING))


_NO_PART_OF_TRAINING = ("evaluation", "compute")


def keys_that_may_change(recipe: Recipe, sections: Sequence[str]) -> list[str]:
    """Dotted keys of the sections, or a section as a whole, that a resumed training may change: what leaves its result as it is, how long
    it takes, what tames a loss that diverges, and where this machine has files.
    """

    def keys(part: Any, prefix: str) -> Iterator[str]:
        for entry in fields(part):
            value = getattr(part, entry.name)
            if entry.name in (_NO_PART_OF_TRAINING if part is recipe else getattr(part, "MAY_CHANGE", ())):
                yield f"{prefix}{entry.name}"
            elif is_dataclass(value):
                yield from keys(value, f"{prefix}{entry.name}.")

    return [key for key in keys(recipe, "") if key.partition(".")[0] in sections]


def tokenizer_from(content: dict[str, Any]) -> Tokenizer:
    """The inverse of `as_dict` for a tokenizer section."""
    parts = {name: part_from(f"tokenizer.{name}", content[name]) for name in ("quantizer", "network", "objective")}
    return Tokenizer(**{**content, **parts})


def condition_from(content: dict[str, Any]) -> ConditionPart:
    """The inverse of `as_dict` for a condition."""
    return part_from("condition", content)


def prior_from(content: dict[str, Any]) -> PriorPart:
    """The inverse of `as_dict` for a prior section."""
    return part_from("prior", content)

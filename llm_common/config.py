"""Every setting as frozen dataclasses, with presets as data.

`ModelConfig` uses Hugging Face's keys, so `config.json` is read and written without a map. Nothing here reads flags or
the environment: scripts do that. A wrong value raises `UserError` with the field, the value and what would be right.
"""

import dataclasses
from pathlib import Path
from typing import Any

from llm_common.checks import check, from_dict, is_finite, is_int
from llm_common.errors import UserError, nearest, read_json

DTYPES = ("float32", "bfloat16", "float64")
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
REMAT = ("none", "dots", "full")
COMPILE = ("auto", "on", "off")
Separator = int | tuple[int, ...] | None  # the id, or one of several, that ends a document, if none may see another
ATTENTION_BACKENDS = ("auto", "reference", "fused", "splash")  # splash: a TPU's kernel, JAX only
# Beyond every model that exists. A config of more is a mistake or malice, and is refused before anything is counted or
# allocated.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "max_position_embeddings": 1 << 27,
}
LARGEST_HEAD = 1 << 14
LARGEST_TABLE = 1 << 27  # numbers in the rotary table: 1 GiB in float64, a million positions of 128 channels


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotary frequencies; the names are those of Hugging Face's `rope_type:
    llama3`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for field in ("factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, field)
            check(is_finite(value) and value > 0, self, field, "must be a positive number")
        low = self.low_freq_factor
        check(self.high_freq_factor > low, self, "high_freq_factor", f"must exceed low_freq_factor = {low}")
        length = self.original_max_position_embeddings
        check(is_int(length, 1), self, "original_max_position_embeddings", "must be an integer of at least 1")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: a Llama-style decoder. Keys and meanings are those of Hugging Face's configs.

    `model_type` is the family: "llama"; "mistral", which may have a sliding window; "qwen2" with biases on q, k and v;
    "qwen3" with a norm for each head of q and k.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # a query sees this many positions, its own included; None: all before it

    def __post_init__(self) -> None:
        for field, limit in LIMITS.items():
            check(is_int(getattr(self, field), 1), self, field, "must be an integer of at least 1")
            check(getattr(self, field) <= limit, self, field, f"must be at most {limit:,}")
        check(is_int(self.head_dim, 0), self, "head_dim", "must be an even integer (0 means hidden_size / heads)")
        if self.head_dim == 0:
            heads = self.num_attention_heads
            check(
                self.hidden_size % heads == 0,
                self,
                "hidden_size",
                f"must be divisible by num_attention_heads = {heads}, or set head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        check(self.head_dim % 2 == 0, self, "head_dim", "must be even: RoPE rotates pairs")
        check(self.head_dim <= LARGEST_HEAD, self, "head_dim", f"must be at most {LARGEST_HEAD:,}")
        check(
            self.max_position_embeddings * self.head_dim <= LARGEST_TABLE,
            self,
            "max_position_embeddings",
            f"the rotary table of so many positions would take more than {LARGEST_TABLE >> 27} GiB; lower it to the "
            "length "
            "that you use",
        )
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            self,
            "num_key_value_heads",
            f"must divide num_attention_heads = {self.num_attention_heads}",
        )
        check(is_finite(self.rope_theta) and self.rope_theta > 0, self, "rope_theta", "must be a positive number")
        check(is_finite(self.rms_norm_eps) and self.rms_norm_eps > 0, self, "rms_norm_eps", "must be positive")
        check(isinstance(self.tie_word_embeddings, bool), self, "tie_word_embeddings", "must be true or false")
        check(self.model_type in MODEL_TYPES, self, "model_type", f"must be one of {', '.join(MODEL_TYPES)}")
        scaling = self.rope_scaling
        check(
            scaling is None or isinstance(scaling, RopeScaling), self, "rope_scaling", "must be a RopeScaling or None"
        )
        window = self.sliding_window
        check(window is None or is_int(window, 1), self, "sliding_window", "must be an integer of at least 1 or None")
        check(
            window is None or self.model_type == "mistral", self, "sliding_window", "only model_type 'mistral' has one"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        return from_dict(cls, values)

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v add a bias."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether every head of q and k passes an RMSNorm of its own before the rotation."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read the contents of a Hugging Face `config.json`; see `llm_common.hf_config`."""
        from llm_common.hf_config import from_hf  # here, because it builds this class

        return from_hf(config)

    @classmethod
    def from_file(cls, path: Path | str) -> "ModelConfig":
        """Read a `config.json`. Raises UserError if it is missing, not JSON, or not a config of this model."""
        path = Path(path)
        config = read_json(path, "a folder with a model has a config.json")
        if not isinstance(config, dict):
            raise UserError(f"{path}: holds a {type(config).__name__}, but a config is an object with keys")
        return cls.from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that `transformers` 4 and 5 both read."""
        from llm_common.hf_config import to_hf

        return to_hf(self)

    def num_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        d, n, k, h, f = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.intermediate_size,
        )
        layer = 2 * d * n * h + 2 * d * k * h + 3 * d * f + 2 * d
        layer += ((n + 2 * k) * h if self.qkv_bias else 0) + (2 * h if self.qk_norm else 0)
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + d


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. No default is left to a framework: theirs differ (weight decay 1e-4 against 1e-2)."""

    lr_max: float = 1e-3
    lr_min: float = 1e-4
    warmup_steps: int = 0
    total_steps: int = 1000
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0  # None: no clipping

    def __post_init__(self) -> None:
        for field in ("lr_max", "lr_min", "weight_decay"):
            value = getattr(self, field)
            check(is_finite(value) and value >= 0, self, field, "must be a finite number of at least 0")
        check(self.lr_min <= self.lr_max, self, "lr_min", f"must not exceed `lr_max` = {self.lr_max}")
        check(is_int(self.warmup_steps, 0), self, "warmup_steps", "must be an integer of at least 0")
        check(is_int(self.total_steps, 1), self, "total_steps", "must be an integer of at least 1")
        check(self.total_steps < 2**53, self, "total_steps", "must be less than 2^53")
        less = f"must be less than `total_steps` = {self.total_steps}"
        check(self.warmup_steps < self.total_steps, self, "warmup_steps", less)
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            check(is_finite(value) and 0 <= value < 1, self, field, "must lie in [0, 1)")
        check(is_finite(self.eps) and self.eps > 0, self, "eps", "must be positive")
        norm = self.max_grad_norm
        check(norm is None or (is_finite(norm) and norm > 0), self, "max_grad_norm", "must be positive or None")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OptimizerConfig":
        return from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What decides the numbers of a training run, beside the model's shape and the optimizer."""

    seed: int = 0
    batch_size: int = 16  # sequences in the global batch
    seq_len: int = 128  # T: input tokens in a window
    compute_dtype: str = "float32"  # activations and the cast weights; the masters are float32 (float64 for float64)
    # the id, or one of several, after which attention and positions begin anew; None: they do not
    document_separator: Separator = None
    max_skipped_steps: int = 10  # updates skipped in a row, for a non-finite gradient norm, that stop the run

    def __post_init__(self) -> None:
        check(is_int(self.seed, 0) and self.seed < 2**32, self, "seed", "must be an integer in [0, 2^32)")
        for field in ("batch_size", "seq_len", "max_skipped_steps"):
            check(is_int(getattr(self, field), 1), self, field, "must be an integer of at least 1")
            check(getattr(self, field) < 2**31, self, field, "must be less than 2^31")
        separators = self.document_separator
        if isinstance(separators, (list, tuple)):  # JSON and TOML have lists; one id has one form
            separators = tuple(dict.fromkeys(separators))
            object.__setattr__(self, "document_separator", separators[0] if len(separators) == 1 else separators)
        for separator in separators if isinstance(separators, tuple) else [separators]:
            known = separator is None and separators is None
            check(known or is_int(separator, 0), self, "document_separator", "must be token ids or None")
        check(separators != (), self, "document_separator", "must be token ids or None")
        check(self.compute_dtype in DTYPES, self, "compute_dtype", f"must be one of {', '.join(DTYPES)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        return from_dict(cls, values)

    @property
    def master_dtype(self) -> str:
        """dtype of the weights and moments that the optimizer keeps."""
        return "float64" if self.compute_dtype == "float64" else "float32"


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the numbers of a training run are computed: with other values the results differ by rounding alone."""

    attention_backend: str = "auto"  # resolved once: fused, but for float64 and for JAX on a CPU
    gradient_accumulation_steps: int = 1  # micro-batches that a batch is cut into: the same gradient in less memory
    loss_chunks: int = 1  # parts that the logits are made in, never all at once: less memory for about 1 % of the time
    remat: str = "none"  # what the backward pass computes again: nothing, all but matrix products (dots), or all (full)
    compile: str = "auto"  # torch.compile and jax.jit: "on", "off", or what is faster on the device
    scan_layers: bool = False  # JAX: all layers as one scan, which compiles faster and runs slower
    deterministic: bool = False  # on a GPU: the same bits in every run, slower; a CPU gives them anyway

    def __post_init__(self) -> None:
        for field in ("gradient_accumulation_steps", "loss_chunks"):
            check(is_int(getattr(self, field), 1), self, field, "must be an integer of at least 1")
            check(getattr(self, field) < 2**31, self, field, "must be less than 2^31")
        for field, known in (("attention_backend", ATTENTION_BACKENDS), ("remat", REMAT), ("compile", COMPILE)):
            check(getattr(self, field) in known, self, field, f"must be one of {', '.join(known)}")
        for field in ("scan_layers", "deterministic"):
            check(isinstance(getattr(self, field), bool), self, field, "must be true or false")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExecutionConfig":
        return from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run keeps and shows on its way. Nothing here changes its results."""

    save_every: int | None = None  # steps between checkpoints; None: none but by time and at the end
    save_minutes: float | None = None  # minutes between checkpoints
    keep_last: int = 3  # the newest checkpoints that are kept; 0: all
    keep_best: int = 1  # those with the lowest held-out loss that are kept besides
    eval_every: int | None = None  # steps between evaluations; None: with each checkpoint
    eval_batches: int | None = None  # batches of an evaluation; None: all held-out tokens
    log_every: int = 10  # steps between the lines on the terminal

    def __post_init__(self) -> None:
        for field in ("save_every", "eval_every", "eval_batches"):
            value = getattr(self, field)
            check(value is None or is_int(value, 1), self, field, "must be an integer of at least 1 or none")
        minutes = self.save_minutes
        check(minutes is None or (is_finite(minutes) and minutes > 0), self, "save_minutes", "must be positive or none")
        for field, low in (("keep_last", 0), ("keep_best", 0), ("log_every", 1)):
            check(is_int(getattr(self, field), low), self, field, f"must be an integer of at least {low}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        return from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. The off values are top_k 0, top_p 1 and min_p 0; temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            is_finite(self.temperature) and (self.temperature == 0 or self.temperature >= 1e-6),
            self,
            "temperature",
            "must be 0 (greedy) or a finite number of at least 1e-6",
        )
        check(is_int(self.top_k, 0), self, "top_k", "must be an integer of at least 0 (0 is off)")
        check(is_finite(self.top_p) and 0 < self.top_p <= 1, self, "top_p", "must lie in (0, 1] (1 is off)")
        check(is_finite(self.min_p) and 0 <= self.min_p < 1, self, "min_p", "must lie in [0, 1) (0 is off)")
        check(is_int(self.seed, 0) and self.seed < 2**32, self, "seed", "must be an integer in [0, 2^32)")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SamplingConfig":
        return from_dict(cls, values)


def check_length(cfg: ModelConfig, length: int, what: str) -> None:
    """Raise UserError if `length` positions do not fit the RoPE table."""
    limit = cfg.max_position_embeddings
    if length > limit:
        raise UserError(
            f"{what} needs {length} positions but max_position_embeddings = {limit}; shorten it or raise that"
        )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a training run is made from, but for its data and its first weights."""

    model: ModelConfig
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    execution: ExecutionConfig = ExecutionConfig()

    def __post_init__(self) -> None:
        check_length(self.model, self.train.seq_len, "seq_len")
        batch, length = self.train.batch_size, self.train.seq_len
        steps, chunks = self.execution.gradient_accumulation_steps, self.execution.loss_chunks
        rule = f"must divide batch_size = {batch}"
        check(batch % steps == 0, self.execution, "gradient_accumulation_steps", rule)
        check(length % chunks == 0, self.execution, "loss_chunks", f"must divide seq_len = {length}")

    @classmethod
    def from_settings(
        cls, model: ModelConfig, settings: dict[str, Any], optimizer: OptimizerConfig | None = None
    ) -> "Recipe":
        """A recipe from the fields of TrainConfig and ExecutionConfig in one dictionary, as a checkpoint keeps them."""
        known = {field.name for field in dataclasses.fields(ExecutionConfig)}
        train = TrainConfig.from_dict({name: x for name, x in settings.items() if name not in known})
        execution = ExecutionConfig.from_dict({name: x for name, x in settings.items() if name in known})
        return cls(model, train, optimizer or OptimizerConfig(), execution)

    def settings(self) -> dict[str, Any]:
        """Of `from_settings`, the dictionary."""
        return dataclasses.asdict(self.train) | dataclasses.asdict(self.execution)


PRESETS: dict[str, ModelConfig] = {
    # for tests: dimensions that differ wherever two axes could be swapped
    "tiny": ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
    ),
    # trains in under a minute on two CPU cores
    "demo": ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "124m": ModelConfig(
        vocab_size=32_768,
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    ),
    "350m": ModelConfig(
        vocab_size=32_768,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "1b": ModelConfig(
        vocab_size=32_768,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    # Llama 3's shape
    "8b": ModelConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
}


def preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]

"""Every setting as frozen dataclasses, with presets as data.

`ModelConfig` uses Hugging Face's keys, so `config.json` is read and written without a map. Nothing here reads flags or
the environment: scripts do that. A wrong value raises `UserError` with the field, the value and what would be right.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from llm_common.errors import UserError

DTYPES = ("float32", "bfloat16", "float64")
ATTENTION_BACKENDS = ("auto", "reference", "fused")


def _check(ok: bool, config: Any, field: str, rule: str) -> None:
    if not ok:
        raise UserError(f"{type(config).__name__}.{field} = {getattr(config, field)!r}: {rule}")


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _from_dict(cls, values: dict[str, Any]):
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"{cls.__name__}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UserError(f"{cls.__name__}: missing key {missing[0]!r}")
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: a Llama-style decoder. Keys and meanings are Hugging Face's `LlamaConfig`."""

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

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            _check(_is_int(getattr(self, field), 1), self, field, "must be an integer of at least 1")
        _check(_is_int(self.head_dim, 0), self, "head_dim", "must be an even integer (0 means hidden_size / heads)")
        if self.head_dim == 0:
            heads = self.num_attention_heads
            _check(
                self.hidden_size % heads == 0,
                self,
                "hidden_size",
                f"must be divisible by num_attention_heads = {heads}, or set head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        _check(self.head_dim % 2 == 0, self, "head_dim", "must be even: RoPE rotates pairs")
        _check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            self,
            "num_key_value_heads",
            f"must divide num_attention_heads = {self.num_attention_heads}",
        )
        _check(_is_finite(self.rope_theta) and self.rope_theta > 0, self, "rope_theta", "must be a positive number")
        _check(_is_finite(self.rms_norm_eps) and self.rms_norm_eps > 0, self, "rms_norm_eps", "must be positive")
        _check(isinstance(self.tie_word_embeddings, bool), self, "tie_word_embeddings", "must be true or false")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        return _from_dict(cls, values)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read the contents of a Hugging Face `config.json` of a Llama (versions 4 and 5 of transformers).

        Keys that do not change the mathematics are passed over; any other unknown key, and any value of a known key
        that this model does not implement, is refused by name.
        """
        config = {key: value for key, value in config.items() if key not in _HF_IGNORED}
        for key, allowed in _HF_FIXED.items():
            value = config.pop(key, allowed[0])
            if value not in allowed:
                raise UserError(f"config.json: {key} = {value!r} is not implemented; it must be {allowed[0]!r}")
        # transformers 4 writes rope_theta + rope_scaling, version 5 rope_parameters = {rope_type, rope_theta, ...}.
        for key in ("rope_parameters", "rope_scaling"):
            rope = dict(config.pop(key, None) or {})
            rope_type = rope.pop("rope_type", rope.pop("type", "default"))
            if rope_type != "default":
                raise UserError(f"config.json: rope type {rope_type!r} is not implemented; only 'default' is")
            if "rope_theta" in rope:
                config["rope_theta"] = rope.pop("rope_theta")
            if rope:
                raise UserError(f"config.json: unknown key {sorted(rope)[0]!r} in {key}")
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = config.get("num_attention_heads")
        config.setdefault("rms_norm_eps", 1e-6)  # LlamaConfig's own default, which differs from ours
        config["head_dim"] = config.get("head_dim") or 0
        return _from_dict(cls, config)

    @classmethod
    def from_file(cls, path: Path | str) -> "ModelConfig":
        """Read a `config.json`. Raises UserError if it is missing, not JSON, or not a config of this model."""
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a folder with a model has a config.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(config, dict):
            raise UserError(f"{path}: holds a {type(config).__name__}, but a config is an object with keys")
        return cls.from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that `transformers` 4 and 5 both read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }

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
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + d


_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "pretraining_tp": (1,),
}
_HF_IGNORED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "initializer_range",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "problem_type",
    ]
)


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
            _check(_is_finite(value) and value >= 0, self, field, "must be a finite number of at least 0")
        _check(self.lr_min <= self.lr_max, self, "lr_min", f"must not exceed lr_max = {self.lr_max}")
        _check(_is_int(self.warmup_steps, 0), self, "warmup_steps", "must be an integer of at least 0")
        _check(
            _is_int(self.total_steps, 1) and self.total_steps > self.warmup_steps,
            self,
            "total_steps",
            f"must be an integer larger than warmup_steps = {self.warmup_steps}",
        )
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            _check(_is_finite(value) and 0 <= value < 1, self, field, "must lie in [0, 1)")
        _check(_is_finite(self.eps) and self.eps > 0, self, "eps", "must be positive")
        norm = self.max_grad_norm
        _check(norm is None or (_is_finite(norm) and norm > 0), self, "max_grad_norm", "must be positive or None")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OptimizerConfig":
        return _from_dict(cls, values)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run: what is not the model's shape and not the optimizer's."""

    seed: int = 0
    batch_size: int = 16  # sequences in the global batch
    seq_len: int = 128  # T: input tokens in a window
    compute_dtype: str = "float32"  # activations and the cast weights; the masters are float32 (float64 for float64)
    attention_backend: str = "auto"  # resolved once from the device: fused on accelerators, reference on a CPU
    max_skipped_steps: int = 10  # updates skipped in a row, for a non-finite gradient norm, that stop the run

    def __post_init__(self) -> None:
        _check(_is_int(self.seed, 0) and self.seed < 2**32, self, "seed", "must be an integer in [0, 2^32)")
        for field in ("batch_size", "seq_len", "max_skipped_steps"):
            _check(_is_int(getattr(self, field), 1), self, field, "must be an integer of at least 1")
        _check(self.compute_dtype in DTYPES, self, "compute_dtype", f"must be one of {', '.join(DTYPES)}")
        _check(
            self.attention_backend in ATTENTION_BACKENDS,
            self,
            "attention_backend",
            f"must be one of {', '.join(ATTENTION_BACKENDS)}",
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        return _from_dict(cls, values)

    @property
    def master_dtype(self) -> str:
        """dtype of the weights and moments that the optimizer keeps."""
        return "float64" if self.compute_dtype == "float64" else "float32"


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. The off values are top_k 0, top_p 1 and min_p 0; temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            _is_finite(self.temperature) and (self.temperature == 0 or self.temperature >= 1e-6),
            self,
            "temperature",
            "must be 0 (greedy) or a finite number of at least 1e-6",
        )
        _check(_is_int(self.top_k, 0), self, "top_k", "must be an integer of at least 0 (0 is off)")
        _check(_is_finite(self.top_p) and 0 < self.top_p <= 1, self, "top_p", "must lie in (0, 1] (1 is off)")
        _check(_is_finite(self.min_p) and 0 <= self.min_p < 1, self, "min_p", "must lie in [0, 1) (0 is off)")
        _check(_is_int(self.seed, 0) and self.seed < 2**32, self, "seed", "must be an integer in [0, 2^32)")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SamplingConfig":
        return _from_dict(cls, values)


def check_length(cfg: ModelConfig, length: int, what: str) -> None:
    """Raise UserError if `length` positions do not fit the RoPE table."""
    limit = cfg.max_position_embeddings
    if length > limit:
        raise UserError(
            f"{what} needs {length} positions but max_position_embeddings = {limit}; shorten it or raise that"
        )


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
}


def preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]

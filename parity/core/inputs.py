"""What is fed to the three witnesses: configs, weights with every parameter random, token batches."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, RopeScaling
from llm_common.run.checkpoint import TrainingState
from parity import spec
from parity.core.compare import Tensors, round_to


def variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """The config, and what it leaves untested: the other kind of head, one key/value head, no grouping."""
    tied = dataclasses.replace(cfg, tie_word_embeddings=not cfg.tie_word_embeddings, num_key_value_heads=1)
    grouped = dataclasses.replace(cfg, num_key_value_heads=cfg.num_attention_heads, rope_theta=500.0, rms_norm_eps=1e-3)
    return {"as given": cfg, "other head, one kv head": tied, "no grouping, other theta and eps": grouped} | families(
        cfg
    )


def families(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """The config as each of the other families has it: biases, norms of q and k, a window, stretched frequencies."""
    llama = dataclasses.replace(cfg, sliding_window=None, model_type="llama")
    longest = math.floor(2 * math.pi * cfg.rope_theta ** (1 - 2 / cfg.head_dim))  # the wavelength of the slowest pair
    # kept, interpolated and divided frequencies at any theta: the borders lie within the range of wavelengths
    scaling = RopeScaling(4.0, 1.0, 3.0, max(2, math.isqrt(7 * longest)))
    return {
        "Qwen2: biases": dataclasses.replace(llama, model_type="qwen2"),
        "Qwen3: norms of q and k": dataclasses.replace(llama, model_type="qwen3"),
        "Mistral: window of 4": dataclasses.replace(llama, model_type="mistral", sliding_window=4),
        "Llama 3: scaled RoPE": dataclasses.replace(llama, rope_scaling=scaling),
    }


def shapes_of_logits(cfg: ModelConfig, batch: int, length: int) -> dict[str, tuple[ModelConfig, int, int]]:
    """Name -> config, batch and length for the logits: the variants, and what only long or deep ones can show."""
    cases = {name: (variant, batch, length) for name, variant in variants(cfg).items()}
    whole = min(cfg.max_position_embeddings, 64)
    short = dataclasses.replace(cfg, max_position_embeddings=whole)
    cases[f"to the end of a table of {whole}"] = (short, 1, whole)
    # layer 10 sorts before layer 2 by name
    cases["11 layers"] = (dataclasses.replace(cfg, num_hidden_layers=11), 1, length)
    return cases


def random_weights(cfg: Any, seed: int, dtype: str = "float64") -> Tensors:
    """Weights that keep activations near 1 and that no default could imitate, rounded to `dtype`, as float64.

    cfg: a config, or what the specification read of one. The names and shapes are the specification's.

    Gains differ from 1 and the head is large enough for peaked distributions: with 1 and with flat logits a dropped
    gain or a wrong temperature would hardly show.
    """
    rng = np.random.default_rng((seed, 1))
    weights = {}
    for name, shape in spec.weight_shapes(cfg).items():
        if name.endswith(".bias"):
            x = 0.5 * rng.standard_normal(shape)
        elif len(shape) == 1:
            x = 1.0 + 0.3 * rng.standard_normal(shape)
        elif name == "model.embed_tokens.weight" and not cfg.tie_word_embeddings:
            x = rng.standard_normal(shape)
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            x = rng.standard_normal(shape) * 2.0 / math.sqrt(shape[1])
        elif name.endswith(("q_proj.weight", "k_proj.weight")):  # scores near 1: a saturated softmax hides its inputs
            x = rng.standard_normal(shape) / math.sqrt(shape[1])
        else:
            x = rng.standard_normal(shape) * 1.5 / math.sqrt(shape[1])
        weights[name] = round_to(x, dtype)
    return weights


def random_batch(cfg: ModelConfig, seed: int, batch: int = 3, length: int = 13, ignored: bool = True):
    """Inputs and targets (B, T); with `ignored`, some targets are -100.

    No sequence repeats one token throughout: all its values would be equal, so that attention would not depend on q and
    k, whose gradients would then be zero but for rounding.
    """
    rng = np.random.default_rng((seed, 2))
    length = min(length, cfg.max_position_embeddings)
    inputs, targets = rng.integers(0, cfg.vocab_size, (2, batch, length))
    if length > 2:  # ids that a special rule might single out
        inputs[-1, :2], targets[0, :2] = (0, cfg.vocab_size - 1), (cfg.vocab_size - 1, 0)
    if length > 1:
        constant = (inputs == inputs[:, :1]).all(axis=1)
        inputs[constant, 1] = (inputs[constant, 1] + 1) % cfg.vocab_size
    if ignored:
        counted = rng.random(targets.shape) >= 0.2
        counted[0, -1] = True  # a position that attends to more than itself
        targets[~counted] = -100
    return inputs, targets


class RandomBatches:
    """A dataset of random tokens: `batch(step)` as `TokenDataset` has it, from `n` distinct batches in turn."""

    def __init__(self, cfg: ModelConfig, seed: int, n: int = 32, batch: int = 3, length: int = 13) -> None:
        self.batches = [random_batch(cfg, seed + 1000 * (i + 1), batch, length, ignored=False) for i in range(n)]

    def batch(self, step: int, host: int = 0, n_hosts: int = 1):
        return tuple(x.astype(np.int32) for x in self.batches[step % len(self.batches)])


@dataclasses.dataclass(frozen=True)
class Always:
    """A dataset whose every batch is the same."""

    rows: tuple[np.ndarray, ...]

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, ...]:
        return self.rows


_POSITIONS = itertools.count(1009)


def untraced(cfg: ModelConfig) -> ModelConfig:
    """A config that no other in this process is equal to, by its number of positions: where a check looks on while a
    program is traced, JAX must not have it already.
    """
    return dataclasses.replace(cfg, max_position_embeddings=next(_POSITIONS))


@dataclasses.dataclass
class InTurn:
    """A dataset of some batches, one for each step."""

    batches: Sequence[tuple[np.ndarray, ...]]

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, ...]:
        return self.batches[step]


def start_state(weights: Tensors, dtype: str = "float64") -> TrainingState:
    """The training state before the first step; its arrays are copies in the given dtype."""
    mu, nu = ({name: np.zeros(x.shape, dtype) for name, x in weights.items()} for _ in range(2))
    return TrainingState({name: x.astype(dtype) for name, x in weights.items()}, mu, nu, 0, 0)

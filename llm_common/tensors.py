"""Canonical tensors: the weights as a dict of NumPy arrays under Hugging Face's names, matrices as (out, in).

This is the form that checkpoints hold and that both sides and the specification are loaded from. How a framework keeps
its weights inside (JAX: layers stacked on a leading axis) never leaves that framework's package.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, check_length
from llm_common.errors import UserError

Tensors = Mapping[str, np.ndarray]
INIT_STD = 0.02
# For each block: the fused name, then the projections it replaces. They read the same input, so decoding does them in
# one matmul.
FUSED = {"self_attn": ("qkv_proj", "q_proj", "k_proj", "v_proj"), "mlp": ("gate_up_proj", "gate_proj", "up_proj")}


class ReadOnDemand(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for, so that only one need be in memory.

    read: gives the array of a name. In a run of several processes all of them must ask for the same names in the same
    order.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]) -> None:
        self.names, self.read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, in canonical order: a weight's index here is part of its random key."""
    d, n, k, h = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.vocab_size, d)}
    for i in range(cfg.num_hidden_layers):
        prefix = f"model.layers.{i}."
        shapes[prefix + "input_layernorm.weight"] = (d,)
        for name, size in (("q", n * h), ("k", k * h), ("v", k * h)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (size, d)
            if cfg.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        shapes[prefix + "self_attn.o_proj.weight"] = (d, n * h)
        if cfg.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (h,)
            shapes[prefix + "self_attn.k_norm.weight"] = (h,)
        shapes[prefix + "post_attention_layernorm.weight"] = (d,)
        shapes[prefix + "mlp.gate_proj.weight"] = (cfg.intermediate_size, d)
        shapes[prefix + "mlp.up_proj.weight"] = (cfg.intermediate_size, d)
        shapes[prefix + "mlp.down_proj.weight"] = (d, cfg.intermediate_size)
    shapes["model.norm.weight"] = (d,)
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, d)
    return shapes


def init_range(cfg: ModelConfig, name: str) -> float | None:
    """Width c of a weight's initial uniform distribution (u - 0.5) * c, or None if it starts at `init_constant`.

    The standard deviation c / sqrt(12) is 0.02; the two projections that write to the residual stream get
    0.02 / sqrt(2L), so that the stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    if name.endswith(("norm.weight", ".bias")):
        return None
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = INIT_STD / math.sqrt(2 * cfg.num_hidden_layers) if residual else INIT_STD
    return std * math.sqrt(12.0)


def init_constant(name: str) -> float:
    """What a weight without an `init_range` starts at: a gain at 1, a bias at 0."""
    return 0.0 if name.endswith(".bias") else 1.0


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a canonical tensor: to matrices, embedding and head included, not to gains."""
    return len(shape) >= 2


def check_tensors(cfg: ModelConfig, tensors: Tensors, source: str) -> None:
    """Raise UserError unless `tensors` holds exactly the weights of `cfg`, with their shapes. Reads none of a
    file's.
    """
    shapes = tensor_shapes(cfg)
    for name in shapes:
        if name not in tensors:
            raise UserError(f"{source}: tensor {name!r} is missing")
    known = getattr(tensors, "entries", tensors)  # files say shapes and dtypes without being read
    for name, tensor in known.items():
        if name not in shapes:
            raise UserError(f"{source}: tensor {name!r} does not belong to this config")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise UserError(f"{source}: tensor {name!r} is {tensor.dtype}, but weights are floating-point numbers")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{source}: tensor {name!r} has shape {tuple(tensor.shape)}, but the config needs {shapes[name]}"
            )


def check_like(
    path: Path, found: dict[str, tuple[tuple[int, ...], str]], like: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """Raise UserError unless a folder has exactly the tensors of another checkpoint, by name, shape and dtype."""
    for name in sorted(set(found) ^ set(like)):
        raise UserError(f"{path}: tensor {name!r} is {'missing' if name in like else 'not of this model'}")
    for name, (shape, dtype) in like.items():
        if found[name] != (shape, dtype):
            raise UserError(f"{path}: tensor {name!r} is {found[name][1]} {found[name][0]}, not {dtype} {shape}")


def check_token_ids(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Raise UserError for ids outside [0, vocab_size). On the host: inside a model JAX would clamp or give NaN."""
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{what}: token ids must be integers, got {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(f"{what}: token id {bad} is outside the vocabulary [0, {vocab_size})")


def check_batch(inputs: np.ndarray, targets: np.ndarray, vocab_size: int, what: str) -> None:
    """`check_token_ids` for a training batch; targets may also be -100, which is not counted."""
    check_token_ids(inputs, vocab_size, f"{what}, inputs")
    check_token_ids(targets[targets != -100], vocab_size, f"{what}, targets")


def check_prompts(prompts: Any, cfg: ModelConfig, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as one array (B, P), padded with 0 on the right, and their lengths (B,).

    Raises UserError if there is none, one is empty or not of token ids, or cannot be continued by max_new_tokens.
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise UserError("no prompt: give at least one")
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0:
            raise UserError(f"prompt {i} must be a list of at least one token id, got shape {row.shape}")
        check_token_ids(row, cfg.vocab_size, f"prompt {i}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    lengths = np.array([len(row) for row in rows], np.int32)
    check_length(
        cfg,
        int(lengths.max()) + max_new_tokens,
        f"a prompt of {lengths.max()} tokens and `max_new_tokens` = {max_new_tokens}",
    )
    padded = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


def bucket(n: int, limit: int) -> int:
    """n rounded up to one of a few lengths, four to an octave, but no more than `limit`: programs are compiled for
    lengths.
    """
    step = max(16, 1 << (n - 1).bit_length() >> 2)
    return min(limit, -(-n // step) * step)

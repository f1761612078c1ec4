"""Canonical tensors: the weights as a dict of NumPy arrays under Hugging Face's names, matrices as (out, in).

This is the form that checkpoints hold and that both sides and the specification are loaded from. How a framework keeps
its weights inside (JAX: layers stacked on a leading axis) never leaves that framework's package.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from llm_common.config import ModelConfig, check_length
from llm_common.errors import UserError

INIT_STD = 0.02


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, in canonical order: a weight's index here is part of its random key."""
    d, n, k, h = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.vocab_size, d)}
    for i in range(cfg.num_hidden_layers):
        for name, shape in {
            "input_layernorm": (d,),
            "self_attn.q_proj": (n * h, d),
            "self_attn.k_proj": (k * h, d),
            "self_attn.v_proj": (k * h, d),
            "self_attn.o_proj": (d, n * h),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (cfg.intermediate_size, d),
            "mlp.up_proj": (cfg.intermediate_size, d),
            "mlp.down_proj": (d, cfg.intermediate_size),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (d,)
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, d)
    return shapes


def init_range(cfg: ModelConfig, name: str) -> float | None:
    """Width c of a weight's initial uniform distribution (u - 0.5) * c, or None for a norm weight, which starts at 1.

    The standard deviation c / sqrt(12) is 0.02; the two projections that write to the residual stream get
    0.02 / sqrt(2L), so that the stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    if name.endswith("norm.weight"):
        return None
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = INIT_STD / math.sqrt(2 * cfg.num_hidden_layers) if residual else INIT_STD
    return std * math.sqrt(12.0)


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a canonical tensor: to matrices, embedding and head included, not to gains."""
    return len(shape) >= 2


def check_tensors(cfg: ModelConfig, tensors: dict[str, np.ndarray], source: str) -> None:
    """Raise UserError unless `tensors` holds exactly the weights of `cfg`, with their shapes."""
    shapes = tensor_shapes(cfg)
    for name in shapes:
        if name not in tensors:
            raise UserError(f"{source}: tensor {name!r} is missing")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise UserError(f"{source}: tensor {name!r} does not belong to this config")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise UserError(f"{source}: tensor {name!r} is {tensor.dtype}, but weights are floating-point numbers")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{source}: tensor {name!r} has shape {tuple(tensor.shape)}, but the config needs {shapes[name]}"
            )


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


def check_prompt(prompt: Any, cfg: ModelConfig, max_new_tokens: int) -> np.ndarray:
    """The prompts as an integer array (B, P). Raises UserError if a model cannot continue them by max_new_tokens."""
    try:
        prompt = np.asarray(prompt)
    except ValueError:
        raise UserError(
            "the prompts have different lengths; generate them one by one or cut them to one length"
        ) from None
    if prompt.ndim != 2 or prompt.size == 0:
        raise UserError(f"prompts must be token ids of shape (B, P) with B and P at least 1, got {prompt.shape}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    check_token_ids(prompt, cfg.vocab_size, "prompt")
    check_length(cfg, prompt.shape[1] + max_new_tokens, "prompt + max_new_tokens")
    return prompt


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file, durable and readable by others, and read it back to be sure.

    `safetensors.numpy.save_file` writes a non-contiguous array (a transposed view) wrong without an error.
    """
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without this key
    path.chmod(0o644)  # the library creates the file with mode 0600
    sync(path)
    written = read_tensors(path)
    for name, tensor in tensors.items():
        if not np.array_equal(tensor.view(np.uint8), written[name].view(np.uint8)):
            raise OSError(f"{path}: tensor {name!r} was not written as it is in memory")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file. Raises UserError if there is no such file or it is damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except TypeError as error:
        raise UserError(f"{path}: {error}; convert the tensors to float32") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def sync(path: Path) -> None:
    """Ask the operating system to put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

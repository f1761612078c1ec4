"""The building blocks by themselves, for code that has no `ModelConfig`: each with the arguments that a library's user
expects, made of the same functions as the model.

B batch, T query positions, S key positions, D model width, N heads, H head_dim, F inner width.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_common.config import RopeScaling
from llm_common.errors import UserError
from llm_common.files.tree_file import read_tree, write_tree
from llm_common.rope import Rotation
from torch_llm import layers, optim
from torch_llm.attention import causal_mask
from torch_llm.layers import upcast
from torch_llm.rope import RotaryTable, apply_rope

__all__ = [
    "attention", "clip_grad_norm_", "feed_forward", "load_state", "multihead_attention", "rotate", "save_state", "silu",
    "softmax",
]  # fmt: skip


def _real(*tensors: Tensor) -> None:
    """Raise UserError for tensors of whole numbers, in which a result would be cut off."""
    for x in tensors:
        if not x.is_floating_point():
            raise UserError(f"a tensor of {str(x.dtype).removeprefix('torch.')}: one of real numbers is needed")


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), in float32 and rounded once; any shape."""
    _real(x)
    return torch.nn.functional.silu(upcast(x)).to(x.dtype)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Probabilities along an axis, in float32 and rounded once; any shape."""
    _real(x)
    return torch.softmax(upcast(x), dim=dim).to(x.dtype)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) for x (..., D), gate and up (F, D), down (D, F): (..., D)."""
    return layers.linear(layers.swiglu(layers.linear(x, gate), layers.linear(x, up)), down)


def rotate(
    x: Tensor,
    positions: Tensor | None = None,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    interleaved: bool = False,
    length: int | None = None,
) -> Tensor:
    """Rotary embedding of x (..., T, H) at positions, (T,) or (..., T), 0 to T - 1 if None.

    interleaved: the pairs are (x[2i], x[2i + 1]), as the paper and Meta's files have them, not (x[i], x[i + H/2]).
    length: more than the largest position; found if it is not given.
    """
    t, h = _rotated(x, theta)
    positions = torch.arange(t, device=x.device) if positions is None else torch.as_tensor(positions, device=x.device)
    if positions.dtype == torch.bool or positions.is_floating_point():
        raise UserError(f"positions of {str(positions.dtype).removeprefix('torch.')}: whole numbers are needed")
    positions = positions.long()
    if length is None:
        length = int(positions.max()) + 1 if positions.numel() else 1
    cos, sin = RotaryTable(Rotation(h, theta, length, scaling))(positions, upcast(x).dtype)
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1) if interleaved else x
    out = apply_rope(halves[..., None, :], cos, sin)[..., 0, :]
    if not interleaved:
        return out
    first, second = torch.chunk(out, 2, dim=-1)
    return torch.stack([first, second], dim=-1).reshape(x.shape)


def _rotated(x: Tensor, theta: float) -> tuple[int, int]:
    """T and H of what is rotated. Raises UserError for what has no pairs, or no frequencies."""
    _real(x)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise UserError(f"x of shape {tuple(x.shape)}: (..., T, H) with an even H is needed")
    if not 0 < theta < float("inf"):
        raise UserError(f"theta = {theta}: must be positive")
    return x.shape[-2], x.shape[-1]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v for q (..., T, H), k (..., S, H), v (..., S, any): (..., T, any).

    mask: bool, True where a query may look, broadcast to (..., T, S); None: everywhere. A query that may look nowhere
    gets 0.
    """
    _real(q, k, v)
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(
            f"mask of {str(mask.dtype).removeprefix('torch.')}: bool is needed, True where a query may look"
        )
    scores = torch.einsum("...th,...sh->...ts", upcast(q), upcast(k)) * q.shape[-1] ** -0.5
    mask = torch.ones((), dtype=torch.bool, device=q.device) if mask is None else mask
    seen = torch.broadcast_to(mask, scores.shape)
    # a row of -inf alone would be NaN, and its gradient, too
    scores = torch.where(seen, scores, torch.where(seen.any(-1, keepdim=True), -torch.inf, 0.0))
    probs = torch.where(seen, torch.softmax(scores, dim=-1), 0.0)
    return torch.einsum("...ts,...sh->...th", probs.to(v.dtype), v)


def multihead_attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    heads: int,
    rotation: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal attention of x (..., T, D) with weights (out, in): q (N*H, D), k and v (K*H, D), o (D, N*H): (..., T, D).

    heads: N; k and v may have fewer, K, each for N/K of the queries'. rotation: of q and k, (..., N, T, H), as `rotate`
    is. mask: as of `attention`, instead of the causal one.
    """
    if heads < 1:
        raise UserError(f"heads = {heads}: at least 1")
    t, h = x.shape[-2], q.shape[0] // heads
    if h == 0 or q.shape[0] % heads or k.shape[0] % h or heads % max(k.shape[0] // h, 1):
        raise UserError(f"heads = {heads} do not divide weights of {q.shape[0]} and {k.shape[0]} rows")
    split = lambda w: layers.linear(x, w).reshape(*x.shape[:-1], w.shape[0] // h, h).transpose(-2, -3)  # (..., N, T, H)
    queries, keys, values = split(q), split(k), split(v)
    if rotation is not None:
        queries, keys = rotation(queries), rotation(keys)
    repeat = lambda a: torch.repeat_interleave(a, heads // a.shape[-3], dim=-3)
    places = torch.arange(t, device=x.device)
    mask = causal_mask(places, places) if mask is None else mask
    out = attention(queries, repeat(keys), repeat(values), mask)
    return layers.linear(out.transpose(-2, -3).reshape(*x.shape[:-1], q.shape[0]), o)


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Multiply the gradients by min(1, max_norm / norm), in place; returns the norm before. No epsilon is added to it.

    A parameter without a gradient is left out. Raises UserError unless max_norm is positive.
    """
    if not max_norm > 0:
        raise UserError(f"max_norm = {max_norm}: must be positive")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = optim.global_norm(grads)
    factor = optim.clip_factor(norm, max_norm)
    for g in grads:
        g.mul_(factor.to(g.device))
    return norm


def save_state(path: Path | str, state: Any, **values: Any) -> None:
    """Write a state dict, or any nesting of dicts and lists with tensors and numbers, into one safetensors file, whole
    or not at all: of modules and optimizers alike. values: JSON beside it.
    """
    tensors, rest = _flatten(state)
    arrays, shapes = {}, {}  # NumPy has no bfloat16: its bits are written, and its shape beside them
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        if x.dtype == torch.bfloat16:
            shapes[name], x = list(x.shape), x.reshape(-1).view(torch.int16)
        arrays[name] = x.numpy()
    write_tree(Path(path), arrays, {"values": values, "rest": rest, "bfloat16": shapes})


def load_state(path: Path | str) -> tuple[Any, dict[str, Any]]:
    """What `save_state` wrote, on the CPU, and the values beside it: for `load_state_dict`. Runs no code of the file.

    Raises UserError if the file is missing or damaged.
    """
    arrays, saved = read_tree(Path(path), None)
    if not {"values", "rest", "bfloat16"} <= set(saved):
        raise UserError(f"{path}: not written by save_state")
    tensors = {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}
    for name, shape in saved["bfloat16"].items():
        tensors[name] = tensors[name].view(torch.bfloat16).reshape(shape)
    return _unflatten(saved["rest"], tensors), saved["values"]


def _flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a nesting by number, and the nesting with numbers in their places, as JSON."""
    tensors: dict[str, Tensor] = {}

    def walk(x: Any) -> Any:
        if isinstance(x, Tensor):
            name = f"{len(tensors):05d}"
            tensors[name] = x
            return {"tensor": name}
        if isinstance(x, dict):
            if not all(isinstance(key, str | int) for key in x):
                raise UserError("save_state: keys must be text or whole numbers")
            return {"dict": [[key, walk(value)] for key, value in x.items()]}
        if isinstance(x, list | tuple):
            return {"list" if isinstance(x, list) else "tuple": [walk(value) for value in x]}
        if x is None or isinstance(x, bool | int | float | str):
            return {"value": x}
        raise UserError(f"save_state: a {type(x).__name__}; what can be saved are tensors, numbers, text, dicts, lists")

    return tensors, walk(state)


def _unflatten(rest: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, x),) = rest.items()
    if kind == "tensor":
        return tensors[x]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in x}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_unflatten(value, tensors) for value in x)
    return x

"""The building blocks by themselves, for code that has no `ModelConfig`: each with the arguments that a library's user
expects, made of the same functions as the model.

B batch, T query positions, S key positions, D model width, N heads, H head_dim, F inner width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from jax_llm import layers, optim
from jax_llm.attention import causal_mask
from jax_llm.layers import upcast
from jax_llm.rope import apply_rope, rotary_table
from llm_common.config import RopeScaling
from llm_common.errors import UserError
from llm_common.files.tree_file import read_tree, write_tree
from llm_common.rope import Rotation
from llm_common.schedule import StepScalars, check_adamw

__all__ = [
    "adamw", "attention", "clip_by_global_norm", "feed_forward", "load_tree", "multihead_attention", "rotate",
    "save_tree", "silu", "softmax",
]  # fmt: skip


def _real(*arrays: Array) -> None:
    """Raise UserError for arrays of whole numbers, in which a result would be cut off."""
    for x in arrays:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"an array of {x.dtype}: one of real numbers is needed")


def silu(x: Array) -> Array:
    """x * sigmoid(x), in float32 and rounded once; any shape."""
    _real(x)
    return jax.nn.silu(upcast(x)).astype(x.dtype)


def softmax(x: Array, axis: int = -1) -> Array:
    """Probabilities along an axis, in float32 and rounded once; any shape."""
    _real(x)
    return jax.nn.softmax(upcast(x), axis=axis).astype(x.dtype)


def feed_forward(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """down(silu(gate(x)) * up(x)) for x (..., D), gate and up (F, D), down (D, F): (..., D)."""
    return layers.linear(layers.swiglu(layers.linear(x, gate), layers.linear(x, up)), down)


def rotate(
    x: Array,
    positions: Array | None = None,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    interleaved: bool = False,
    length: int | None = None,
) -> Array:
    """Rotary embedding of x (..., T, H) at positions, (T,) or (..., T), 0 to T - 1 if None.

    interleaved: the pairs are (x[2i], x[2i + 1]), as the paper and Meta's files have them, not (x[i], x[i + H/2]).
    length: more than the largest position; found if it is not given, which a compiled function cannot.
    """
    t, h = _rotated(x, theta)
    places = np.arange(t) if positions is None else positions if isinstance(positions, Array) else np.asarray(positions)
    if not jnp.issubdtype(places.dtype, jnp.integer):
        raise UserError(f"positions of {places.dtype}: whole numbers are needed")
    if length is None:
        if isinstance(places, Tracer):
            raise UserError("length is missing: in a compiled function nobody can see how large the positions are")
        length = int(np.max(places)) + 1 if places.size else 1
    positions = jnp.asarray(places)
    cos, sin = rotary_table(Rotation(h, theta, length, scaling), length, upcast(x).dtype)
    halves = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1) if interleaved else x
    out = apply_rope(halves[..., None, :], cos[positions], sin[positions])[..., 0, :]
    if not interleaved:
        return out
    first, second = jnp.split(out, 2, axis=-1)
    return jnp.stack([first, second], axis=-1).reshape(x.shape)


def _rotated(x: Array, theta: float) -> tuple[int, int]:
    """T and H of what is rotated. Raises UserError for what has no pairs, or no frequencies."""
    _real(x)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise UserError(f"x of shape {tuple(x.shape)}: (..., T, H) with an even H is needed")
    if not 0 < theta < float("inf"):
        raise UserError(f"theta = {theta}: must be positive")
    return x.shape[-2], x.shape[-1]


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(H)) v for q (..., T, H), k (..., S, H), v (..., S, any): (..., T, any).

    mask: bool, True where a query may look, broadcast to (..., T, S); None: everywhere. A query that may look nowhere
    gets 0.
    """
    _real(q, k, v)
    if mask is not None and mask.dtype != jnp.bool_:
        raise UserError(f"mask of {mask.dtype}: bool is needed, True where a query may look")
    scores = jnp.einsum("...th,...sh->...ts", upcast(q), upcast(k)) * q.shape[-1] ** -0.5
    seen = jnp.broadcast_to(True if mask is None else mask, scores.shape)
    # a row of -inf alone would be NaN, and its gradient, too
    scores = jnp.where(seen, scores, jnp.where(seen.any(-1, keepdims=True), -jnp.inf, 0.0))
    probs = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("...ts,...sh->...th", probs.astype(v.dtype), v)


def multihead_attention(
    x: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    heads: int,
    rotation: Callable[[Array], Array] | None = None,
    mask: Array | None = None,
) -> Array:
    """Causal attention of x (..., T, D) with weights (out, in): q (N*H, D), k and v (K*H, D), o (D, N*H): (..., T, D).

    heads: N; k and v may have fewer, K, each for N/K of the queries'. rotation: of q and k, (..., N, T, H), as `rotate`
    is. mask: as of `attention`, instead of the causal one.
    """
    if heads < 1:
        raise UserError(f"heads = {heads}: at least 1")
    t, h = x.shape[-2], q.shape[0] // heads
    if h == 0 or q.shape[0] % heads or k.shape[0] % h or heads % max(k.shape[0] // h, 1):
        raise UserError(f"heads = {heads} do not divide weights of {q.shape[0]} and {k.shape[0]} rows")
    heads_of = lambda w: layers.linear(x, w).reshape(*x.shape[:-1], w.shape[0] // h, h)
    split = lambda w: jnp.swapaxes(heads_of(w), -2, -3)  # (..., N, T, H)
    queries, keys, values = split(q), split(k), split(v)
    if rotation is not None:
        queries, keys = rotation(queries), rotation(keys)
    repeat = lambda a: jnp.repeat(a, heads // a.shape[-3], axis=-3)
    mask = causal_mask(jnp.arange(t), jnp.arange(t)) if mask is None else mask
    out = attention(queries, repeat(keys), repeat(values), mask)
    return layers.linear(jnp.swapaxes(out, -2, -3).reshape(*x.shape[:-1], q.shape[0]), o)


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, Array]:
    """A tree of gradients times min(1, max_norm / norm), and the norm before; no epsilon is added to it.

    Raises UserError unless max_norm is positive.
    """
    if not max_norm > 0:
        raise UserError(f"max_norm = {max_norm}: must be positive")
    _real(*jax.tree.leaves(grads))
    norm = optim.global_norm(grads)
    factor = optim.clip_factor(norm, max_norm)
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), norm


def adamw(
    learning_rate: float | Callable[[Array], Array | float] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mask: Any = None,
) -> optax.GradientTransformation:
    """`optim.adamw` as optax's users call one: it counts its updates itself.

    A leaf narrower than float32 has a float32 master, which is state like the moments, as in torch_llm's.
    learning_rate: a number, or a function of the number of updates made. mask: a tree of bools, True where a leaf
    decays, or a function of the parameters that gives one; None: all do, as in optax and in torch.
    """
    check_adamw(0.0 if callable(learning_rate) else learning_rate, betas, eps, weight_decay)
    beta1, beta2 = betas

    def transformation(params: Any) -> optax.GradientTransformationExtraArgs:
        decaying = jax.tree.map(lambda _: True, params) if mask is None else mask(params) if callable(mask) else mask
        return optim.adamw(beta1, beta2, eps, weight_decay, decaying)

    def init(params):
        masters = jax.tree.map(upcast, params)
        return jnp.zeros((), jnp.int32), transformation(params).init(masters), masters

    def update(updates, state, params=None):
        if params is None:
            raise UserError("update(gradients, state, params): the parameters are needed, they decay")
        count, moments, masters = state
        # where there is nothing to keep apart, the parameter is its own master, whatever was done to it outside
        masters = jax.tree.map(lambda p, m: p if p.dtype == m.dtype else m, params, masters)
        lr = learning_rate(count) if callable(learning_rate) else learning_rate
        n = (count + 1).astype(jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(params))))
        # 1 - beta^n without the cancellation that float32 would have at the start
        corrections = (-jnp.expm1(n * np.log(beta)) if beta > 0 else jnp.ones_like(n) for beta in betas)
        scalars: Any = StepScalars(lr, *corrections)  # type: ignore[arg-type]  # traced
        grads = jax.tree.map(upcast, updates)
        updates, moments = transformation(params).update(grads, moments, masters, scalars=scalars)
        moved = jax.tree.map(lambda m, u: (m + u).astype(m.dtype), masters, updates)
        # what a parameter must be moved by to become its master, rounded
        updates = jax.tree.map(lambda p, m, u: u if p.dtype == m.dtype else m - upcast(p), params, moved, updates)
        return updates, (count + 1, moments, moved)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def save_tree(path: Path | str, tree: Any, **values: Any) -> None:
    """Write any pytree of arrays and numbers into one safetensors file, whole or not at all. values: JSON beside it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    write_tree(Path(path), {jax.tree_util.keystr(key): np.asarray(x) for key, x in leaves}, values)


def load_tree(path: Path | str, like: Any) -> tuple[Any, dict[str, Any]]:
    """A pytree of the same structure as `like`, and the values saved beside it.

    Raises UserError if the file is damaged, or has other leaves, shapes or dtypes.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {jax.tree_util.keystr(key): x for key, x in leaves}
    arrays, values = read_tree(Path(path), {name: np.asarray(x) for name, x in wanted.items()})

    def restored(x: np.ndarray, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jnp.array(x)  # copied: an array made of NumPy's memory would be that memory
        # NumPy's arrays and Python's numbers stay what they are: JAX would keep 32 of their 64 bits
        return np.array(x) if isinstance(leaf, (np.ndarray, np.generic)) else type(leaf)(x.item())

    found = [restored(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree_util.tree_unflatten(structure, found), values

"""Linear, Embedding, RMSNorm and the SwiGLU MLP: free functions on arrays, then modules that name their weights.

B batch, T positions, D hidden_size, F intermediate_size (or any output size), V vocab_size.
Weights are (out, in), as in the checkpoint. The activations' dtype is that of the weights.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from llm_common.tensors import INIT_STD

DType = Any


def upcast(x: Array) -> Array:
    """x in float32, or in float64 if it is float64: the dtype of statistics, softmax and loss."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear(x: Array, weight: Array) -> Array:
    """x @ weight.T: (..., D) and (F, D) to (..., F).

    In float32 and float64, x is flattened to 2-D first. Otherwise the weight gradient contracts batch and time, and
    XLA's CPU backend copies both operands.
    """
    rows = x if x.dtype == jnp.bfloat16 else x.reshape(-1, x.shape[-1])
    return jnp.einsum("...d,fd->...f", rows, weight).reshape(*x.shape[:-1], weight.shape[0])


def embedding(input_ids: Array, weight: Array) -> Array:
    """Rows of weight (V, D) at input_ids (B, T): (B, T, D). Ids must lie in [0, V): JAX would clamp or wrap silently.

    The look-up is made in float32 so that its backward pass, a scatter-add, sums in float32: in bfloat16 a frequent
    token's gradient would lose its small terms.
    """
    return upcast(weight)[input_ids].astype(weight.dtype)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: (..., D) and (D,) to (..., D).

    Llama's order: statistics in float32, round to the activation dtype, then multiply by the weight.
    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    h = upcast(x)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return h.astype(x.dtype) * weight


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up in float32, rounded once: in bfloat16 the frameworks' own silu differ in a third of elements.

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    return (jax.nn.silu(upcast(gate)) * upcast(up)).astype(gate.dtype)


class Linear(nn.Module):
    """A linear map; its weight is (features, D), its bias, if it has one, (features,)."""

    features: int
    param_dtype: DType = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(INIT_STD)
        weight = self.param("weight", init, (self.features, x.shape[-1]), self.param_dtype)
        if not self.use_bias:
            return linear(x, weight)
        return linear(x, weight) + self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)


class Embedding(nn.Module):
    """A table of D-vectors, one for each of V token ids; `attend` is the tied head."""

    vocab_size: int
    hidden_size: int
    param_dtype: DType = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(INIT_STD)
        self.weight = self.param("weight", init, (self.vocab_size, self.hidden_size), self.param_dtype)

    def __call__(self, input_ids: Array) -> Array:
        return embedding(input_ids, self.weight)

    def attend(self, x: Array) -> Array:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain per channel."""

    eps: float
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        return rms_norm(x, weight, self.eps)


class MLP(nn.Module):
    """The gated feed-forward block: down(silu(gate(x)) * up(x)).

    barrier: for GPUs. XLA fuses the gradients of `gate` and `up`, which read the same arrays, only if these are not the
    direct outputs of a matrix product.
    """

    intermediate_size: int
    param_dtype: DType = jnp.float32
    barrier: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable("params", "gate_up_proj"):  # one product in the place of two
            both = Linear(2 * self.intermediate_size, self.param_dtype, name="gate_up_proj")(x)  # (B, T, 2 F)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = Linear(self.intermediate_size, self.param_dtype, name="gate_proj")(x)  # (B, T, F)
            up = Linear(self.intermediate_size, self.param_dtype, name="up_proj")(x)  # (B, T, F)
            if self.barrier:
                gate, up = jax.lax.optimization_barrier((gate, up))
        return Linear(x.shape[-1], self.param_dtype, name="down_proj")(swiglu(gate, up))  # (B, T, D)

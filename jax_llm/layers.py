"""Linear, Embedding, RMSNorm and the SwiGLU MLP: free functions on arrays, then modules that name their weights.

B batch, T positions, D hidden_size, F intermediate_size (or any output size), V vocab_size.
Weights are (out, in), as in the checkpoint. The activations' dtype is that of the weights.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jax_llm.kernels import Kernels


def upcast(x: Array) -> Array:
    """x in float32, or in float64 if it is float64: the dtype of statistics, softmax and loss."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear(x: Array, weight: Array) -> Array:
    """x @ weight.T: (..., D) and (F, D) to (..., F)."""
    return jnp.einsum("...d,fd->...f", x, weight)


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


def gate_and_up(x: Array, features: int, linear: Callable) -> tuple[Array, Array]:
    """The MLP's projections of x (B, T, D): gate and up (B, T, F). Called within a module, which has their weights."""
    return Linear(features, linear, name="gate_proj")(x), Linear(features, linear, name="up_proj")(x)


# Modules name the weights and say their shapes; the values come from `init_params` or a checkpoint.


class Linear(nn.Module):
    """A linear map; its weight is (features, D), its bias, if it has one, (features,)."""

    features: int
    product: Callable[[Array, Array], Array] = linear
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        out = self.product(x, self.param("weight", nn.initializers.zeros, (self.features, x.shape[-1])))
        return out + self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else out


class Embedding(nn.Module):
    """A table of D-vectors, one for each of V token ids; `attend` is the tied head."""

    vocab_size: int
    hidden_size: int
    kernels: Kernels

    def setup(self) -> None:
        self.weight = self.param("weight", nn.initializers.zeros, (self.vocab_size, self.hidden_size))

    def __call__(self, input_ids: Array) -> Array:
        return self.kernels.embedding(input_ids, self.weight)

    def attend(self, x: Array) -> Array:
        return self.kernels.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain per channel."""

    eps: float
    function: Callable[[Array, Array, float], Array] = rms_norm

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return self.function(x, self.param("weight", nn.initializers.zeros, (x.shape[-1],)), self.eps)


class MLP(nn.Module):
    """The gated feed-forward block: down(silu(gate(x)) * up(x))."""

    intermediate_size: int
    kernels: Kernels

    @nn.compact
    def __call__(self, x: Array) -> Array:
        linear = self.kernels.linear
        gate, up = self.kernels.gate_up(x, self.intermediate_size, linear)  # (B, T, F) each
        return Linear(x.shape[-1], linear, name="down_proj")(self.kernels.activation(gate, up))  # (B, T, D)

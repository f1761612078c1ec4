"""Linear, Embedding, RMSNorm and the SwiGLU MLP: free functions on tensors, then modules that own their weights.

B batch, T positions, D hidden_size, F intermediate_size (or any output size), V vocab_size.
Weights are (out, in), as in the checkpoint. The activations' dtype is that of the weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_llm.kernels import Kernels


def upcast(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64: the dtype of statistics, softmax and loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: (..., D) and (F, D) to (..., F)."""
    return F.linear(x, weight)


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (V, D) at input_ids (B, T): (B, T, D). Ids must lie in [0, V): torch raises on others.

    The look-up is made in float32 so that its backward pass, a scatter-add, sums in float32: in bfloat16 a frequent
    token's gradient would lose its small terms. F.embedding has a deterministic backward pass, indexing has not.
    """
    return F.embedding(input_ids, upcast(weight)).to(weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: (..., D) and (D,) to (..., D).

    Llama's order: statistics in float32, round to the activation dtype, then multiply by the weight.
    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    h = upcast(x)
    h = h * torch.rsqrt(torch.mean(h * h, dim=-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in float32, rounded once: in bfloat16 the frameworks' own silu differ in a third of elements.

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    return (F.silu(upcast(gate)) * upcast(up)).to(gate.dtype)


def gate_and_up(mlp: "MLP", x: Tensor) -> tuple[Tensor, Tensor]:
    """The MLP's projections of x (B, T, D): gate and up (B, T, F)."""
    return mlp.gate_proj(x), mlp.up_proj(x)


# Modules own the weights, which are zero until `init_weights` or a checkpoint fills them in.


class Linear(nn.Module):
    """A linear map; its weight is (out_features, in_features), its bias, if it has one, (out_features,)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        product: Callable[[Tensor, Tensor], Tensor] = linear,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x, self.weight)
        return (
            out if self.bias is None else out + self.bias
        )  # not F.linear's own bias, which is added before the rounding


class Embedding(nn.Module):
    """A table of D-vectors, one for each of V token ids; `attend` is the tied head."""

    def __init__(self, vocab_size: int, hidden_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, hidden_size))
        self.kernels = kernels

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.kernels.embedding(input_ids, self.weight)

    def attend(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a gain per channel."""

    def __init__(
        self, hidden_size: int, eps: float, function: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.eps, self.function = eps, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class MLP(nn.Module):
    """The gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Linear(hidden_size, intermediate_size, kernels.linear)
        self.up_proj = Linear(hidden_size, intermediate_size, kernels.linear)
        self.down_proj = Linear(intermediate_size, hidden_size, kernels.linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.kernels.gate_up(self, x)  # (B, T, F) each
        return self.down_proj(self.kernels.activation(gate, up))  # (B, T, D)

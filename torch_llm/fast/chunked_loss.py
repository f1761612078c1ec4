"""Cross-entropy whose logits are made in parts, one after the other, and its gradients with them.

B batch, T positions, D hidden_size, V vocab_size.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from torch_llm.layers import linear, upcast
from torch_llm.loss import IGNORE_INDEX, cross_entropy
from torch_llm.model import CausalLM


@dataclasses.dataclass(frozen=True)
class ChunkedLoss:
    """`mean_loss` whose logits are made in `chunks` parts."""

    chunks: int

    def __call__(self, model: CausalLM, inputs: Tensor, targets: Tensor, count: Tensor) -> Tensor:
        x = model.model(inputs)  # (B, T, D)
        return chunked_cross_entropy(x, model.head_weight(), targets, count, self.chunks)


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, count: Tensor, chunks: int) -> Tensor:
    """`cross_entropy` of the logits linear(x, weight), T / chunks positions at a time: all logits never exist.

    x (B, T, D), weight (V, D) of the head, targets (B, T). Gradients are computed in the same pass, so each logit is
    computed once. The gradient of weight is summed over the chunks in float32.
    """
    total = _Chunks.apply(x, weight, targets, count, chunks)
    assert isinstance(total, Tensor)
    return total


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, count: Tensor, chunks: int) -> Tensor:
        d_weight, d_x = torch.zeros_like(upcast(weight)), []
        total = torch.zeros((), dtype=d_weight.dtype, device=x.device)
        for own, own_targets in zip(x.chunk(chunks, dim=1), targets.chunk(chunks, dim=1), strict=True):
            logits = linear(own, weight)  # (B, T / chunks, V)
            d_logits = d_cross_entropy(logits, own_targets, count)
            d_weight = d_weight + upcast(d_logits.flatten(0, 1).T @ own.flatten(0, 1))
            total = total + cross_entropy(logits, own_targets, count)
            d_x.append(d_logits @ weight)
        ctx.save_for_backward(torch.cat(d_x, dim=1), d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *((grads[0] * d).to(d.dtype) for d in ctx.saved_tensors), None, None, None


def d_cross_entropy(logits: Tensor, targets: Tensor, count: Tensor) -> Tensor:
    """The gradient of `cross_entropy` for its logits: (..., V) in their dtype.

    (softmax - one hot) / count; 0 where the target is -100.
    """
    probs = torch.softmax(upcast(logits), dim=-1)
    hot = (targets[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(probs.dtype)
    counted = (targets != IGNORE_INDEX)[..., None]
    return (torch.where(counted, probs - hot, 0.0) / count.clamp(min=1)).to(logits.dtype)

"""Cross-entropy of next tokens.

B batch, T positions, D hidden_size, V vocab_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_llm.layers import linear, upcast

IGNORE_INDEX = -100  # a target that is not counted


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[target] in nats over targets != -100, and how many those are.

    logits (..., V), targets (...). Computed in float32. Targets must lie in [0, V) or be -100: that is checked on the
    host, where the data is read.
    """
    logits, targets = upcast(logits).reshape(-1, logits.shape[-1]), targets.reshape(-1)  # the class axis is 1
    total = F.cross_entropy(logits, targets.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (targets != IGNORE_INDEX).sum()


def cross_entropy(logits: Tensor, targets: Tensor, count: Tensor | None = None) -> Tensor:
    """Mean over the counted targets, a scalar in nats; 0 with zero gradients if there is none.

    count: how many targets count in the whole batch, of which these may be a part; the parts' results then add up.
    """
    total, own_count = cross_entropy_sum(logits, targets)
    count = own_count if count is None else count
    return total / count.clamp(min=1)


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, count: Tensor, chunks: int) -> Tensor:
    """`cross_entropy` of the logits linear(x, weight), which are made for T / chunks positions at a time and are never all there.

    x (B, T, D), weight (V, D) of the head, targets (B, T). The backward pass makes the logits again, and sums the gradient of
    weight over the chunks in float32.
    """
    weight = upcast(weight)

    def loss(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(linear(x, weight.to(x.dtype)), targets, count)

    cut = zip(x.chunk(chunks, dim=1), targets.chunk(chunks, dim=1), strict=True)  # (B, T / chunks, ...)
    return torch.stack([checkpoint(loss, *chunk, weight, use_reentrant=False) for chunk in cut]).sum()

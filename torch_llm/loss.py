"""Cross-entropy of next tokens.

B batch, T positions, D hidden_size, V vocab_size.
"""

import torch.nn.functional as F
from torch import Tensor

from torch_llm.layers import upcast

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

    count: how many targets count in the whole batch, if these are a part of it; the parts' results then add up.
    """
    total, own_count = cross_entropy_sum(logits, targets)
    count = own_count if count is None else count
    return total / count.clamp(min=1)

"""Several documents in one sequence, none of which sees another: where attention may look, and positions that begin anew.

B batch, T positions.
"""

import torch
from torch import Tensor

from torch_llm.attention import causal_mask


def inside_documents(
    input_ids: Tensor, separator: int | tuple[int, ...], window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Positions within their documents (B, T) and a mask (B, 1, T, T), True where a query may look, for ids (B, T).

    `separator` is the id, or one of several, that ends a document and still belongs to it. A query sees the last `window`
    positions of its document, its own included.
    """
    separators = (separator,) if isinstance(separator, int) else separator
    ends = torch.stack([input_ids == x for x in separators]).any(dim=0).long()  # (B, T)
    documents = torch.cumsum(ends, dim=1) - ends  # (B, T): how many have ended before
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    t = torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = (same & causal_mask(t, t)).sum(dim=-1) - 1
    return positions, (same & causal_mask(t, t, window))[:, None]

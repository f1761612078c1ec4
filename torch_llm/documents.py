"""Several documents in one sequence: where attention may look, so that no document sees another, and positions that
begin anew.

B batch, T positions.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from llm_common.config import ModelConfig, check_length
from torch_llm.attention import Place, causal_mask
from torch_llm.kv_cache import KVCache
from torch_llm.model import CausalPlaces


def inside_documents(
    input_ids: Tensor, separator: int | tuple[int, ...], window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Positions within their documents (B, T) and a mask (B, 1, T, T), True where a query may look, for ids (B, T).

    `separator` is the id, or one of several, that ends a document and still belongs to it. A query sees the last
    `window` positions of its document, its own included.
    """
    separators = (separator,) if isinstance(separator, int) else separator
    ends = torch.stack([input_ids == x for x in separators]).any(dim=0).long()  # (B, T)
    documents = torch.cumsum(ends, dim=1) - ends  # (B, T): how many have ended before
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    t = torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = (same & causal_mask(t, t)).sum(dim=-1) - 1
    return positions, (same & causal_mask(t, t, window))[:, None]


@dataclasses.dataclass(frozen=True)
class DocumentPlaces:
    """The places of layers in which no document of a sequence sees another; with a cache, those of one text."""

    separator: int | tuple[int, ...]  # the id, or several, that ends a document

    def __call__(self, cfg: ModelConfig) -> "_DocumentPlaces":
        return _DocumentPlaces(cfg, self.separator)


class _DocumentPlaces(CausalPlaces):
    def __init__(self, cfg: ModelConfig, separator: int | tuple[int, ...]) -> None:
        super().__init__(cfg)
        self.separator = separator

    def __call__(self, input_ids: Tensor, cache: KVCache | None, dtype: torch.dtype) -> Callable[[int], Place]:
        if cache is not None:
            return super().__call__(input_ids, cache, dtype)
        check_length(self.cfg, input_ids.shape[1], "the input")
        positions, mask = inside_documents(input_ids, self.separator, self.cfg.sliding_window)
        place = Place(*self.rotary_table(positions, dtype), mask, self.cfg.sliding_window)
        return lambda layer: place

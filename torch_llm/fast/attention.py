"""Attention by other kernels than `reference_attention`, and which of them a run takes.

B batch, T query positions, S key positions, N query heads, K key/value heads, H head_dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llm_common.config import ModelConfig
from llm_common.errors import UserError
from torch_llm.attention import Place, causal_mask, reference_attention
from torch_llm.kv_cache import KVCache

Mask = Tensor | BlockMask | None  # None: causal


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, window: int | None = None) -> Tensor:
    """The same through `F.scaled_dot_product_attention`, which picks the device's fastest kernel.

    A BlockMask goes to FlexAttention, which skips the blocks that it hides.
    """
    if mask is None and window is not None and window < q.shape[1]:  # the function knows no window
        positions = torch.arange(q.shape[1], device=q.device)
        mask = causal_mask(positions, positions, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, H)
    scale = q.shape[-1] ** -0.5
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
    return out.transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


def attention_kernel(backend: str) -> Callable[..., Tensor]:
    """The function of a resolved backend: "reference" or "sdpa"."""
    known = {"reference": reference_attention, "sdpa": fused_attention}
    if backend not in known:
        raise UserError(f"attention backend {backend!r} is unknown; known: {', '.join(known)}")
    return known[backend]


def resolve_backend(setting: str, compute_dtype: str) -> str:
    """The backend for a setting: "auto", "reference" or "fused".

    Resolved once, outside the model. float64 takes the reference. The fused function takes any device and shape: where
    cuDNN and flash attention refuse, it falls back to a slower kernel.
    """
    if setting == "splash":
        raise UserError("attention_backend = 'splash' is a kernel for TPUs, in JAX; use 'auto'")
    if setting == "reference" or (setting == "auto" and compute_dtype == "float64"):
        return "reference"
    return "sdpa"


def takes_blocks(backend: str, platform: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a compiled program should use FlexAttention's BlockMask.

    Uncompiled FlexAttention is slow; compiled, it has no float64.
    """
    return backend == "sdpa" and platform == "cuda" and dtype == torch.bfloat16 and head_dim in (16, 32, 64, 128)


def block_mask(mask: Tensor) -> BlockMask:
    """FlexAttention's BlockMask of a mask (B, 1, T, S), True where a query may look."""
    b, _, t, s = mask.shape
    return create_block_mask(lambda b, h, i, j: mask[b, 0, i, j], b, None, t, s, device=mask.device)


@dataclasses.dataclass(frozen=True)
class BlockPlaces:
    """The places of layers with masks in blocks where a compiled program is made of them; causal attention has no mask.

    places: the kernel whose masks these are.
    """

    places: Callable[[ModelConfig], Callable[..., Callable[[int], Place]]]

    def __call__(self, cfg: ModelConfig) -> "_BlockPlaces":
        return _BlockPlaces(self.places(cfg))


class _BlockPlaces:
    def __init__(self, places: Any) -> None:
        self.places, self.rotary_table = places, places.rotary_table

    def __call__(self, input_ids: Tensor, cache: KVCache | None, dtype: torch.dtype) -> Callable[[int], Place]:
        places = self.places(input_ids, cache, dtype)
        if cache is not None or not torch.compiler.is_compiling():
            return places
        first = places(0)
        blocks = with_blocks(first, *input_ids.shape)  # made once for all layers that share a place
        return lambda layer: blocks if places(layer) is first else with_blocks(places(layer), *input_ids.shape)


def with_blocks(place: Place, b: int, t: int) -> Place:
    """A place of B sequences of T positions with its mask, or its window, in blocks."""
    mask, window = place.mask, place.window
    if mask is None and window is not None and window < t:
        positions = torch.arange(t, device=place.cos.device)
        mask = causal_mask(positions, positions, window).expand(b, 1, t, t)
    return place if mask is None else place._replace(mask=block_mask(mask))

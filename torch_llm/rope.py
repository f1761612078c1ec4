"""Applying the rotary table of `llm_common.rope`.

B batch, T positions, N heads, H head_dim.
"""

import torch
from torch import Tensor

from llm_common.config import ModelConfig
from llm_common.rope import Rotation, rope_table
from torch_llm.layers import upcast


class RotaryTable:
    """cos and sin, each (length, H/2): the float64 table, cast last for each device and dtype that asks.

    Not a module buffer: `module.to(torch.bfloat16)` would round it.
    """

    def __init__(self, cfg: ModelConfig | Rotation) -> None:
        self.float64 = [torch.from_numpy(table) for table in rope_table(cfg)]
        self._cast: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rows of some positions, (T,) or (B, T): (..., T, H/2) each, on their device."""
        device = positions.device
        if (device, dtype) not in self._cast:
            with torch.inference_mode(False):  # a table made while generating must serve training afterwards
                self._cast[device, dtype] = [table.to(dtype).to(device) for table in self.float64]
        cos, sin = self._cast[device, dtype]
        return cos[positions], sin[positions]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + H/2]) of x (B, T, N, H) by the angles of cos and sin, (T, H/2) or (B, T, H/2).

    The half-split convention of Hugging Face. Done in float32 and rounded once.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4.2.
    """
    x1, x2 = torch.chunk(upcast(x), 2, dim=-1)  # (B, T, N, H/2) each
    cos, sin = cos[..., None, :], sin[..., None, :]  # (T, 1, H/2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)

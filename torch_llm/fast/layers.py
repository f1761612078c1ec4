"""Another way through a layer: computed again in the backward pass.

B batch, T positions, D hidden_size.
"""

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from torch_llm.attention import Place
from torch_llm.kv_cache import KVCache
from torch_llm.model import run_layer

MATRIX_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # those without a batch axis
REMAT_OPTIONS = {
    "full": {},
    "dots": {"context_fn": partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)},
}


@dataclasses.dataclass(frozen=True)
class Remat:
    """`run_layer` for training; without gradients, that function itself.

    policy: what a layer's backward pass computes again instead of keeping it from the forward pass. "dots": all but the
    matrix products; "full": everything but the layer's input.
    """

    policy: str

    def __call__(self, layer: nn.Module, x: Tensor, place: Place, cache: KVCache | None, i: int) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return run_layer(layer, x, place, cache, i)
        return checkpoint(layer, x, place, use_reentrant=False, **REMAT_OPTIONS[self.policy])  # type: ignore[return-value]

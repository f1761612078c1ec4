"""Other ways through the layers: computed again in the backward pass, or as one scan.

B batch, T positions, D hidden_size, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jax_llm.kv_cache import KVCache
from jax_llm.model import run_layers
from jax_llm.params import Params

REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclasses.dataclass(frozen=True)
class Layers:
    """`run_layers` for training; with a cache, that function itself.

    remat: what a layer's backward pass computes again instead of keeping it from the forward pass. "none": nothing;
    "dots": all but the matrix products; "full": everything but the layer's input. scan: one `lax.scan`, which compiles
    faster and runs slower.
    """

    remat: str = "none"
    scan: bool = False

    def __call__(
        self, apply: Callable, layers: Params, x: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        if cache is not None:
            return run_layers(apply, layers, x, cache)
        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat], static_argnums=0)
        if not self.scan:
            return run_layers(apply, layers, x, None)
        step: Any = lambda x, weights: (apply("all", weights, x, None)[0], None)
        return jax.lax.scan(step, x, layers)[0], None

"""The kernels of a model, from what a run has resolved."""

import dataclasses

from jax_llm.documents import DocumentPlaces
from jax_llm.fast.attention import attention_kernel
from jax_llm.fast.chunked_loss import ChunkedLoss
from jax_llm.fast.layers import Layers
from jax_llm.fast.products import flat_linear, fused_gate_up, fused_qkv, separated_gate_up
from jax_llm.kernels import Kernels
from jax_llm.model import PLAIN
from llm_common.config import Separator


def make_kernels(
    attention: str = "reference",
    remat: str = "none",
    scan_layers: bool = False,
    loss_chunks: int = 1,
    separator: Separator = None,
    fused_projections: bool = False,
) -> Kernels:
    """`PLAIN` with the functions that these settings ask for.

    attention: a resolved backend. separator: the id that ends a document, if none may see another.
    """
    kernels = dataclasses.replace(PLAIN, linear=flat_linear, attention=attention_kernel(attention))
    if attention == "cudnn":
        kernels = dataclasses.replace(kernels, gate_up=separated_gate_up)
    if fused_projections:
        kernels = dataclasses.replace(kernels, qkv=fused_qkv, gate_up=fused_gate_up)
    if remat != "none" or scan_layers:
        kernels = dataclasses.replace(kernels, layers=Layers(remat, scan_layers))
    if loss_chunks > 1:
        kernels = dataclasses.replace(kernels, loss=ChunkedLoss(loss_chunks))
    if separator is not None:
        kernels = dataclasses.replace(kernels, places=DocumentPlaces(separator))
    return kernels

"""The kernels of a model, from what a run has resolved."""

import dataclasses

from llm_common.config import Separator
from torch_llm.documents import DocumentPlaces
from torch_llm.fast.attention import BlockPlaces, attention_kernel
from torch_llm.fast.chunked_loss import ChunkedLoss
from torch_llm.fast.layers import Remat
from torch_llm.fast.products import lean_embedding
from torch_llm.kernels import Kernels
from torch_llm.model import PLAIN


def make_kernels(
    attention: str = "reference",
    remat: str = "none",
    loss_chunks: int = 1,
    separator: Separator = None,
    block_masks: bool = False,
) -> Kernels:
    """`PLAIN` with the functions that these settings ask for.

    attention: a resolved backend. separator: the id that ends a document, if none may see another. block_masks: whether
    a compiled program takes its masks in blocks.
    """
    kernels = dataclasses.replace(PLAIN, embedding=lean_embedding, attention=attention_kernel(attention))
    if remat != "none":
        kernels = dataclasses.replace(kernels, layer=Remat(remat))
    if loss_chunks > 1:
        kernels = dataclasses.replace(kernels, loss=ChunkedLoss(loss_chunks))
    if separator is not None:
        kernels = dataclasses.replace(kernels, places=DocumentPlaces(separator))
    if block_masks:
        kernels = dataclasses.replace(kernels, places=BlockPlaces(kernels.places))
    return kernels

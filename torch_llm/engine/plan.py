"""What a run uses on a device: decided once, from the config and the device, and handed to the model as its kernels.

here                                         jax_llm.engine.plan
torch.compile is worth its time on a GPU     JAX compiles every run
"""

import torch

from llm_common.config import Recipe
from llm_common.cudnn import why_not_cudnn
from llm_common.run.plan import Plan
from torch_llm.engine.device import device_kind, select_device
from torch_llm.fast.attention import resolve_backend, takes_blocks
from torch_llm.fast.kernels import make_kernels
from torch_llm.kernels import Kernels


def make_plan(recipe: Recipe, device: torch.device) -> Plan[Kernels]:
    """The plan of a run on a device."""
    cfg, train, execution = recipe.model, recipe.train, recipe.execution
    platform = "gpu" if device.type == "cuda" else device.type
    backend = resolve_backend(execution.attention_backend, train.compute_dtype)
    compiled = execution.compile == "on" or (execution.compile == "auto" and platform == "gpu")
    blocks = takes_blocks(backend, device.type, getattr(torch, train.compute_dtype), cfg.head_dim)
    masked = train.document_separator is not None or (cfg.sliding_window or train.seq_len) < train.seq_len
    refused = why_not_cudnn(cfg, train.compute_dtype, train.seq_len)
    note = f"not cuDNN's: {refused}" if platform == "gpu" and backend == "sdpa" and refused else ""
    return Plan(
        device_kind=device_kind(str(device)),
        platform=platform,
        dtype=train.compute_dtype,
        attention=backend,
        attention_note="on one GPU FlexAttention, for its mask" if masked and compiled and blocks else note,
        keeps_scores=backend == "reference",
        compiler="torch.compile" if compiled else "",
        layers="",
        remat=execution.remat,
        document_mask=train.document_separator is not None,
        deterministic=execution.deterministic,
        kernels=make_kernels(backend, execution.remat, execution.loss_chunks, train.document_separator, blocks),
    )


def plan_run(recipe: Recipe, device: str) -> Plan[Kernels]:
    """The plan of a run on a device by name. Raises UserError if the device is absent."""
    return make_plan(recipe, select_device(device))


def decoding_kernels(compute_dtype: str) -> Kernels:
    """The kernels that texts are generated with."""
    return make_kernels(resolve_backend("auto", compute_dtype))

"""What a run uses on a device: decided once, from the config and the device, and handed to the model as its kernels.

here                                   torch_llm.engine.plan
JAX compiles every run                 torch.compile is worth its time on a GPU
"""

from jax_llm.engine.device import select_device
from jax_llm.fast.attention import resolve_backend
from jax_llm.fast.kernels import make_kernels
from jax_llm.kernels import Kernels
from jax_llm.model import CausalLM
from llm_common.config import ModelConfig, Recipe
from llm_common.cudnn import why_not_cudnn
from llm_common.run.plan import Plan


def make_plan(recipe: Recipe, platform: str, device_kind: str = "") -> Plan[Kernels]:
    """The plan of a run on a platform ("cpu", "gpu" or "tpu"). Asks no device, so it serves compilation for another
    machine.
    """
    cfg, train, execution = recipe.model, recipe.train, recipe.execution
    backend = resolve_backend(execution.attention_backend, platform, train.compute_dtype, cfg, train.seq_len)
    refused = why_not_cudnn(cfg, train.compute_dtype, train.seq_len)
    if execution.deterministic:
        # XLA does not compile cuDNN's attention together with xla_gpu_deterministic_ops (jax 0.11)
        backend, refused = "xla" if backend == "cudnn" else backend, "run is deterministic"
    return Plan(
        device_kind=device_kind or platform,
        platform=platform,
        dtype=train.compute_dtype,
        attention=backend,
        attention_note=f"not cuDNN's: {refused}" if platform == "gpu" and backend == "xla" else "",
        keeps_scores=backend in ("reference", "xla"),
        compiler="" if execution.compile == "off" else "jit",
        layers="scanned" if execution.scan_layers else "unrolled",
        remat=execution.remat,
        document_mask=train.document_separator is not None,
        deterministic=execution.deterministic,
        kernels=make_kernels(
            backend, execution.remat, execution.scan_layers, execution.loss_chunks, train.document_separator
        ),
    )


def plan_run(recipe: Recipe, device: str) -> Plan[Kernels]:
    """The plan of a run on a device by name. Raises UserError if the device is absent."""
    target = select_device(device)
    return make_plan(recipe, target.platform, target.device_kind)


def make_model(recipe: Recipe, platform: str) -> CausalLM:
    """The model that a run uses on a platform."""
    return CausalLM(recipe.model, make_plan(recipe, platform).kernels)


def decoding_kernels(cfg: ModelConfig, compute_dtype: str, platform: str) -> Kernels:
    """The kernels that texts are generated with on one device: their projections are fused."""
    backend = resolve_backend("auto", platform, compute_dtype, cfg, seq_len=0)
    return make_kernels(backend, fused_projections=True)


def mesh_decoding_kernels(cfg: ModelConfig, compute_dtype: str, platform: str) -> Kernels:
    """The same on a mesh, where the parts of a fused projection would have to be cut one by one."""
    return make_kernels(resolve_backend("auto", platform, compute_dtype, cfg, seq_len=1))

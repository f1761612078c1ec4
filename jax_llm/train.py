"""Training as a pure function: state and batch in, state and metrics out.

    here                               torch_llm.train
    TrainState, a value                Trainer, an object that owns model, optimizer and counters
    init_state(...)                    Trainer(...)
    make_train_step(...) -> function   Trainer.train_step
    state = fit(state, ...)            trainer.fit(...)

B batch, T positions.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jax_llm.fast.attention import resolve_backend
from jax_llm.fast.kernels import make_kernels
from jax_llm.fast.layers import Layers
from jax_llm.layers import upcast
from jax_llm.loss import IGNORE_INDEX, cross_entropy
from jax_llm.model import CausalLM, init_params, run_layers
from jax_llm.optim import global_norm, make_optimizer
from jax_llm.params import Params, get_canonical, restack, unstack
from llm_common.budget import host_memory, host_memory_used
from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig, check_length
from llm_common.cudnn import why_not_cudnn
from llm_common.data import Dataset, Prefetch
from llm_common.errors import UserError
from llm_common.metrics import StepMetrics
from llm_common.schedule import StepScalars, step_scalars
from llm_common.tensors import check_batch, tensor_shapes


class TrainState(NamedTuple):
    """All that a step changes. `params` are the masters; the counters are int32 scalars."""

    params: Params
    opt_state: Any
    step: Array  # steps made
    adam_count: Array  # updates made: a step with a non-finite gradient norm makes none


class Metrics(NamedTuple):
    loss: Array
    grad_norm: Array  # before clipping
    skipped: Array  # bool: the update was skipped


def cast(params: Params, dtype) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def loss_and_grads(
    model: CausalLM,
    params: Params,
    inputs: Array,
    targets: Array,
    accumulation_steps: int = 1,
) -> tuple[Array, Params]:
    """Mean loss of a batch and its gradient, in the dtype of `params`. inputs, targets: (B, T).

    The layers are sliced before differentiating and the gradients stacked after: the gradient of a slice would be a
    whole stack of zeros with one slice filled, once for every layer. With accumulation the batch is cut into
    `accumulation_steps` micro-batches, one after the other; the gradients are added up in float32, and the mean is over all
    counted tokens of the batch.
    """
    count = (targets != IGNORE_INDEX).sum()
    scanned = isinstance(model.kernels.layers, Layers) and model.kernels.layers.scan
    sliced = params if scanned else unstack(params)
    loss_and_grad = jax.value_and_grad(lambda params, *batch: model.kernels.loss(model, params, *batch, count))
    if accumulation_steps == 1:
        loss, grads = loss_and_grad(sliced, inputs, targets)
        return loss, grads if scanned else restack(grads)

    def add(total: tuple[Array, Params], micro_batch: tuple[Array, Array]):
        return jax.tree.map(lambda a, x: a + x.astype(a.dtype), total, loss_and_grad(sliced, *micro_batch)), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, upcast(p[:0]).dtype), sliced)
    zero_loss = jnp.zeros((), upcast(params["model"]["norm"]["weight"]).dtype)
    cut = lambda x: x.reshape(accumulation_steps, -1, x.shape[1])  # (A, B / A, T)
    (loss, grads), _ = jax.lax.scan(add, (zero_loss, zero), (cut(inputs), cut(targets)))
    return loss, grads if scanned else restack(grads)


def matmul_precision(compute_dtype: str):
    """float32 means float32: an accelerator's default would be TF32 or bfloat16. To be entered while tracing."""
    return jax.default_matmul_precision("highest") if compute_dtype == "float32" else contextlib.nullcontext()


def x64(master_dtype: str):
    """A context in which arrays of the master dtype can exist: JAX has float64 only where it is switched on."""
    return jax.enable_x64(True) if master_dtype == "float64" else contextlib.nullcontext()


def platform_devices(name: str) -> list[Any]:
    """All devices of a platform ("cpu", "gpu" or "tpu"), of every host, or those of the default one for "auto"."""
    try:
        return jax.devices(None if name == "auto" else name)
    except RuntimeError:
        found = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise UserError(
            f"JAX sees no {name} here, only: {found}; use one of these or install jax[cuda13] / jax[tpu]"
        ) from None


def select_device(name: str) -> Any:
    """This host's first device of a platform (by name)."""
    return next(d for d in platform_devices(name) if d.process_index == jax.process_index())


def describe(cfg: ModelConfig, train: TrainConfig, device: str) -> str:
    """What a run on a device (by name) will use, in a line for people. Raises UserError if the device is absent."""
    target = select_device(device)
    backend = attention_backend(cfg, train, target.platform)
    refused = why_not_cudnn(cfg, train.compute_dtype, train.seq_len)
    refused = "run is deterministic" if train.deterministic else refused
    instead = f" (not cuDNN's: {refused})" if target.platform == "gpu" and backend == "xla" else ""
    layers = "scanned" if train.scan_layers else "unrolled"
    jit = "not compiled" if train.compile == "off" else f"jit, layers {layers}"
    apart = ", documents apart" if train.document_separator is not None else ""
    more = apart + (", deterministic" if train.deterministic else "")
    return (
        f"{target.device_kind}, {train.compute_dtype}, {backend} attention{instead}, {jit}, remat {train.remat}{more}"
    )


def memory_limit(device: str) -> int | None:
    """How many bytes an array may take on a device (by name) now, or None if it does not say."""
    stats = select_device(device).memory_stats() or {}
    return stats.get("bytes_limit") if stats else host_memory()


def memory_used(device: str) -> int:
    """The most bytes that were in use on a device (by name)."""
    return (select_device(device).memory_stats() or {}).get("peak_bytes_in_use") or host_memory_used()


def device_kind(device: str) -> str:
    """What a device (by name) calls itself."""
    return select_device(device).device_kind


def make_train_step(
    model: CausalLM,
    optimizer: optax.GradientTransformation,
    compute_dtype: str,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Array, Array, StepScalars], tuple[TrainState, Metrics]]:
    """The function of one step: gradients, global norm, clip, AdamW. Pure, to be jitted with its state donated.

    `optimizer` may be any optax transformation; one that takes `scalars`, as ours does, is given them.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(
        state: TrainState, inputs: Array, targets: Array, scalars: StepScalars
    ) -> tuple[TrainState, Metrics]:
        with matmul_precision(compute_dtype):
            params = cast(state.params, compute_dtype)
            loss, grads = loss_and_grads(model, params, inputs, targets, accumulation_steps)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        norm = global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, scalars=scalars)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        new_state = TrainState(params, opt_state, state.step + 1, state.adam_count + finite)
        return new_state, Metrics(loss, norm, ~finite)

    return train_step


def one_step_behind(train_step: Callable) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step as `fit` calls it, before it knows whether the step before made an update.

    either: the scalars for both cases. known_count: the updates made until the step before.
    """

    def step(
        state: TrainState, inputs: Array, targets: Array, either: tuple[StepScalars, StepScalars], known_count: Array
    ):
        updated = state.adam_count > known_count
        return train_step(state, inputs, targets, jax.tree.map(lambda no, yes: jnp.where(updated, yes, no), *either))

    return step


def init_state(cfg: ModelConfig, train: TrainConfig, opt: OptimizerConfig, params: Params = None) -> TrainState:
    """The state before the first step, from `train.seed` alone, or from given weights."""
    dtype = jnp.dtype(train.master_dtype)
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise UserError("compute_dtype = 'float64' needs JAX_ENABLE_X64=1, or `with jax_llm.train.x64('float64'):`")
    params = jax.jit(lambda: init_params(cfg, train.seed, dtype))() if params is None else params
    optimizer = make_optimizer(opt, cfg)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def attention_backend(cfg: ModelConfig, train: TrainConfig, platform: str) -> str:
    """The attention that a run uses on a platform."""
    backend = resolve_backend(train.attention_backend, platform, train.compute_dtype, cfg, train.seq_len)
    if backend == "cudnn" and train.deterministic:
        return "xla"  # XLA does not compile cuDNN's attention together with xla_gpu_deterministic_ops (jax 0.11)
    return backend


def make_model(cfg: ModelConfig, train: TrainConfig, platform: str) -> CausalLM:
    """The model that a run uses on a platform, with the kernels of its settings."""
    backend = attention_backend(cfg, train, platform)
    return CausalLM(
        cfg, make_kernels(backend, train.remat, train.scan_layers, train.loss_chunks, train.document_separator)
    )


@functools.lru_cache(maxsize=8)
def compiled_train_step(cfg: ModelConfig, train: TrainConfig, opt: OptimizerConfig, platform: str):
    """The jitted step of a run, its state donated; the same settings give the same function, compiled once."""
    model, steps = make_model(cfg, train, platform), train.gradient_accumulation_steps
    step = make_train_step(model, make_optimizer(opt, cfg), train.compute_dtype, steps)
    step = one_step_behind(step)
    if train.compile == "off":
        return step
    options = {"xla_gpu_deterministic_ops": True} if train.deterministic and platform == "gpu" else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def read_batch(dataset: Dataset, step: int, cfg: ModelConfig) -> tuple[Array, Array]:
    """Inputs and targets of a step, each (B, T), on the default device. Raises UserError for an id outside the vocabulary."""
    batch = dataset.batch(step)
    check_batch(*batch, cfg.vocab_size, f"step {step}")
    inputs, targets = (jnp.array(np.ascontiguousarray(x)) for x in batch)
    return inputs, targets


def fit(
    state: TrainState,
    cfg: ModelConfig,
    train: TrainConfig,
    opt: OptimizerConfig,
    dataset: Dataset,
    until_step: int | None = None,
    on_step: Callable[[int, TrainState, StepMetrics], bool | None] | None = None,
    train_step: Callable | None = None,
    read_batch: Callable[..., tuple[Array, Array]] = read_batch,
) -> TrainState:
    """Train from `state.step` to `until_step` (default: opt.total_steps) and return the new state.

    The state that comes in is donated: do not use it afterwards. `on_step(step, state, metrics)` is called after each step is
    begun; if it returns True, training ends there. A step is waited for only when its metrics are read, and at the latest when
    the next one has been begun, so that the device always has work. Raises UserError if too many updates in a row were skipped,
    naming the tensor that is the first to be not finite. train_step, read_batch: those for many devices, of
    `jax_llm.distributed`.
    """
    check_length(cfg, train.seq_len, "seq_len")
    (platform,) = {d.platform for d in state.step.devices()}
    train_step = train_step or compiled_train_step(cfg, train, opt, platform)
    step, known_count, skipped_in_row = int(state.step), int(state.adam_count), 0
    dataset = Prefetch(dataset)
    before: tuple[int, StepMetrics, Array, Array] | None = None  # the step before, which is not waited for

    def look_back() -> int:
        """Wait for the step before; returns the number of updates made until then."""
        nonlocal skipped_in_row
        if before is None:
            return known_count
        number, metrics, *batch = before
        skipped_in_row = skipped_in_row + 1 if metrics["skipped"] else 0
        if skipped_in_row >= train.max_skipped_steps:
            params = cast(state.params, train.compute_dtype)
            raise UserError(
                f"the gradient norm was not finite in {skipped_in_row} steps in a row (to step {number}): "
                f"{first_not_finite(make_model(cfg, train, platform), params, *batch)}; "
                "lower lr_max, lengthen warmup_steps, or look for bad tokens in the data"
            )
        return known_count + (not metrics["skipped"])

    while step < (opt.total_steps if until_step is None else until_step):
        inputs, targets = read_batch(dataset, step, cfg)
        either = tuple(step_scalars(opt, step, known_count + updated) for updated in (0, 1))
        state, metrics = train_step(state, inputs, targets, either, known_count)
        known_count, step = look_back(), step + 1
        before = step, StepMetrics(functools.partial(read_metrics, metrics, either[0].lr)), inputs, targets
        if on_step is not None and on_step(step, state, before[1]):
            break
    look_back()
    return state


def read_metrics(metrics: Metrics, lr: float) -> tuple[float, float, float, bool]:
    """The numbers of `StepMetrics`. Waits for the step."""
    return float(metrics.loss), float(metrics.grad_norm), lr, bool(metrics.skipped)


def first_not_finite(model: CausalLM, params: Params, inputs: Array, targets: Array) -> str:
    """Which tensor is the first that is not finite: a weight, else a module's output in the order in which they are computed,
    else the loss, else a gradient in the order of the backward pass. For people; runs the model once more, uncompiled.
    """
    names = list(tensor_shapes(model.cfg))
    for name in names:
        if not finite(get_canonical(params, name)):
            return f"the weight {name} is the first tensor that is not finite"
    logits, found = watch_outputs(model, params, inputs)
    if found:
        return f"{found}; all weights are finite"
    if not finite(cross_entropy(logits, targets)):
        return "the loss is the first tensor that is not finite; all logits are finite"
    _, grads = loss_and_grads(model, params, inputs, targets)
    for name in reversed(names):
        if not finite(get_canonical(grads, name)):
            return f"the gradient of {name} is the first tensor that is not finite; the loss is finite"
    return "weights, activations, loss and gradients are finite now: the norm overflowed"


def finite(x: Array) -> bool:
    return bool(jnp.isfinite(x).all())


def watch_outputs(model: CausalLM, params: Params, inputs: Array) -> tuple[Array, str]:
    """The logits of inputs (B, T), and which module's output is the first that is not finite, for people ("": none)."""
    found: list[str] = []
    path: list[str] = []

    def look(next_fun, args, kwargs, context):
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        path.append((context.module.name or "").replace("layers_", "layers."))
        out = next_fun(*args, **kwargs)
        tensor = out[0] if isinstance(out, tuple) else out
        if not finite(tensor) and not found:
            found.append(".".join(part for part in path if part) or "the model")
        path.pop()
        return out

    with nn.intercept_methods(look):
        one_by_one = dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, layers=run_layers))
        logits, _ = one_by_one.apply({"params": params}, inputs)
    return logits, f"the output of {found[0]} is the first tensor that is not finite" if found else ""

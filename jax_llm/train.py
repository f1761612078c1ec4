"""Training as a pure function: state and batch in, state and metrics out.

    here                               torch_llm.train
    TrainState, a value                Trainer, an object that owns model, optimizer and counters
    init_state(...)                    Trainer(...)
    make_train_step(...) -> function   Trainer.train_step
    state = fit(state, ...)            trainer.fit(...)

B batch, T positions.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jax_llm.attention import resolve_backend
from jax_llm.loss import cross_entropy
from jax_llm.model import CausalLM, Params, init_params, slice_layers, stack_layers
from jax_llm.optim import global_norm, make_optimizer
from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig, check_length
from llm_common.data import TokenDataset
from llm_common.errors import UserError
from llm_common.schedule import StepScalars, step_scalars
from llm_common.tensors import check_batch


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


def unstack(params: Params, num_layers: int) -> Params:
    """The parameter tree with `layers` as a tuple of L trees."""
    model = params["model"]
    return {**params, "model": {**model, "layers": slice_layers(model["layers"], num_layers)}}


def restack(params: Params) -> Params:
    """The inverse of `unstack`."""
    model = params["model"]
    return {**params, "model": {**model, "layers": stack_layers(model["layers"])}}


def loss_and_grads(model: CausalLM, params: Params, inputs: Array, targets: Array) -> tuple[Array, Params]:
    """Mean loss of a batch and its gradient, in the dtype of `params`. inputs, targets: (B, T).

    The layers are sliced before differentiating and the gradients stacked after: the gradient of a slice would be a
    whole stack of zeros with one slice filled, once for every layer.
    """

    def loss_fn(params: Params) -> Array:
        logits, _ = model.apply({"params": params}, inputs)  # (B, T, V)
        return cross_entropy(logits, targets)

    if model.scan_layers:
        return jax.value_and_grad(loss_fn)(params)
    loss, grads = jax.value_and_grad(loss_fn)(unstack(params, model.cfg.num_hidden_layers))
    return loss, restack(grads)


def matmul_precision(compute_dtype: str):
    """float32 means float32: an accelerator's default would be TF32 or bfloat16. To be entered while tracing."""
    return jax.default_matmul_precision("highest") if compute_dtype == "float32" else contextlib.nullcontext()


def x64(master_dtype: str):
    """A context in which arrays of the master dtype can exist: JAX has float64 only where it is switched on."""
    return jax.enable_x64(True) if master_dtype == "float64" else contextlib.nullcontext()


def select_device(name: str):
    """The first device of a platform ("cpu", "gpu" or "tpu"), or the default one for "auto"."""
    try:
        return jax.devices(None if name == "auto" else name)[0]
    except RuntimeError:
        found = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise UserError(
            f"JAX sees no {name} here, only: {found}; use one of these or install jax[cuda13] / jax[tpu]"
        ) from None


def describe(cfg: ModelConfig, train: TrainConfig, device: str) -> str:
    """What a run on a device (by name) will use, in a line for people. Raises UserError if the device is absent."""
    target = select_device(device)
    backend = make_model(cfg, train, target.platform).backend
    return f"{target.device_kind}, {train.compute_dtype}, {backend} attention"


def make_train_step(
    model: CausalLM, optimizer: optax.GradientTransformation, compute_dtype: str
) -> Callable[[TrainState, Array, Array, StepScalars], tuple[TrainState, Metrics]]:
    """The function of one step: gradients, global norm, clip, AdamW. Pure, to be jitted with its state donated.

    `optimizer` may be any optax transformation; one that takes `scalars`, as ours does, is given them.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(
        state: TrainState, inputs: Array, targets: Array, scalars: StepScalars
    ) -> tuple[TrainState, Metrics]:
        with matmul_precision(compute_dtype):
            loss, grads = loss_and_grads(model, cast(state.params, compute_dtype), inputs, targets)
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


def init_state(cfg: ModelConfig, train: TrainConfig, opt: OptimizerConfig) -> TrainState:
    """The state before the first step, from `train.seed` alone."""
    dtype = jnp.dtype(train.master_dtype)
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise UserError("compute_dtype = 'float64' needs JAX_ENABLE_X64=1, or `with jax_llm.train.x64('float64'):`")
    params = jax.jit(lambda: init_params(cfg, train.seed, dtype))()
    optimizer = make_optimizer(opt, cfg)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def make_model(cfg: ModelConfig, train: TrainConfig, platform: str) -> CausalLM:
    """The model that a run uses on a platform, its attention backend resolved."""
    return CausalLM(
        cfg, backend=resolve_backend(train.attention_backend, platform, train.compute_dtype, cfg, train.seq_len)
    )


@functools.lru_cache(maxsize=8)
def compiled_train_step(cfg: ModelConfig, train: TrainConfig, opt: OptimizerConfig, platform: str):
    """The jitted step of a run, its state donated; the same settings give the same function, compiled once."""
    optimizer = make_optimizer(opt, cfg)
    step = make_train_step(make_model(cfg, train, platform), optimizer, train.compute_dtype)
    return jax.jit(step, donate_argnums=0)


def fit(
    state: TrainState,
    cfg: ModelConfig,
    train: TrainConfig,
    opt: OptimizerConfig,
    dataset: TokenDataset,
    until_step: int | None = None,
    on_step: Callable[[int, TrainState, dict[str, float]], None] | None = None,
) -> TrainState:
    """Train from `state.step` to `until_step` (default: opt.total_steps) and return the new state.

    The state that comes in is donated: do not use it afterwards. `on_step(step, state, metrics)` is called after each
    step with loss, grad_norm, lr and skipped. Raises UserError if too many updates in a row were skipped.
    """
    check_length(cfg, train.seq_len, "seq_len")
    (platform,) = {d.platform for d in state.step.devices()}
    train_step = compiled_train_step(cfg, train, opt, platform)
    step, adam_count, skipped_in_row = int(state.step), int(state.adam_count), 0
    while step < (opt.total_steps if until_step is None else until_step):
        batch = dataset.batch(step)
        check_batch(*batch, cfg.vocab_size, f"step {step}")
        inputs, targets = (jnp.array(np.ascontiguousarray(x)) for x in batch)
        scalars = step_scalars(opt, step, adam_count)
        state, metrics = train_step(state, inputs, targets, scalars)
        step, adam_count = step + 1, int(state.adam_count)
        skipped_in_row = skipped_in_row + 1 if metrics.skipped else 0
        if on_step is not None:
            numbers = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), "lr": scalars.lr}
            on_step(step, state, numbers | {"skipped": bool(metrics.skipped)})
        if skipped_in_row >= train.max_skipped_steps:
            raise UserError(
                f"the gradient norm was not finite in {skipped_in_row} steps in a row (to step {step}); "
                "lower lr_max, lengthen warmup_steps, or look for bad tokens in the data"
            )
    return state

"""Training as a pure function: state and batch in, state and metrics out.

    here                               torch_llm.engine.train
    TrainState, a value                Trainer, an object that owns model, optimizer and counters
    init_state(...)                    Trainer(...)
    make_train_step(...) -> function   Trainer.train_step
    state = fit(state, ...)            trainer.fit(...)

B batch, T positions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jax_llm.engine.device import matmul_precision
from jax_llm.engine.diagnose import first_not_finite
from jax_llm.engine.gradients import cast, loss_and_grads
from jax_llm.engine.plan import make_model
from jax_llm.model import CausalLM, init_params
from jax_llm.optim import global_norm, make_optimizer
from jax_llm.params import Params
from llm_common.config import ExecutionConfig, ModelConfig, Recipe
from llm_common.data.datasets import Dataset, Prefetch
from llm_common.errors import UserError
from llm_common.run.metrics import StepMetrics
from llm_common.run.previous_step import PreviousStep
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


def with_deferred_count(train_step: Callable) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step as `fit` calls it, before it knows whether the step before made an update.

    either: the scalars for both cases. known_count: the updates made until the step before.
    """

    def step(
        state: TrainState, inputs: Array, targets: Array, either: tuple[StepScalars, StepScalars], known_count: Array
    ):
        updated = state.adam_count > known_count
        return train_step(state, inputs, targets, jax.tree.map(lambda no, yes: jnp.where(updated, yes, no), *either))

    return step


def init_state(recipe: Recipe, params: Params = None) -> TrainState:
    """The state before the first step, from `train.seed` alone, or from given weights."""
    cfg, train = recipe.model, recipe.train
    dtype = jnp.dtype(train.master_dtype)
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise UserError(
            "compute_dtype = 'float64' needs JAX_ENABLE_X64=1, or `with jax_llm.engine.device.x64('float64'):`"
        )
    params = jax.jit(lambda: init_params(cfg, train.seed, dtype))() if params is None else params
    optimizer = make_optimizer(recipe.optimizer, cfg)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


@functools.lru_cache(maxsize=8)
def compiled_train_step(recipe: Recipe, platform: str):
    """The jitted step of a run, its state donated; the same settings give the same function, compiled once."""
    model, steps = make_model(recipe, platform), recipe.execution.gradient_accumulation_steps
    optimizer = make_optimizer(recipe.optimizer, recipe.model)
    step = with_deferred_count(make_train_step(model, optimizer, recipe.train.compute_dtype, steps))
    if recipe.execution.compile == "off":
        return step
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(recipe.execution, platform))


def compiler_options(execution: ExecutionConfig, platform: str) -> dict[str, Any] | None:
    """What XLA is told beside the program; "gpu" is JAX's name of that platform."""
    return {"xla_gpu_deterministic_ops": True} if execution.deterministic and platform == "gpu" else None


def read_batch(dataset: Dataset, step: int, cfg: ModelConfig) -> tuple[Array, Array]:
    """Inputs and targets of a step, each (B, T), on the default device. Raises UserError for an id outside the
    vocabulary.
    """
    batch = dataset.batch(step)
    check_batch(*batch, cfg.vocab_size, f"step {step}")
    inputs, targets = (jnp.array(np.ascontiguousarray(x)) for x in batch)
    return inputs, targets


def fit(
    state: TrainState,
    recipe: Recipe,
    dataset: Dataset,
    until_step: int | None = None,
    on_step: Callable[[int, TrainState, StepMetrics], bool | None] | None = None,
    train_step: Callable | None = None,
    read_batch: Callable[..., tuple[Array, Array]] = read_batch,
) -> TrainState:
    """Train from `state.step` to `until_step` (default: the optimizer's total_steps) and return the new state.

    The state that comes in is donated: do not use it afterwards. `on_step(step, state, metrics)` is called after each
    step is begun; if it returns True, training ends there. A step is waited for only when its metrics are read, and at
    the latest when the next one has been begun, so that the device always has work. Raises UserError if too many
    updates in a row were skipped, naming the tensor that is the first to be not finite. train_step, read_batch: those
    for many devices, of `jax_llm.engine.distributed`.
    """
    train, opt = recipe.train, recipe.optimizer
    (platform,) = {d.platform for d in state.step.devices()}
    train_step = train_step or compiled_train_step(recipe, platform)
    step, previous = int(state.step), PreviousStep(int(state.adam_count), train.max_skipped_steps)
    dataset = Prefetch(dataset)

    def explain(inputs: Array, targets: Array) -> str:
        params = cast(state.params, train.compute_dtype)
        return first_not_finite(make_model(recipe, platform), params, inputs, targets)

    while step < (opt.total_steps if until_step is None else until_step):
        inputs, targets = read_batch(dataset, step, recipe.model)
        either = tuple(step_scalars(opt, step, previous.count + updated) for updated in (0, 1))
        state, metrics = train_step(state, inputs, targets, either, previous.count)
        previous.resolve(explain)
        step, metrics = step + 1, StepMetrics(functools.partial(read_metrics, metrics, either[0].lr))
        previous.begin(step, metrics, inputs, targets)
        if on_step is not None and on_step(step, state, metrics):
            break
    previous.resolve(explain)
    return state


def read_metrics(metrics: Metrics, lr: float) -> tuple[float, float, float, bool]:
    """The numbers of `StepMetrics`. Waits for the step."""
    return float(metrics.loss), float(metrics.grad_norm), lr, bool(metrics.skipped)

"""Training and decoding on many devices, in JAX: arrays know where they lie, and the compiler puts in the
communication.

    here                                       torch_llm.engine.distributed
    arrays with a NamedSharding                parameters as DTensors
    the same `train_step`, compiled for a      a Trainer whose model is cut by
    mesh: the compiler adds collectives        FSDP2 and tensor-parallel hooks
    one process for the devices of a host      one process for each device

B batch, T positions, D hidden_size, V vocab_size.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_llm.engine import train as single
from jax_llm.engine.checkpoint import to_host
from jax_llm.engine.device import matmul_precision, platform_devices, x64
from jax_llm.engine.evaluate import evaluate as single_evaluate
from jax_llm.engine.generate import generate_stream
from jax_llm.engine.plan import make_model, mesh_decoding_kernels
from jax_llm.engine.train import TrainState, make_train_step
from jax_llm.fast.attention import SplashAttention, needs_mesh
from jax_llm.layers import Embedding
from jax_llm.model import CausalLM, DecoderLayer, init_params
from jax_llm.optim import make_optimizer
from jax_llm.params import Leaf, Params, get_canonical, param_leaves, unstack
from llm_common.config import ModelConfig, OptimizerConfig, Recipe, TrainConfig
from llm_common.data.datasets import Dataset
from llm_common.data.evaluation import EvaluateLoss, Evaluation
from llm_common.run.checkpoint import TrainingState
from llm_common.run.metrics import StepMetrics
from llm_common.sharding import AXES, BATCH_AXES, MeshConfig, check_devices, check_mesh, check_sharded, weight_axes
from llm_common.tensors import ReadOnDemand, Tensors, check_batch, check_tensors, tensor_shapes

BATCH = PartitionSpec(BATCH_AXES)  # rows of a batch; the axes after it are whole
# On GPUs: communication is begun early and waited for late, in pieces of many tensors. docs/performance.md has what it
# gains.
GPU_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**28,
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**28,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**28,
}


def make_mesh(config: MeshConfig, device: str = "auto") -> Mesh:
    """The mesh of all devices of a platform (by name). Raises UserError unless it takes exactly those."""
    devices = platform_devices(device)
    hint = "a CPU shows more with XLA_FLAGS=--xla_force_host_platform_device_count=8"
    check_devices(config, len(devices), f"{devices[0].platform} device", hint)
    return mesh_of(config, devices)


def mesh_of(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """The mesh of these devices, which may be ones to compile for that are not there."""
    return Mesh(np.array(devices).reshape(config.shape), AXES, axis_types=(AxisType.Auto,) * 3)


def param_shardings(cfg: ModelConfig, mesh: Mesh) -> Params:
    """How every leaf of the parameter tree is cut; the axis of stacked layers is not."""

    def sharding(leaf: Leaf) -> NamedSharding:
        own = [axes if len(axes) > 1 else next(iter(axes)) for axes in weight_axes(leaf.names[0])]
        return NamedSharding(mesh, PartitionSpec(*([None] if leaf.stacked else []), *own))

    return jax.tree.map(sharding, param_leaves(cfg))


def state_shardings(cfg: ModelConfig, opt: OptimizerConfig, mesh: Mesh, dtype=jnp.float32) -> TrainState:
    """How a training state is cut: the moments as their weights, the counters not at all."""
    params, whole = param_shardings(cfg, mesh), NamedSharding(mesh, PartitionSpec())
    optimizer = make_optimizer(opt, cfg)
    shapes = jax.eval_shape(lambda: optimizer.init(init_params(cfg, 0, dtype)))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, shapes, params, transform_non_params=lambda _: whole
    )
    return TrainState(params, opt_state, whole, whole)  # pyright: ignore[reportArgumentType]


def init_state(recipe: Recipe, mesh: Mesh, params: Params = None) -> TrainState:
    """The state before the first step, from `train.seed` alone or from weights that are cut over the mesh.

    Every device makes its own part; nothing is whole anywhere.
    """
    shardings = state_shardings(recipe.model, recipe.optimizer, mesh, jnp.dtype(recipe.train.master_dtype))
    init = functools.partial(single.init_state, recipe)
    if params is None:
        return jax.jit(init, out_shardings=shardings)()
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def from_canonical(cfg: ModelConfig, weights: Tensors, mesh: Mesh, dtype=None) -> Params:
    """The parameter tree of canonical weights; of a tensor in a file each device reads its own part alone."""
    check_tensors(cfg, weights, "weights")
    shapes = tensor_shapes(cfg)

    def array(leaf: Leaf, sharding: NamedSharding) -> Array:
        shape = shapes[leaf.names[0]]

        def read(index: Any) -> np.ndarray:
            if not leaf.stacked:
                return np.array(weights[leaf.names[0]][index], dtype)
            return np.stack([np.array(weights[name][index[1:]], dtype) for name in leaf.names[index[0]]])

        return jax.make_array_from_callback((len(leaf.names), *shape) if leaf.stacked else shape, sharding, read)

    return jax.tree.map(array, param_leaves(cfg), param_shardings(cfg, mesh))


def constrain(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """While a model is traced inside this, the hidden states between its layers are cut by rows of the batch and
    nothing else.

    Without it the compiler would have to guess at the embedding, whose table and ids both have a cut to hand on: the
    table is made whole along D before the look-up, which moves less than the looked-up vectors would.
    """
    pin = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def constrain_output(next_fun: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, Embedding | DecoderLayer):
            return next_fun(*args, **kwargs)
        if isinstance(module, Embedding):
            (input_ids,) = args
            return pin(module.kernels.embedding(input_ids, pin(module.weight, "tensor")), BATCH_AXES)
        x, cache = next_fun(*args, **kwargs)
        return pin(x, BATCH_AXES), cache

    return nn.intercept_methods(constrain_output)


@functools.lru_cache(maxsize=8)
def mesh_model(recipe: Recipe, mesh: Mesh) -> CausalLM:
    """The model that a run uses on a mesh."""
    model = make_model(recipe, mesh.devices.flat[0].platform)
    if model.kernels.attention is not needs_mesh:
        return model
    splash = SplashAttention(mesh, PartitionSpec(BATCH_AXES, None, "tensor"))
    return dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, attention=splash))


def sharded(function: Callable, mesh: Mesh) -> Callable:
    """A function of the model that, wherever it is traced, keeps the hidden states cut by rows."""

    @functools.wraps(function)
    def constrained(*args: Any, **kwargs: Any) -> Any:
        with constrain(mesh):
            return function(*args, **kwargs)

    return constrained


@functools.lru_cache(maxsize=8)
def compiled_train_step(recipe: Recipe, mesh: Mesh):
    """The train step of `jax_llm.engine.train` compiled for a mesh, its state donated and cut in the same way when it
    comes out.
    """
    model, steps = mesh_model(recipe, mesh), recipe.execution.gradient_accumulation_steps
    optimizer = make_optimizer(recipe.optimizer, recipe.model)
    step = single.with_deferred_count(make_train_step(model, optimizer, recipe.train.compute_dtype, steps))
    state = state_shardings(recipe.model, recipe.optimizer, mesh, jnp.dtype(recipe.train.master_dtype))
    rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        sharded(step, mesh),
        donate_argnums=0,
        in_shardings=(state, rows, rows, whole, whole),
        out_shardings=(state, whole),
        compiler_options=GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None,
    )


def put(x: np.ndarray, *, mesh: Mesh, spec: PartitionSpec = BATCH) -> Array:
    """An array that every host has whole, cut over a mesh: by rows, or as `spec` says."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def read_batch(dataset: Dataset, step: int, cfg: ModelConfig, *, train: TrainConfig, mesh: Mesh) -> tuple[Array, Array]:
    """Inputs and targets of a step, each (B, T), cut by rows. A host reads only the rows that its own devices keep."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    @functools.cache
    def shard(i: int) -> tuple[np.ndarray, np.ndarray]:
        batch = dataset.batch(step, i, shards)
        check_batch(*batch, cfg.vocab_size, f"step {step}")
        return batch

    def array(which: int) -> Array:
        read = lambda index: np.ascontiguousarray(shard((index[0].start or 0) * shards // train.batch_size)[which])
        return jax.make_array_from_callback((train.batch_size, train.seq_len), NamedSharding(mesh, BATCH), read)

    return array(0), array(1)


def fit(
    state: TrainState,
    recipe: Recipe,
    dataset: Dataset,
    mesh: Mesh,
    until_step: int | None = None,
    on_step: Callable[[int, TrainState, StepMetrics], bool | None] | None = None,
) -> TrainState:
    """`jax_llm.engine.train.fit` on a mesh, from a state that is cut over it."""
    read = functools.partial(read_batch, train=recipe.train, mesh=mesh)
    step = compiled_train_step(recipe, mesh)
    return single.fit(state, recipe, dataset, until_step, on_step, step, read)


def evaluate(recipe: Recipe, params: Params, evaluation: Evaluation, mesh: Mesh) -> tuple[float, int]:
    """`jax_llm.engine.evaluate.evaluate` on a mesh."""
    model, put_rows = mesh_model(recipe, mesh), functools.partial(put, mesh=mesh)
    with constrain(mesh):
        return single_evaluate(model, params, recipe.train.compute_dtype, evaluation, put_rows)


@contextlib.contextmanager
def evaluator(recipe: Recipe, weights: Tensors, config: MeshConfig, device: str = "auto") -> Iterator[EvaluateLoss]:
    """`jax_llm.engine.evaluate.evaluator` on a mesh: every host is given the loss over all rows."""
    check_sharded(config, recipe)
    mesh = make_mesh(config, device)
    with x64(recipe.train.master_dtype):
        params = from_canonical(recipe.model, weights, mesh, jnp.dtype(recipe.train.compute_dtype))
        yield functools.partial(evaluate, recipe, params, mesh=mesh)


@contextlib.contextmanager
def generator(
    cfg: ModelConfig, weights: Tensors, config: MeshConfig, device: str = "auto", compute_dtype: str = "float32"
) -> Iterator[Callable[..., Iterator[list[list[int]]]]]:
    """`jax_llm.engine.generate.generator` on a mesh: weights, cache and logits are cut, and every host is given all
    texts.
    """
    check_mesh(config, cfg)
    mesh = make_mesh(config, device)
    platform = mesh.devices.flat[0].platform
    with x64(compute_dtype), matmul_precision(compute_dtype), constrain(mesh):
        params = from_canonical(cfg, weights, mesh, jnp.dtype(compute_dtype))
        params = jax.jit(unstack)(params)
        yield functools.partial(
            generate_stream, CausalLM(cfg, mesh_decoding_kernels(cfg, compute_dtype, platform)), params
        )


def to_training_state(cfg: ModelConfig, state: TrainState) -> TrainingState:
    """The framework-free form of a training state whose tensors are put together one by one, when they are
    asked for.
    """

    def on_demand(tree: Params) -> ReadOnDemand:
        return ReadOnDemand(tensor_shapes(cfg), lambda name: to_host(get_canonical(tree, name)))

    mu, nu = (on_demand(optax.tree_utils.tree_get(state.opt_state, name)) for name in ("mu", "nu"))
    return TrainingState(on_demand(state.params), mu, nu, int(state.step), int(state.adam_count))


def from_training_state(
    cfg: ModelConfig, opt: OptimizerConfig, saved: TrainingState, mesh: Mesh, dtype=jnp.float32
) -> TrainState:
    """The state from which `fit` goes on; every device reads its own part."""
    params, mu, nu = (from_canonical(cfg, tensors, mesh, dtype) for tensors in (saved.weights, saved.mu, saved.nu))
    shapes = jax.eval_shape(lambda: make_optimizer(opt, cfg).init(init_params(cfg, 0, dtype)))
    opt_state = optax.tree_utils.tree_set(shapes, mu=mu, nu=nu)
    counters = (put(np.array(x, np.int32), mesh=mesh, spec=PartitionSpec()) for x in (saved.step, saved.adam_count))
    return TrainState(params, opt_state, *counters)

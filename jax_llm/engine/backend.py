"""JAX as the programs see it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import jax

from jax_llm.engine import device, distributed, evaluate, foreign_checkpoint, generate, run, train
from jax_llm.engine.decoding import decoding_params
from jax_llm.engine.gradients import cast
from jax_llm.engine.hosts import join_hosts
from jax_llm.engine.plan import decoding_kernels, make_model, plan_run
from jax_llm.model import CausalLM, init_params
from llm_common.config import ModelConfig, Recipe
from llm_common.data.datasets import Dataset
from llm_common.data.evaluation import Evaluation
from llm_common.run.backend import Backend, Session, Stream
from llm_common.sharding import MeshConfig


class JaxSession:
    """A state that `fit` replaces."""

    def __init__(self, state: train.TrainState, fit: Callable, evaluate: Callable) -> None:
        self.state, self._fit, self._evaluate = state, fit, evaluate

    @property
    def step(self) -> int:
        return int(self.state.step)

    def fit(self, dataset: Dataset, until_step: int | None = None, on_step: Callable | None = None) -> None:
        self.state = self._fit(self.state, dataset=dataset, until_step=until_step, on_step=on_step)

    def evaluate(self, evaluation: Evaluation) -> tuple[float, int]:
        return self._evaluate(self.state.params, evaluation)


@contextlib.contextmanager
def open_session(recipe: Recipe, name: str, mesh: MeshConfig | None) -> Iterator[Session]:
    with device.x64(recipe.train.master_dtype):
        if mesh is not None:
            devices = distributed.make_mesh(mesh, name)
            state = distributed.init_state(recipe, devices)
            held_out = lambda params, data: distributed.evaluate(recipe, params, data, devices)
            yield JaxSession(state, partial(distributed.fit, recipe=recipe, mesh=devices), held_out)
            return
        target = device.select_device(name)
        with jax.default_device(target):
            model = make_model(recipe, target.platform)
            held_out = lambda params, data: evaluate.evaluate(model, params, recipe.train.compute_dtype, data)
            yield JaxSession(train.init_state(recipe), partial(train.fit, recipe=recipe), held_out)


@contextlib.contextmanager
def seeded_generator(cfg: ModelConfig, name: str, dtype: str, compile: str) -> Iterator[Stream]:
    """With initial weights made on the device: those of a file would take a minute to come there. compile: of torch."""
    target = device.select_device(name)
    with jax.default_device(target), device.matmul_precision(dtype):
        params = jax.jit(lambda: decoding_params(cast(init_params(cfg, 0), dtype)))()
        yield partial(generate.generate_stream, CausalLM(cfg, decoding_kernels(cfg, dtype, target.platform)), params)


BACKEND = Backend(
    name="jax",
    plan_run=plan_run,
    device_kind=device.device_kind,
    memory_limit=device.memory_limit,
    memory_used=device.memory_used,
    join_hosts=join_hosts,
    open_session=open_session,
    fit_on_device=run.fit_and_save,
    fit_on_mesh=run.fit_and_save_on_mesh,
    evaluate_on_device=evaluate.evaluator,
    evaluate_on_mesh=distributed.evaluator,
    generate_on_device=lambda cfg, weights, name, dtype, compile: generate.generator(cfg, weights, name, dtype),
    generate_on_mesh=distributed.generator,
    generate_from_seed=seeded_generator,
    read_checkpoint=foreign_checkpoint.read,
    write_checkpoint=foreign_checkpoint.write,
)

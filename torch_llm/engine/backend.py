"""PyTorch as the programs see it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from llm_common.config import ModelConfig, Recipe
from llm_common.data.datasets import Dataset
from llm_common.data.evaluation import Evaluation
from llm_common.run.backend import Backend, Session, Stream
from llm_common.sharding import MeshConfig
from torch_llm.engine import device, distributed, evaluate, foreign_checkpoint, generate, run
from torch_llm.engine.decoding import GraphCache, fuse_projections
from torch_llm.engine.hosts import join_hosts
from torch_llm.engine.plan import decoding_kernels, plan_run
from torch_llm.engine.train import Trainer
from torch_llm.model import init_model


class TorchSession:
    """A trainer, which `fit` changes."""

    def __init__(self, trainer: Trainer, evaluate: Callable) -> None:
        self.trainer, self._evaluate = trainer, evaluate

    @property
    def step(self) -> int:
        return self.trainer.step

    def fit(self, dataset: Dataset, until_step: int | None = None, on_step: Callable | None = None) -> None:
        self.trainer.fit(dataset, until_step, on_step)

    def evaluate(self, evaluation: Evaluation) -> tuple[float, int]:
        return self._evaluate(evaluation)


@contextlib.contextmanager
def open_session(recipe: Recipe, name: str, mesh: MeshConfig | None) -> Iterator[Session]:
    if mesh is not None:
        sharded = distributed.ShardedTrainer(recipe, mesh, name)
        yield TorchSession(sharded, sharded.evaluate)
        return
    trainer = Trainer(recipe, device.select_device(name))
    yield TorchSession(trainer, partial(evaluate.evaluate, trainer.model))


@contextlib.contextmanager
def seeded_generator(cfg: ModelConfig, name: str, dtype: str, compile: str) -> Iterator[Stream]:
    """With initial weights made on the device: those of a file would take a minute to come there."""
    target = device.select_device(name)
    with device.matmul_precision(dtype):
        model = init_model(cfg, 0, getattr(torch, dtype), target, decoding_kernels(dtype)).requires_grad_(False)
        programs = GraphCache(compile == "on") if target.type == "cuda" else None
        yield partial(generate.generate_stream, fuse_projections(model), programs=programs)


BACKEND = Backend(
    name="torch",
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
    generate_on_device=generate.generator,
    generate_on_mesh=distributed.generator,
    generate_from_seed=seeded_generator,
    read_checkpoint=foreign_checkpoint.read,
    write_checkpoint=foreign_checkpoint.write,
)

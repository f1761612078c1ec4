"""What a program asks of a framework: one value for each, in `jax_llm.engine.backend` and
`torch_llm.engine.backend`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_common.config import ModelConfig, Recipe
from llm_common.data.datasets import Dataset
from llm_common.data.evaluation import EvaluateLoss, Evaluation
from llm_common.run.folder import Run
from llm_common.run.hosts import Hosts
from llm_common.run.metrics import StepMetrics
from llm_common.run.plan import Plan
from llm_common.sharding import MeshConfig
from llm_common.tensors import Tensors

Stream = Callable[
    ..., Any
]  # `generate_stream` with a model filled in: prompts, max_new_tokens, sampling, ... to new ids


class Session(Protocol):
    """A training run in memory, without a folder: for measurements."""

    @property
    def step(self) -> int:
        """Steps made."""
        ...

    def fit(
        self,
        dataset: Dataset,
        until_step: int | None = None,
        on_step: Callable[[int, Any, StepMetrics], bool | None] | None = None,
    ) -> None:
        """Train to `until_step`, calling `on_step` when a step is begun."""
        ...

    def evaluate(self, evaluation: Evaluation) -> tuple[float, int]:
        """Sum of the losses in nats over all held-out tokens, and how many these are."""
        ...


@dataclass(frozen=True)
class Backend:
    """Devices are named "auto", "cpu", "gpu" or "tpu". All of it raises UserError."""

    name: str  # "jax" or "torch"
    plan_run: Callable[[Recipe, str], Plan[Any]]
    device_kind: Callable[[str], str]  # what a device calls itself
    memory_limit: Callable[[str], int | None]  # bytes that a device can give
    memory_used: Callable[[str], int]  # the most bytes in use so far
    join_hosts: Callable[[str, float], Hosts]  # device, seconds to wait
    open_session: Callable[[Recipe, str, MeshConfig | None], AbstractContextManager[Session]]
    # on one device, and on a mesh: that stands before the device
    fit_on_device: Callable[[Run, str], Path]
    fit_on_mesh: Callable[[Run, MeshConfig, str], Path]
    evaluate_on_device: Callable[[Recipe, Tensors, str], AbstractContextManager[EvaluateLoss]]
    evaluate_on_mesh: Callable[[Recipe, Tensors, MeshConfig, str], AbstractContextManager[EvaluateLoss]]
    # device, compute dtype, and, on one device, `compile`
    generate_on_device: Callable[[ModelConfig, Tensors, str, str, str], AbstractContextManager[Stream]]
    generate_on_mesh: Callable[[ModelConfig, Tensors, MeshConfig, str, str], AbstractContextManager[Stream]]
    generate_from_seed: Callable[[ModelConfig, str, str, str], AbstractContextManager[Stream]]  # weights of seed 0
    read_checkpoint: Callable[[Path, dict[str, Any]], dict[str, Any]]  # Orbax or DCP, of the shapes of a tree like it
    write_checkpoint: Callable[[Path, dict[str, Any]], None]

    def fit_and_save(self, run: Run, device: str, mesh: MeshConfig | None) -> Path:
        """Train as `run` says, on one device or on a mesh; the newest checkpoint."""
        return self.fit_on_device(run, device) if mesh is None else self.fit_on_mesh(run, mesh, device)

    def evaluator(
        self, recipe: Recipe, weights: Tensors, device: str, mesh: MeshConfig | None
    ) -> AbstractContextManager[EvaluateLoss]:
        """Inside `with`: the held-out loss of weights, a function of the data."""
        if mesh is None:
            return self.evaluate_on_device(recipe, weights, device)
        return self.evaluate_on_mesh(recipe, weights, mesh, device)

    def generator(
        self, cfg: ModelConfig, weights: Tensors, dtype: str, device: str, mesh: MeshConfig | None, compile: str
    ) -> AbstractContextManager[Stream]:
        """Inside `with`: `generate_stream` of weights. compile: of `torch_llm.engine.generate.generator`."""
        if mesh is None:
            return self.generate_on_device(cfg, weights, device, dtype, compile)
        return self.generate_on_mesh(cfg, weights, mesh, device, dtype)

    def cost_of_determinism(self, recipe: Recipe, dataset: Dataset, device: str) -> str:
        """What `deterministic` costs on a device, measured on a few steps of a run that is thrown away: for people."""
        if self.plan_run(recipe, device).platform == "cpu":
            return "deterministic: a CPU gives the same bits anyway, at no cost"
        execution = (replace(recipe.execution, deterministic=x) for x in (True, False))
        slow, fast = (self._seconds_per_step(replace(recipe, execution=x), dataset, device) for x in execution)
        return (
            f"deterministic: {slow / fast:.2f} times the time of a step ({1e3 * slow:.1f} ms for {1e3 * fast:.1f} ms)"
        )

    def _seconds_per_step(self, recipe: Recipe, dataset: Dataset, device: str, steps: int = 5) -> float:
        """The median time of `steps` steps after three to warm up, from initial weights."""
        times: list[float] = []
        with self.open_session(recipe, device, None) as session:
            session.fit(dataset, steps + 3, lambda *_: times.append(time.perf_counter()))
        return float(np.median(np.diff(times)[2:]))

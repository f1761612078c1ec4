"""What a program asks of a framework: one value for each, in `jax_llm.engine.backend` and
`torch_llm.engine.backend`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig
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
    """Devices are named "auto", "cpu", "gpu" or "tpu". A mesh of None is one device. All of it raises UserError."""

    name: str  # "jax" or "torch"
    plan_run: Callable[[ModelConfig, TrainConfig, str], Plan[Any]]
    device_kind: Callable[[str], str]  # what a device calls itself
    memory_limit: Callable[[str], int | None]  # bytes that a device can give
    memory_used: Callable[[str], int]  # the most bytes in use so far
    join_hosts: Callable[[str, float], Hosts]  # device, seconds to wait
    fit_and_save: Callable[[Run, str, MeshConfig | None], Path]
    cost_of_determinism: Callable[[ModelConfig, TrainConfig, OptimizerConfig, Dataset, str], str]
    open_session: Callable[
        [ModelConfig, TrainConfig, OptimizerConfig, str, MeshConfig | None], AbstractContextManager[Session]
    ]
    # cfg, weights, train, device, mesh
    evaluator: Callable[
        [ModelConfig, Tensors, TrainConfig, str, MeshConfig | None], AbstractContextManager[EvaluateLoss]
    ]
    # cfg, weights or None for those of seed 0, compute dtype, device, mesh, compile
    generator: Callable[[ModelConfig, Tensors | None, str, str, MeshConfig | None, str], AbstractContextManager[Stream]]
    read_checkpoint: Callable[[Path, dict[str, Any]], dict[str, Any]]  # Orbax or DCP, of the shapes of a tree like it
    write_checkpoint: Callable[[Path, dict[str, Any]], None]

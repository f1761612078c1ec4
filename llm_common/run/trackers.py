"""Where a run's curves are shown beside its log: TensorBoard, and Weights & Biases or MLflow where they are asked for.

`log.jsonl` is the record; none of these may end a run. One that fails is left out from there on, and said.
"""

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm_common.errors import UserError, first_line, nearest, notice, require_package
from llm_common.run.log import TensorBoard


class Tracker(Protocol):
    """What shows the curves of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Some numbers of a step."""
        ...

    def close(self) -> None:
        """The run has ended, or goes on in another process."""
        ...


class WandB:
    """Weights & Biases. A run that goes on, in either framework, is the same run there: its id is kept in the folder.

    Their own variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        place = folder / "wandb-id"
        known = place.read_text(encoding="utf-8").strip() if place.is_file() else None
        self._run = wandb.init(dir=str(folder), name=folder.name, id=known, resume="allow", config=settings)
        place.write_text(str(self._run.id), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI or in the run's `mlflow.db`. A run that goes on is the same run there."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        mlflow = importlib.import_module("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self._client, self._metric = mlflow.MlflowClient(tracking_uri=uri), mlflow.entities.Metric
        place = folder / "mlflow-id"
        if place.is_file():
            self._id = place.read_text(encoding="utf-8").strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name("one-model-twice")
        experiment = found.experiment_id if found else self._client.create_experiment("one-model-twice")
        self._id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        place.write_text(self._id, encoding="utf-8")
        for part, fields in settings.items():
            for name, value in (fields if isinstance(fields, dict) else {"": fields}).items():
                text = value if isinstance(value, str) else json.dumps(value)
                self._client.log_param(self._id, f"{part}.{name}".rstrip("."), text[:500])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics)  # one request for all: the run waits for it

    def close(self) -> None:
        self._client.set_terminated(self._id)


SERVICES: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {"wandb": WandB, "mlflow": MLflow}


def parse_services(text: str | None) -> tuple[str, ...]:
    """The services that a flag names, with commas between. Raises UserError for one unknown or not installed."""
    names = tuple(dict.fromkeys(x.strip() for x in (text or "").split(",") if x.strip()))
    for name in names:
        if name not in SERVICES:
            raise UserError(f"`log_to` {name}: no such service{nearest(name, SERVICES)}; known: {', '.join(SERVICES)}")
        require_package(name, name)
    return names


class Trackers:
    """All trackers of a run as one, of which none can end it."""

    def __init__(self, folder: Path, services: Sequence[str], settings: dict[str, Any]) -> None:
        self._open: dict[str, Tracker] = {}
        self._attempt("tensorboard", lambda: self._begin("tensorboard", TensorBoard(folder / "tensorboard")))
        for name in services:
            self._attempt(name, lambda name=name: self._begin(name, SERVICES[name](folder, settings)))

    def _begin(self, name: str, tracker: Tracker) -> None:
        self._open[name] = tracker

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service raises: no network, no login, a full disk, another version
            self._open.pop(name, None)
            notice(f"{name}: {first_line(error)}; the run goes on without it, log.jsonl has everything")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Some numbers of a step, to all."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, lambda tracker=tracker: tracker.write(step, values))

    def close(self) -> None:
        """End all of them."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, tracker.close)

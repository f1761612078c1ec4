"""One training run in its folder: the lock, resuming, the log, evaluations, checkpoints, and requests to stop.

Both frameworks train inside it, so a run that changes frameworks is one run: `jax_llm.engine.checkpoint.fit_and_save`
and its twin give it the numbers of each step and two functions, which read the training state and compute the held-out
loss.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_common.config import Recipe, RunConfig
from llm_common.data.datasets import Dataset
from llm_common.data.evaluation import EvaluateLoss, Evaluation, Stopped
from llm_common.errors import UserError, notice
from llm_common.files.tensor_files import TensorFiles
from llm_common.run.checkpoint import (
    STATE_FILE,
    TrainingState,
    check_model_folder,
    latest_checkpoint,
    load_checkpoint,
    load_resumable,
    prune_checkpoints,
    read_settings,
    save_checkpoint,
)
from llm_common.run.hosts import ONE_HOST, Hosts, text_hash
from llm_common.run.log import RunLog
from llm_common.run.settings import check_resumable, run_settings, total_steps
from llm_common.run.trackers import Trackers
from llm_common.text.hf_tokenizer import AnyTokenizer

LOCK_FILE, LOG_FILE = ".lock", "log.jsonl"


# What asks a run to save and end: Ctrl-C, a scheduler, a terminal that is closed.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run:
    """A run's folder and everything about a run that is not a framework's.

    initial: weights to start from instead of random ones. evaluation: held-out data. roles: the ids that the data ends
    documents and answers with, for those who generate. on_event: is given every row of the log as it is written: steps,
    and rows with the key "event" ("resume", "extend", "evaluation", "save", "stop", "end"). hosts: the processes that
    train together, each with a Run of its own over the same folder; the first of them keeps lock and log. log_to: names
    of `trackers.SERVICES` that show the curves, too.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        dataset: Dataset,
        framework: str,
        *,
        tokenizer: AnyTokenizer | None = None,
        config: RunConfig | None = None,
        evaluation: Evaluation | None = None,
        initial: TensorFiles | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        hosts: Hosts = ONE_HOST,
        roles: dict[str, int | None] | None = None,
        log_to: Sequence[str] = (),
    ) -> None:
        self.folder, self.recipe, self.dataset = folder, recipe, dataset
        self.framework, self.tokenizer, self.config = framework, tokenizer, config or RunConfig()
        self.evaluation, self.initial, self.on_event, self.hosts = evaluation, initial, on_event, hosts
        self._log_to = log_to
        self.settings = run_settings(recipe, dataset, tokenizer)
        if initial is not None:
            self.settings["initial"] = {"weights": fingerprint(initial)}
        self.segments = [
            {"from_step": 0, "total_steps": recipe.optimizer.total_steps}
        ]  # the first, and each by which the run became longer
        self._notes = {"roles": roles or {}, "eval_batches": self.config.eval_batches}  # saved, and not compared
        self.stop_signal: int | None = None
        self._step, self._between = 0, True  # the last step that is done, and whether the next one is under way
        self._lock: int | None = None
        self._place: tuple[int, int] | None = None  # the folder itself, whatever is made of its name meanwhile
        self._log: RunLog | None = None
        self._board: Trackers | None = None
        self._evaluated: tuple[int, dict[str, Any]] | None = None  # the last evaluation, and after which step
        self._saved: tuple[int, Path] | None = None
        self._row: tuple[int, Mapping[str, Any]] | None = None  # of the last step, which may be under way
        self._handlers: dict[int, Any] = {}

    # --- beginning and end

    def __enter__(self) -> "Run":
        """Take the folder's lock. Raises UserError if another run has it, or if the hosts have other code or
        settings.
        """
        self.hosts.check_same(settings=text_hash([self.settings, self.recipe.model.to_hf()]))
        self.hosts.first(self._take_lock)
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                self._handlers[number] = signal.signal(number, self._request_stop)
        return self

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = "a file of this name is there" if self.folder.is_file() else error.strerror
            raise UserError(f"{self.folder}: no folder can be made there ({reason}); give another `out`") from None
        self._place = _identity(self.folder)
        self._lock = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it however the process ends
        except OSError:
            owner = os.pread(self._lock, 200, 0).decode(errors="replace") or "another process"
            os.close(self._lock)
            raise UserError(
                f"{self.folder}: {owner} is training in this folder; wait for it, or use another `out`"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _request_stop(self, number: int, frame: object) -> None:
        """The first signal asks for an end after this step; the second ends the process as if there were no handler."""
        self.stop_signal = number
        for again in self._handlers:
            signal.signal(again, signal.SIG_DFL)
        if self.hosts.index == 0:
            step = self._step + self._between
            os.write(2, f"\nstopping after step {step}, which is saved first; a second signal ends at once\n".encode())

    def _keep_folder(self) -> str:
        """The run's folder, which somebody may have deleted or replaced while it trains: then another one is begun, and
        said.

        Nothing is ever written into a folder that is not this run's.
        """
        if _identity(self.folder) == self._place and _identity(self.folder / LOCK_FILE) == _identity(self._lock):
            return str(self.folder)
        was, here = self.folder, _identity(self.folder)
        if here is not None and here != self._place:
            self.folder = next(
                x for i in itertools.count(1) if not (x := was.with_name(f"{was.name}-rescued-{i}")).exists()
            )
            notice(f"{was} was replaced by another folder while this run trained: it goes on in {self.folder}")
        elif here is None:
            notice(f"{was} was deleted while this run trained: it is made again, without what was saved before")
        if self._lock is not None:
            os.close(self._lock)
        self._take_lock()
        if here is None or self.folder != was:
            self._saved = None
            if self._log is not None:
                self._log.close()
            self._log = RunLog(self.folder / LOG_FILE, self._step, framework=self.framework, settings=self.settings)
            self._board = self._trackers() if self._board is not None else None
        return str(self.folder)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._log is not None:
            with contextlib.suppress(Exception):  # a step that failed on the device has no numbers
                self._write_row()
        if self._log is not None:
            self._log.close()
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            os.close(self._lock)

    def resume(self) -> TrainingState | None:
        """The state of the newest checkpoint, or None in a new folder; opens the log. Raises UserError, naming what
        differs, if the checkpoint is damaged or of another run.
        """
        found, saved = self.hosts.first(self._find)  # the one that checks every byte
        state = None if found is None else load_checkpoint(Path(found), self.recipe.model, verify=False)[1]
        step = 0 if state is None else state.step
        self._step = step
        total = self.recipe.optimizer.total_steps
        extended = found is not None and total_steps(saved) != total
        if found is not None:
            self._saved = (step, Path(found))
            before = saved.get("segments") or [{"from_step": 0, "total_steps": total_steps(saved)}]
            self.segments = before + ([self.segments[0] | {"from_step": step}] if extended else [])
        if found is None and self.hosts.index == 0 and (self.folder / LOG_FILE).is_file():
            damaged = ", ".join(sorted(x.name for x in self.folder.glob("step-*")))
            where = f" ({damaged} is no whole checkpoint)" if damaged else ""
            notice(f"{self.folder} has the log of a run but no checkpoint to go on from{where}: it begins at step 1")
        if self.hosts.index == 0:
            prune_checkpoints(self.folder, 0, 0)  # what a cut-off save left behind
            self._log = RunLog(self.folder / LOG_FILE, step, framework=self.framework, settings=self.settings)
            self._board = self._trackers()
        self._start = self._last = self._last_save = time.monotonic()
        if state is not None:
            self._tell({"event": "resume", "step": step, "checkpoint": found}, log=False)
            if len(self.segments) > 1 and self.segments[-1]["from_step"] == step and extended:
                self._saved = None  # saved again at once, as a step of the longer run
                self._tell(
                    {
                        "event": "extend",
                        "step": step,
                        "from": total_steps(saved),
                        "total_steps": total,
                    }
                )
        return state

    def _trackers(self) -> Trackers:
        return Trackers(self.folder, self._log_to, self.settings)

    def _find(self) -> tuple[str | None, dict[str, Any]]:
        folder, _, saved = load_resumable(self.folder, self.recipe.model, self.settings)
        return (None if folder is None else str(folder)), saved

    # --- called by `fit` after each step

    def after_step(
        self, step: int, metrics: Mapping[str, Any], snapshot: Callable[[], TrainingState], evaluate: EvaluateLoss
    ) -> bool:
        """Log the step before, evaluate and save when it is time; returns whether the run must stop here.

        metrics: loss, grad_norm, lr, skipped; they are read, which waits for the step, when the next step has been
        begun or before anything else is done with this one. snapshot: reads the training state. evaluate: computes the
        held-out loss.
        """
        self._step, self._between = step, False
        self._write_row()
        config, now = self.config, time.monotonic()
        self._row = step, metrics
        last = step >= self.recipe.optimizer.total_steps
        if config.eval_every and step % config.eval_every == 0 and not last and not self._stops():
            self._evaluate(step, evaluate)
        by_steps = config.save_every is not None and step % config.save_every == 0
        by_time = config.save_minutes is not None and now - self._last_save >= 60 * config.save_minutes
        stop = self.stop_signal  # read once: a signal that comes from here on counts at the next step, on all hosts
        if self.hosts.count > 1:  # the first host's clock, and anybody's signal
            told = self.hosts.gather([by_time, stop])
            by_time, stop = told[0][0], next((number for _, number in told if number is not None), None)
            self.stop_signal = self.stop_signal or stop
        if (by_steps or by_time or stop is not None) and not last:
            self._save(step, snapshot, evaluate)
        if self._row is None:  # something else was done since this step ended, which is no part of the next one's time
            self._last = time.monotonic()
        self._between = True
        return stop is not None

    def _stops(self) -> bool:
        """Whether a stop was asked for, of any host."""
        if self.hosts.count == 1:
            return self.stop_signal is not None
        return any(number is not None for number in self.hosts.gather(self.stop_signal))

    def _write_row(self) -> None:
        """Log the last step, if that was not done yet; its time is that from the end of the one before to its own."""
        if self._row is None:
            return
        (step, metrics), self._row = self._row, None
        row = {"step": step, **metrics}  # waits for the step
        tokens, now = self.recipe.train.batch_size * self.recipe.train.seq_len, time.monotonic()
        row["tokens_per_second"] = round(tokens / max(now - self._last, 1e-9), 1)
        row |= {"seconds": round(now - self._start, 3), "framework": self.framework}
        self._last = now
        self._tell(row)
        if self._board is not None:
            self._board.write(step, {key: row[key] for key in ("loss", "grad_norm", "lr", "tokens_per_second")})

    def finish(self, step: int, snapshot: Callable[[], TrainingState], evaluate: EvaluateLoss) -> Path:
        """Save if this step is not saved yet, say how the run ended, and return the newest checkpoint."""
        self._write_row()
        if self._saved is None or self._saved[0] != step:
            self._save(step, snapshot, evaluate)
        assert self._saved is not None
        event = "end" if step >= self.recipe.optimizer.total_steps else "stop"
        self._tell({"event": event, "step": step, "checkpoint": str(self._saved[1]), "framework": self.framework})
        return self._saved[1]

    def _evaluate(self, step: int, evaluate: EvaluateLoss) -> dict[str, Any] | None:
        """The held-out loss after a step, or None: nothing is held out, a stop was asked for, or it is no number."""
        if self.evaluation is None:
            return None
        if self._evaluated is None or self._evaluated[0] != step:
            self._write_row()
            self.evaluation.stop = self._stops
            try:
                result = self.evaluation.summary(*evaluate(self.evaluation))
            except Stopped:
                return None
            except UserError as error:  # training goes on, and stops by itself if its own numbers are not finite
                if self.hosts.index == 0:
                    notice(f"step {step}: no held-out loss ({error})")
                return None
            self._evaluated = (step, result)
            self._tell({"event": "evaluation", "step": step, **result, "framework": self.framework})
            if self._board is not None:
                self._board.write(step, {f"held_out/{key}": x for key, x in result.items()})
        return self._evaluated[1]

    def _save(self, step: int, snapshot: Callable[[], TrainingState], evaluate: EvaluateLoss) -> None:
        """Save a step, with its held-out loss; without it if somebody waits for the end."""
        self._write_row()
        self.folder = Path(self.hosts.first(self._keep_folder))
        known = self._evaluated[1] if self._evaluated is not None and self._evaluated[0] == step else None
        result = known if known is not None or self._stops() else self._evaluate(step, evaluate)
        settings = {"framework": self.framework, **self.settings, **self._notes, "segments": self.segments}
        settings |= {"evaluation": result} if result else {}
        folder = save_checkpoint(self.folder, self.recipe.model, snapshot(), settings, self.tokenizer, self.hosts)
        self._saved, self._last_save = (step, folder), time.monotonic()
        self._tell({"event": "save", "step": step, "checkpoint": str(folder)}, log=False)
        if self.hosts.index == 0:
            prune_checkpoints(self.folder, self.config.keep_last, self.config.keep_best, settings)

    def _tell(self, row: dict[str, Any], log: bool = True) -> None:
        if self.hosts.index != 0:
            return
        if log:
            assert self._log is not None, "call resume() first"
            self._log.write(row)
        if self.on_event is not None:
            self.on_event(row)


def _identity(place: Path | int | None) -> tuple[int, int] | None:
    """What makes a file or folder (by its path or descriptor) the one that it is, or None if it is not there."""
    try:
        found = None if place is None else os.stat(place)
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)


def fingerprint(weights: TensorFiles) -> str:
    """sha256 of the files' headers, which name every tensor, its shape and place: cheap, and enough to notice a
    mix-up.
    """
    digest = hashlib.sha256()
    for header in weights.headers:
        digest.update(header)
    return digest.hexdigest()


def check_goes_on(folder: Path, settings: Callable[[], dict[str, Any]]) -> None:
    """Raise UserError, before any framework is asked for, if a run of these settings cannot be in a folder.

    settings: makes what `run_settings` makes, or some parts of it; called if there is a checkpoint, as it may read all
    of the data. What a checkpoint holds is looked at by `Run.resume`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; `out` is a folder")
    found = latest_checkpoint(folder)
    if found is not None:
        check_resumable(found, read_settings(found), settings())


def newest(path: Path) -> Path:
    """The newest checkpoint of a run's folder, or the path itself if it is a checkpoint or a model folder already.

    Raises UserError, which says what it is, for what is none of them.
    """
    found = latest_checkpoint(path)
    if found is None and path.is_dir() and (path / LOG_FILE).is_file() and not (path / "config.json").exists():
        raise UserError(f"{path}: a run that has saved no checkpoint yet")
    if found is None and not (path / STATE_FILE).is_file():
        check_model_folder(path)
    return found or path

"""Training on many devices against training on one, in float64: the same logits, gradients, updates, texts and files.

Each case is a mesh. The processes of a group run several cases one after the other (`parity.sharded.worker`); what
comes out is compared here with the specification.
"""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.errors import UserError
from llm_common.processes import lifeline
from llm_common.sharding import MeshConfig
from llm_common.tensors import Tensors
from parity.core import drawn
from parity.core.case_space import MESH, fix
from parity.core.compare import Row, tensor_errors
from parity.core.drawn import Case
from parity.core.run_control import FACTOR, allowed_error
from parity.sharded.catalogue import SHARDING_BUGS, ShardingBug
from parity.sharded.mesh_cases import SHAPES, expected, mesh_case


@dataclasses.dataclass(frozen=True)
class Group:
    """Processes that run cases (shape, mesh) together."""

    framework: str
    processes: int
    devices: int  # of each process
    cases: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.framework}, {self.processes} x {self.devices} devices"


GROUPS = (
    Group(
        "jax",
        1,
        8,
        (
            ("llama", "data=8"),
            ("llama", "fsdp=8"),
            ("tied", "data=2,tensor=4"),
            ("qwen2", "data=2,fsdp=2,tensor=2"),
            ("qwen3", "fsdp=2,tensor=4"),
            ("documents", "data=2,fsdp=2,tensor=2"),
            ("overflow", "data=2,fsdp=2,tensor=2"),
        ),
    ),
    Group("jax", 2, 2, (("llama", "data=4"), ("tied", "fsdp=4"), ("qwen2", "fsdp=2,tensor=2"))),
    Group("torch", 2, 1, (("llama", "data=2"), ("llama", "fsdp=2"), ("tied", "tensor=2"))),
    Group(
        "torch",
        4,
        1,
        (
            ("llama", "data=4"),
            ("tied", "fsdp=4"),
            ("llama", "tensor=4"),
            ("llama", "data=2,fsdp=2"),
            ("tied", "data=2,tensor=2"),
            ("qwen2", "fsdp=2,tensor=2"),
            ("qwen3", "fsdp=2,tensor=2"),
            ("documents", "fsdp=2,tensor=2"),
            ("overflow", "data=2,fsdp=2"),
        ),
    ),
)
QUICK = (
    Group("jax", 1, 8, (("qwen3", "data=2,fsdp=2,tensor=2"), ("documents", "fsdp=4,tensor=2"), ("overflow", "fsdp=8"))),
    Group("torch", 4, 1, (("qwen2", "fsdp=2,tensor=2"), ("tied", "data=2,fsdp=2"), ("overflow", "fsdp=4"))),
)


def group_of(case: Case, seed: int) -> Group:
    """The processes or devices that a drawn case takes."""
    size, line = MeshConfig.parse(case["mesh"]).size, f"{seed} {drawn.to_line(case)}"
    processes, devices = (1, size) if case["framework"] == "jax" else (size, 1)
    return Group(case["framework"], processes, devices, ((line, case["mesh"]),))


def drawn_groups(seed: int) -> Iterator[Group]:
    """A case of each framework that nobody chose."""
    for i, framework in enumerate(MESH["framework"]):
        case = drawn.draw(MESH, np.random.default_rng((seed, 31, i)), fix)
        yield group_of({**case, "framework": framework}, seed)


PLAIN = (("llama", "data=2"), ("tied", "fsdp=2"), ("qwen2", "tensor=2"), ("qwen3", "fsdp=2"), ("documents", "data=2"))
TWO_GPUS = (Group("jax", 1, 2, PLAIN), Group("torch", 2, 1, PLAIN))


def _largest_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the steps of a run whose number is finite; infinite if there are more steps or fewer."""
    return float(np.abs(found - wanted)[np.isfinite(wanted)].max()) if found.shape == wanted.shape else math.inf


def compare(group: Group, shape: str, mesh: str, got: dict[str, Any]) -> Iterator[Row]:
    """The rows of a case. Bounds are those of one device (rule 1 of the design): sums over devices are sums in another
    order.
    """
    want, c = expected(shape), mesh_case(shape)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, x in got.items():
        part, _, tensor = key.partition("|")
        if tensor:
            parts.setdefault(part, {})[tensor] = x
    check, side = f"{group.framework} {mesh}", "JAX" if group.framework == "jax" else group.framework
    label = shape if shape in SHAPES else "drawn"
    name = f"{label}, {group.processes} process" + ("es" if group.processes > 1 else "")

    def row(item: str, measured: float, allowed: float, place: str = "") -> Row:
        ok = measured <= allowed
        return Row(check, f"{name}: {item}", "float64", measured, allowed, ok, "" if ok else side, place=place)

    def worst(item: str, a: Tensors, b: Tensors, allowed: float) -> Row:
        errors = tensor_errors(a, b)
        place = max(errors, key=errors.__getitem__)
        return row(item, errors[place], allowed, place)

    different = sum(int((parts["init"][tensor] != x).sum()) for tensor, x in want.init.items())
    yield row("initial weights that differ", different, 0)
    yield worst("logits", {"logits": got["logits"]}, {"logits": want.logits}, 1e-12)
    yield row("loss of uneven rows", abs(float(got["loss"]) - want.loss) / (want.loss or 1.0), 1e-12)
    yield worst("gradients", parts["gradients"], want.gradients, 1e-12)
    for key in ("loss", "grad_norm", "lr", "skipped"):
        wanted = np.array([r[key] for r in want.rows])
        controls = [_largest_difference(np.array([r[key] for r in log]), wanted) for _, log in want.controls]
        allowed = max([1e-11, *(FACTOR * x for x in controls)])
        name_of = "losses" if key == "loss" else key
        measured = _largest_difference(got[f"steps of {key}"], wanted)
        yield row(f"{name_of} of {len(wanted)} steps", measured, allowed, "train_step")
    counters = int(got["step"]) - want.end.step, int(got["adam_count"]) - want.end.adam_count
    yield row("counters that differ", sum(map(abs, counters)), 0, "fit (counters)")
    moments = lambda mu, nu: {**c.without_poison(mu), **{f"nu.{k}": x for k, x in c.without_poison(nu).items()}}
    exact, ends = moments(want.end.mu, want.end.nu), [end for end, _ in want.controls]
    allowed = allowed_error(1e-11, exact, [moments(end.mu, end.nu) for end in ends])
    yield worst("moments", moments(parts["mu"], parts["nu"]), exact, allowed)
    before = c.without_poison(c.start.weights)
    update = lambda after: {tensor: x - before[tensor] for tensor, x in c.without_poison(after).items()}
    exact = update(want.end.weights)
    allowed = allowed_error(1e-10, exact, [update(end.weights) for end in ends])
    yield worst(f"update of {len(want.rows)} steps", update(parts["weights"]), exact, allowed)
    if want.folder is not None:
        moved = lambda after: {tensor: x - c.weights[tensor] for tensor, x in after.items()}
        item = "update of a run from given weights, through its folder"
        yield worst(item, moved(parts["folder"]), moved(want.folder), 1e-10)
    total, count = got["held out"]
    yield row("held-out loss", abs(total - want.held_out[0]) / want.held_out[0] + abs(count - want.held_out[1]), 1e-11)
    if "short sums" in got:
        # The sum of two 8-bit numbers of one exponent fits in 8 bits when its last bit is 0: one in two, and fewer of
        # other exponents or of more numbers. Summed in bfloat16 all of them do: the bound lies halfway.
        short = row("gradients of 8 bits in a bfloat16 run", float(got["short sums"]), 0.75)
        yield dataclasses.replace(short, dtype="bfloat16")
    if "other products" in got:
        other = row(
            "products of a bfloat16 step whose dtypes are not those of one device", int(got["other products"]), 0
        )
        yield dataclasses.replace(other, dtype="bfloat16")
    if "wide tensors" in got:
        wide = row("generating in bfloat16: tensors of another dtype", int(got["wide tensors"]), 0)
        yield dataclasses.replace(wide, dtype="bfloat16")
    yield row("tokens of texts that differ", int((got["texts"] != np.array(want.texts)).sum()), 0)


# --- groups of processes


class _Ended(Exception):
    """A process of a group ended with an error of its own."""


def run_group(group: Group, bug: str | None = None, device: str = "cpu") -> list[Row]:
    """Run a group's cases on the devices of a kind, "cpu" or "gpu". Raises UserError with a process's own words if it
    refuses.

    A case that fails is run a second time, traced: its rows have the place that differs first, or the function they are
    about.
    """
    try:
        results = _run(group, bug, device)
    except _Ended as error:
        place = next((place for words, place in ENDED.items() if words in str(error)), "distributed")
        note, side = f"raised {error}", "JAX" if group.framework == "jax" else group.framework
        return [Row(str(group), "raised an error", "", math.inf, 0, False, side, note, place)]
    rows: list[Row] = []
    for (shape, mesh), got in zip(group.cases, results, strict=True):
        found = list(compare(group, shape, mesh, got))
        if any(not row.ok for row in found):
            found = _traced(found, dataclasses.replace(group, cases=((shape, mesh),)), bug, device)
        rows += found
    return rows


# What processes compare of themselves, and the functions that they then find fault with.
ENDED = {
    "replicas differ": "replicas: gradients or weights of their own",
    "checkpoint ": "to_training_state, from_training_state",
}
# The function that a row is about, the first of those that fail; where a trace shows a module, that is the place.
FUNCTIONS = {
    "initial weights": "init_weights",
    "logits": "forward on a mesh",
    "loss of uneven rows": "loss_and_grads",
    "gradients of 8 bits": "shard (reduce dtype)",
    "gradients": "loss_and_grads",
    "grad_norm": "grad_norm",
    "lr ": "learning_rate",
    "skipped": "train_step (skipped update)",
    "counters": "fit (counters)",
    "losses": "train_step",
    "moments": "train_step",
    "update of a run from given weights": "fit_and_save_on_mesh",
    "update": "train_step",
    "held-out loss": "evaluate",
    "products of a bfloat16 step": "compiled_train_step",
    "generating": "generator",
    "tokens of texts": "generator",
}


def _traced(rows: list[Row], group: Group, bug: str | None, device: str) -> list[Row]:
    """Rows, some of which fail, with their place."""
    items = [row.item.partition(": ")[2] for row in rows if not row.ok]
    place = next(place for words, place in FUNCTIONS.items() if any(item.startswith(words) for item in items))
    try:
        fault = [str(x) for x in _run(group, bug, device, trace=True)[0]["fault"]]
        note = "operation by operation the first micro-batch is right, there and back"
        if fault:
            place, note = fault[0], f"differs first at {fault[0]}, {fault[1]}: {float(fault[2]):.1e}"
    except (UserError, _Ended) as error:
        note = f"not traced: {error}"
    return [row if row.ok else dataclasses.replace(row, place=place, note=note) for row in rows]


def _run(group: Group, bug: str | None, device: str, trace: bool = False) -> list[dict[str, Any]]:
    """What the processes of a group wrote down of each case."""
    with tempfile.TemporaryDirectory() as folder:
        task = json.dumps(
            {
                "framework": group.framework,
                "cases": group.cases,
                "out": folder,
                "bug": bug,
                "device": device,
                "trace": trace,
            }
        )
        command, port = [sys.executable, "-m", "parity.sharded.worker", task], free_port()
        with lifeline() as (descriptor, variables), ThreadPoolExecutor(group.processes) as pool:
            processes = [
                subprocess.Popen(
                    command,
                    env={**environment(group, i, port, device), **variables},
                    pass_fds=[descriptor],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for i in range(group.processes)
            ]
            # whoever waits for a dead one is ended
            outputs = list(pool.map(lambda process: _watched(process, processes), processes))
        for process, output in zip(processes, outputs, strict=True):
            if process.returncode:
                lines = next((x for x in outputs if "Error" in x), output).strip().splitlines() or [
                    str(process.returncode)
                ]
                line = next((x for x in reversed(lines) if "Error" in x), lines[-1])
                raise UserError(f"{group}: {line}") if "UserError" in line else _Ended(f"{group}: {line}")
        found = []
        for i in range(len(group.cases)):
            with np.load(Path(folder) / f"{i}.npz") as got:
                found.append(dict(got))
        return found


def _watched(process: subprocess.Popen, others: list[subprocess.Popen]) -> str:
    output, _ = process.communicate()
    if process.returncode:
        for other in others:
            if other is not process and other.poll() is None:
                try:
                    other.wait(5)  # it may have something to say of its own
                except subprocess.TimeoutExpired:
                    other.kill()
    return output


def environment(group: Group, process: int, port: int, device: str) -> dict[str, str]:
    """The environment of one process of a group, as torchrun or a cluster would make it."""
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "LOCAL_RANK": str(process)}
    if device == "cpu":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={group.devices}"
        variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if group.framework == "jax" and group.processes > 1:
        variables |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(group.processes),
            "JAX_PROCESS_ID": str(process),
        }
    if group.framework == "torch":
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": process, "WORLD_SIZE": group.processes}
        variables |= {name: str(x) for name, x in where.items()}
    return os.environ | variables


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def find_bug(name: str) -> ShardingBug:
    return next(bug for bug in SHARDING_BUGS if bug.name == name)


def plant(bug: ShardingBug) -> tuple[bool, str]:
    """Whether the expected row is the first to go red under a bug, and which one that was, with its place."""
    group = Group(bug.framework, bug.processes, bug.devices, ((bug.shape, bug.mesh),))
    try:
        rows = [row for row in run_group(group, bug.name) if not row.ok]
        red = [f"{row.item.rpartition(': ')[2]}; {row.place}: {row.note}" for row in rows]
    except UserError as error:
        red = [str(error)]
    return bool(red) and bug.item in red[0], red[0] if red else "nothing"

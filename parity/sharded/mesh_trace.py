"""Where a run on a mesh differs first from the specification: what was read, what was placed, then module by module,
there and back.

Each process compares what it holds itself: of every tensor the rows and the channels or heads that are its own.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from llm_common.run.hosts import Hosts
from llm_common.sharding import MeshConfig
from parity.core.compare import tensor_error
from parity.sharded.mesh_cases import MeshCase
from parity.trace.points import Point, specification
from parity.trace.trace import local_allowed

Found = dict[tuple[str, str], float]  # (place, what is compared) -> error, the largest of all processes

# Running free, the error of a point is that of all before it, too: a few hundred roundings more than one module's.
FREE_ALLOWED = 16 * local_allowed("float64")


def own_part(whole: np.ndarray, shape: tuple[int, ...], row: int, at: int) -> np.ndarray | None:
    """Of a tensor of the whole batch the part of a process that has this shape: rows from `row` on, piece `at` of a cut
    axis.
    """
    if len(shape) != whole.ndim:
        return None
    cut = [slice(row, row + shape[0])]
    for length, mine in zip(whole.shape[1:], shape[1:], strict=True):
        cut.append(slice(0, length) if mine == length else slice(at * mine, (at + 1) * mine))
    part = whole[tuple(cut)]
    return part if part.shape == tuple(shape) else None


def error_of(found: Any, whole: np.ndarray, row: int = 0, at: int = 0) -> float:
    """||a - b|| / ||b|| of a process's part; infinite if it is no part of the whole tensor."""
    found = np.asarray(found, np.float64)
    part = own_part(whole, found.shape, row, at) if whole.ndim > 1 else whole
    if part is None:
        return math.inf
    return tensor_error(found, part, max(float(np.linalg.norm(part)), 1e-8 * float(np.linalg.norm(whole)), 1e-300))


def points_of(case: MeshCase) -> list[Point]:
    """What the specification has at every point for the first batch."""
    inputs, targets = case.data.batch(case.start.step)
    return specification(case.weights, inputs, targets, case.cfg, separator=case.train.document_separator)[0]


def torch_faults(case: MeshCase, trainer: Any, mesh: MeshConfig, hosts: Hosts) -> Found:
    """Of a trainer that has a case's finite weights: what a first micro-batch meets on its way, by hooks."""
    from torch_llm.engine import distributed

    inputs, targets = trainer.read_batch(case.data)
    rows = case.train.batch_size // mesh.batch_shards
    row, at, found = rows * mesh.batch_shard(hosts.index), mesh.coordinates(hosts.index)["tensor"], Found()
    for what, x, whole in zip(("inputs", "targets"), (inputs, targets), case.data.batch(trainer.step), strict=True):
        found["read_batch", what] = error_of(x.cpu().numpy(), whole, row, at)
    for name, p in trainer.parameters.items():
        own = case.weights[name][trainer.shard_of(name)]
        found["from_canonical", name] = error_of(p.detach().cpu().numpy(), own)
    expected, handles = {p.name: p for p in points_of(case)}, []

    def note(name: str, what: str, x: Any, whole: np.ndarray, factor: float = 1.0) -> None:
        if (name, what) not in found:  # the first micro-batch
            found[name, what] = error_of(distributed.local(x).detach().cpu().numpy() / factor, whole, row, at)

    def hook(module: Any, args: Any, output: Any, name: str) -> None:
        point = expected[name]
        note(name, "output", output, point.output)
        if output.requires_grad:  # FSDP takes a mean over processes of what is a sum
            output.register_hook(lambda g: note(name, "gradient", g, point.d_output, mesh.batch_shards))

    for name, module in trainer.model.named_modules():
        if name in expected and name != "model":
            handles.append(module.register_forward_hook(lambda m, a, o, name=name: hook(m, a, o, name)))
    trainer.loss_and_grads(inputs, targets)
    for handle in handles:
        handle.remove()
    return found


def jax_faults(case: MeshCase, mesh: Any) -> Found:
    """The same of JAX, whose arrays are those of all devices; operation by operation, as a compiler shows no points."""
    from jax_llm.engine import distributed
    from jax_llm.engine.checkpoint import to_canonical
    from jax_llm.engine.gradients import loss_and_grads
    from parity.sides.taps import JaxRecorder

    found, step = Found(), case.start.step
    inputs, targets = distributed.read_batch(case.data, step, case.cfg, train=case.train, mesh=mesh)
    for what, x, whole in zip(("inputs", "targets"), (inputs, targets), case.data.batch(step), strict=True):
        found["read_batch", what] = error_of(x, whole)
    params = distributed.from_canonical(case.cfg, case.weights, mesh)
    for name, x in to_canonical(case.cfg, params).items():
        found["from_canonical", name] = error_of(x, case.weights[name])
    # both are traced even where nothing is compiled
    execution = dataclasses.replace(case.recipe.execution, remat="none", scan_layers=False)
    plain = dataclasses.replace(case.recipe, execution=execution)
    model, recorder = distributed.mesh_model(plain, mesh), JaxRecorder()
    with recorder.attached():
        distributed.sharded(loss_and_grads, mesh)(recorder.of(model), params, inputs, targets)
    points = [p for p in points_of(case) if p.name != "model"]
    for p in points:
        found[p.name, "output"] = error_of(recorder.forward.get((p.name, "out"), math.nan), p.output)
    for p in reversed(points):
        found[p.name, "gradient"] = error_of(recorder.backward.get((p.name, "out"), math.nan), p.d_output)
    return found


def first_fault(found: Found) -> tuple[str, str, float] | None:
    """What is wrong first: on the way there, then on the way back."""
    back = {key: x for key, x in found.items() if key[1] == "gradient"}
    for (place, what), error in ({key: x for key, x in found.items() if key not in back} | back).items():
        if not error <= (0.0 if place in ("read_batch", "from_canonical") else FREE_ALLOWED):
            # the first gradient of all is that of the logits: what is wrong there is the loss, or the factor that it
            # has
            place = "loss_and_grads" if (place, what) == next(iter(back), None) else place
            return place, what, error
    return None


def merged(of_processes: list[Found]) -> Found:
    """The largest error of every point, in the order of the first process."""
    return {key: max(found.get(key, math.inf) for found in of_processes) for key in of_processes[0]}

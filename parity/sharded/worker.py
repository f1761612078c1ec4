"""One process of a group that runs cases on a mesh and writes down what comes out; started by `parity.sharded.sharded`.

python -m parity.sharded.worker '{"framework": "torch", "cases": [...], "out": "folder", "bug": null}'
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, Recipe
from llm_common.files.tensor_files import TensorFiles, write_tensors
from llm_common.processes import end_with_launcher
from llm_common.run.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from llm_common.run.folder import Run
from llm_common.run.host_memory import keep_freed_memory
from llm_common.run.hosts import Hosts
from llm_common.schedule import step_scalars
from llm_common.sharding import MeshConfig
from llm_common.tensors import Tensors
from parity.core.generated_dtypes import noted_dtypes
from parity.core.jaxprs import equations
from parity.core.planting import planted
from parity.sharded import mesh_cases as cases
from parity.sharded.sharded import find_bug

Results = dict[str, Any]


def run_jax(shape: str, mesh_config: MeshConfig, hosts: Hosts, folder: Path) -> Results:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jax_llm.engine import distributed
    from jax_llm.engine.backend import BACKEND
    from jax_llm.engine.checkpoint import to_canonical, to_host
    from jax_llm.engine.device import x64
    from jax_llm.engine.gradients import loss_and_grads
    from jax_llm.engine.plan import make_model

    case = cases.mesh_case(shape)
    recipe, weights, data, start = case.recipe, case.weights, case.data, case.start
    cfg = recipe.model
    with x64("float64"):
        mesh = distributed.make_mesh(mesh_config, hosts.device)
        first = distributed.init_state(recipe, mesh)
        params = distributed.from_canonical(cfg, weights, mesh)
        model = make_model(recipe, mesh.devices.flat[0].platform)
        inputs, targets = distributed.read_batch(data, start.step, cfg, train=recipe.train, mesh=mesh)
        apply = lambda params, inputs: model.apply({"params": params}, inputs)[0]
        logits = jax.jit(distributed.sharded(apply, mesh))(params, inputs)
        parts = recipe.execution.gradient_accumulation_steps
        whole = lambda params, inputs, targets: loss_and_grads(model, params, inputs, targets, parts)
        grad = distributed.sharded(whole, mesh)
        shardings = NamedSharding(mesh, PartitionSpec()), distributed.param_shardings(cfg, mesh)
        loss, grads = jax.jit(grad, out_shardings=shardings)(params, inputs, targets)
        state = distributed.from_training_state(cfg, recipe.optimizer, start, mesh, np.float64)
        steps: list[dict[str, float]] = []
        note = lambda step, state, metrics: steps.append(dict(metrics))
        state = distributed.fit(state, recipe, data, mesh, case.until, note)
        for leaf in jax.tree.leaves(state.params):
            same = {str(shard.index): set() for shard in leaf.addressable_shards}
            for shard in leaf.addressable_shards:
                same[str(shard.index)].add(_digest(np.asarray(shard.data)))
            assert all(len(digests) == 1 for digests in same.values()), "replicas differ"
        results = {
            "init": to_canonical(cfg, first.params),
            "logits": to_host(logits),
            "loss": float(loss),
            "gradients": to_canonical(cfg, grads),
            **_end_of(distributed.to_training_state(cfg, state), steps),
            "held out": distributed.evaluate(recipe, state.params, case.evaluation, mesh),
        }
        # what is not finite is not saved
        to_save = cases.meshes(mesh_config.size) if case.poison is None else []
        saved = folder
        if to_save:
            saved = save_checkpoint(folder, cfg, distributed.to_training_state(cfg, state), {}, hosts=hosts)
        for other in to_save:  # the checkpoint on every mesh of as many devices
            mesh = distributed.make_mesh(other, hosts.device)
            again = distributed.from_training_state(
                cfg, recipe.optimizer, load_checkpoint(saved, cfg)[1], mesh, np.float64
            )
            _compare(distributed.to_training_state(cfg, again), saved, f"{mesh_config} -> {other}")
    with distributed.generator(cfg, weights, mesh_config, hosts.device, "float64") as stream:
        results["texts"] = cases.texts(stream)
    results |= _through_folder(BACKEND, shape, mesh_config, hosts, folder / "run")
    if shape == "llama":
        results["other products"] = _other_products(cfg, distributed.make_mesh(mesh_config, hosts.device))
    return results | _generated_dtypes("jax_llm", distributed, shape, mesh_config, hosts)


def run_torch(shape: str, mesh_config: MeshConfig, hosts: Hosts, folder: Path) -> Results:
    import torch
    import torch.distributed as dist

    from torch_llm.engine import distributed
    from torch_llm.engine.backend import BACKEND

    case = cases.mesh_case(shape)
    recipe, weights, data, start = case.recipe, case.weights, case.data, case.start
    cfg = recipe.model
    first = distributed.ShardedTrainer(recipe, mesh_config, hosts.device)
    trainer = distributed.ShardedTrainer(recipe, mesh_config, hosts.device, init_weights=False)
    trainer.from_training_state(start)
    inputs, targets = trainer.read_batch(data)
    with torch.no_grad():
        rows = distributed.full_vocabulary(trainer.model(inputs))
    blocks = [torch.empty_like(rows) for _ in range(hosts.count)]
    dist.all_gather(blocks, rows.contiguous())
    logits = torch.cat(blocks[:: mesh_config.tensor]).cpu().numpy()
    loss = float(trainer.loss_and_grads(inputs, targets))
    grads = trainer.read(lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    _check_replicas(
        {f"{name} {first.shard_of(name)}": _digest(p.detach().cpu().numpy()) for name, p in first.parameters.items()},
        hosts,
    )
    results: Results = {
        "init": _all(first.to_training_state().weights),
        "logits": logits,
        "loss": loss,
        "gradients": _all(grads),
    }
    steps: list[dict[str, float]] = []
    trainer.fit(data, case.until, lambda step, _, metrics: steps.append(dict(metrics)))
    results |= _end_of(trainer.to_training_state(), steps)
    parts = {f"{name} {trainer.shard_of(name)}": p for name, p in trainer.parameters.items()}
    _check_replicas({key: _digest(p.detach().cpu().numpy()) for key, p in parts.items()}, hosts)
    results["held out"] = trainer.evaluate(case.evaluation)
    to_save = cases.meshes(mesh_config.size) if case.poison is None else []
    saved = folder
    if to_save:
        saved = save_checkpoint(folder, cfg, trainer.to_training_state(), {}, hosts=hosts)
    for other in to_save:
        again = distributed.ShardedTrainer(recipe, other, hosts.device, init_weights=False)
        again.from_training_state(load_checkpoint(saved, cfg)[1])
        _compare(again.to_training_state(), saved, f"{mesh_config} -> {other}")
    with distributed.generator(cfg, weights, mesh_config, hosts.device, "float64") as stream:
        results["texts"] = cases.texts(stream)
    results |= _generated_dtypes("torch_llm", distributed, shape, mesh_config, hosts)
    results |= _through_folder(BACKEND, shape, mesh_config, hosts, folder / "run")
    if mesh_config.batch_shards > 1:
        results["short sums"] = _short_sums(cfg, mesh_config, hosts.device)
    return results


def _through_folder(backend: Any, shape: str, mesh_config: MeshConfig, hosts: Hosts, folder: Path) -> Results:
    """The weights at the end of a run of files: from given weights, ended, and made longer from its checkpoint."""
    if shape != cases.THROUGH_FOLDER:
        return {}
    case, path, given = cases.mesh_case(shape), folder, folder.with_suffix(".safetensors")
    if hosts.index == 0:
        given.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(given, case.weights)
    hosts.gather(None)
    for recipe in cases.folder_recipes(case):
        initial = TensorFiles(given)
        run = Run(folder, recipe, case.data, backend.name, initial=initial, hosts=hosts)
        path = backend.fit_and_save(run, hosts.device, mesh_config)
    return {"folder": _all(load_checkpoint(path, case.cfg)[1].weights)}


def _generated_dtypes(package: str, distributed: Any, shape: str, mesh_config: MeshConfig, hosts: Hosts) -> Results:
    """How many tensors of a model that generates in bfloat16 have another dtype; of the plainest shape alone."""
    case = cases.mesh_case(shape)
    if shape != "llama":
        return {}
    arguments = case.cfg, case.weights, mesh_config, hosts.device, "bfloat16"
    with noted_dtypes(package, "bfloat16") as wrong, distributed.generator(*arguments) as stream:
        cases.texts(stream)
    return {"wide tensors": len(set(wrong))}


def trace(framework: str, shape: str, mesh_config: MeshConfig, hosts: Hosts, folder: Path) -> Results:
    """The first fault of a case, in words: place, what, error; nothing if there is none."""
    from parity.sharded.mesh_trace import first_fault, jax_faults, merged, torch_faults  # they need both frameworks

    case = cases.mesh_case(shape)
    if framework == "jax":
        from jax_llm.engine import distributed
        from jax_llm.engine.device import x64

        with x64("float64"):
            found = jax_faults(case, distributed.make_mesh(mesh_config, hosts.device))
    else:
        from torch_llm.engine.distributed import ShardedTrainer

        trainer = ShardedTrainer(case.recipe, mesh_config, hosts.device, init_weights=False)
        trainer.from_canonical(case.weights)
        trainer.step = case.start.step
        found = torch_faults(case, trainer, mesh_config, hosts)
    return {"fault": np.array([str(x) for x in first_fault(merged(hosts.gather(found))) or ()])}


def _end_of(state: TrainingState, steps: list[dict[str, float]]) -> Results:
    """The state at the end of a run, and what the metrics of every step said."""
    found: Results = {f"steps of {key}": np.array([float(s[key]) for s in steps]) for key in steps[0]}
    parts = {"weights": state.weights, "mu": state.mu, "nu": state.nu}
    return found | {key: _all(x) for key, x in parts.items()} | {"step": state.step, "adam_count": state.adam_count}


def _check_replicas(parts: dict[str, bytes], hosts: Hosts) -> None:
    """Raise unless all that keep the same part of a tensor, by its name and place, keep the same bits."""
    seen: dict[str, bytes] = {}
    for digests in hosts.gather({key: digest.hex() for key, digest in parts.items()}):
        for key, digest in digests.items():
            if seen.setdefault(key, digest) != digest:
                raise AssertionError(f"replicas differ: {key}")


def _digest(x: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).digest()


def _short_sums(cfg: ModelConfig, mesh_config: MeshConfig, device: str) -> float:
    """The share of the gradients of a bfloat16 run that are bfloat16 numbers: all, if the devices' are summed in
    bfloat16.
    """
    import torch

    from torch_llm.engine.distributed import ShardedTrainer

    train = dataclasses.replace(cases.TRAIN, compute_dtype="bfloat16")
    trainer = ShardedTrainer(Recipe(cfg, train, cases.OPT), mesh_config, device)
    trainer.loss_and_grads(*trainer.read_batch(cases.Batches(cfg, None)))
    grads = torch.cat([p.grad.reshape(-1) for p in trainer.parameters.values() if p.grad is not None])
    grads = grads[grads != 0]
    return (grads == grads.to(torch.bfloat16)).float().mean().item()


def _other_products(cfg: ModelConfig, mesh: Any) -> int:
    """How many matrix products of a bfloat16 step on a mesh have operands of another dtype than those of one device."""
    import jax
    import jax.numpy as jnp

    from jax_llm.engine import distributed
    from jax_llm.engine import train as single

    train = dataclasses.replace(cases.TRAIN, compute_dtype="bfloat16")
    recipe, platform = Recipe(cfg, train, cases.OPT), mesh.devices.flat[0].platform
    state = jax.eval_shape(lambda: single.init_state(recipe))
    batch = jax.ShapeDtypeStruct((train.batch_size, train.seq_len), jnp.int32)
    scalars = tuple(step_scalars(cases.OPT, 0, updates) for updates in (0, 1))

    def products(step: Any) -> Counter[str]:
        program = equations(jax.make_jaxpr(step)(state, batch, batch, scalars, 0).jaxpr)
        found = (x.invars for x in program if x.primitive.name == "dot_general")
        return Counter(" ".join(str(x.aval.dtype) for x in operands) for operands in found)

    one = products(single.compiled_train_step(recipe, platform))
    many = products(distributed.compiled_train_step(recipe, mesh))
    return sum(abs(many[dtypes] - one[dtypes]) for dtypes in one | many)


def _all(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in tensors.items()}


def _compare(state: TrainingState, saved: Path, what: str) -> None:
    """Raise unless a restored state is, bit for bit, the one that was saved."""
    _, expected, _ = load_checkpoint(saved)
    for part in ("weights", "mu", "nu"):
        for name, x in getattr(state, part).items():
            if not np.array_equal(x, getattr(expected, part)[name]):
                raise AssertionError(f"checkpoint {what}: {part} of {name} differs")


def as_written(framework: str, device: str) -> contextlib.AbstractContextManager[None]:
    """`without_compiler`, for torch alone: a process of JAX needs no torch."""
    if framework == "jax":
        return contextlib.nullcontext()
    from parity.sides.as_written import without_compiler

    return without_compiler(device)


def main() -> None:
    end_with_launcher()
    task = json.loads(sys.argv[1])
    keep_freed_memory()
    hosts = join(task["framework"], task["device"])
    run = run_jax if task["framework"] == "jax" else run_torch
    run = functools.partial(trace, task["framework"]) if task["trace"] else run
    out = Path(task["out"])
    bug = find_bug(task["bug"]) if task["bug"] else None
    with planted([bug.edit]) if bug else contextlib.nullcontext(), as_written(task["framework"], task["device"]):
        for number, (shape, mesh) in enumerate(task["cases"]):
            results = run(shape, MeshConfig.parse(mesh), hosts, out / f"run-{number}")
            if hosts.index == 0:
                np.savez(out / f"{number}.npz", **dict(flat(results)))
            hosts.gather(None)


def join(framework: str, device: str) -> Hosts:
    if framework == "jax":
        from jax_llm.engine.hosts import join_hosts

        return join_hosts(device, 60)
    import torch

    from torch_llm.engine.hosts import join_hosts

    torch.set_num_threads(1)
    return join_hosts(device, 60)


def flat(results: Results) -> Iterator[tuple[str, Any]]:
    """Results as arrays with one name each."""
    for key, value in results.items():
        if isinstance(value, dict):
            yield from ((f"{key}|{name}", x) for name, x in value.items())
        else:
            yield key, np.asarray(value)


if __name__ == "__main__":
    main()

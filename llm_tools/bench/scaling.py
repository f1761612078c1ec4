"""Steps on meshes of every size beside those of one device."""

import argparse
import json
import os
import sys
import time
from datetime import date
from typing import Any

import numpy as np

from llm_common.config import ExecutionConfig, ModelConfig, OptimizerConfig, Recipe, TrainConfig, preset
from llm_common.errors import UserError
from llm_common.run.estimates import GIB, flops_per_step
from llm_common.run.metrics import StepMetrics
from llm_common.sharding import ONE_DEVICE, MeshConfig
from llm_tools.bench.measure import RandomTokens, quartiles, run_json, versions
from llm_tools.flags import join, only_the_first_prints
from llm_tools.frameworks import open_backend


def recipe_of(args: argparse.Namespace, mesh: MeshConfig) -> Recipe:
    batch = args.batch_size * mesh.batch_shards
    train = TrainConfig(batch_size=batch, seq_len=args.seq_len, compute_dtype=args.compute_dtype)
    opt = OptimizerConfig(lr_max=1e-4, lr_min=1e-5, total_steps=args.steps + args.warm_up)  # stable without a warm-up
    return Recipe(preset(args.preset), train, opt, ExecutionConfig(remat=args.remat))


def run_case(args: argparse.Namespace, framework: str, mesh: MeshConfig | None) -> dict[str, Any]:
    """Measure a case in processes of its own; `mesh` None is one device without any machinery for several."""
    task = json.dumps({"framework": framework, "mesh": None if mesh is None else str(mesh)})
    environment = dict(os.environ)
    if mesh is None:
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        "framework": framework,
        "mesh": task,
        **run_json([sys.executable, *sys.argv, "--worker", task], environment),
    }


def measure(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Steps of one case, timed in this process, which is one of the processes of the mesh."""
    framework = task["framework"]
    mesh = None if task["mesh"] is None else MeshConfig.parse(task["mesh"])
    recipe = recipe_of(args, mesh or ONE_DEVICE)
    cfg, train = recipe.model, recipe.train
    data, times, losses = RandomTokens(cfg, train), [], []

    def note(step: int, _: Any, metrics: StepMetrics) -> None:
        """Called when the step before is done; this one is not waited for."""
        times.append(time.perf_counter())
        losses.append(metrics)

    backend, start = open_backend(framework), time.perf_counter()
    hosts = None if mesh is None else join(backend, args, mesh)
    device = args.device if hosts is None else hosts.device
    with backend.open_session(recipe, device, mesh) as session:
        session.fit(data, on_step=note)
    if hosts is not None:
        only_the_first_prints(hosts)
    seconds = np.diff(times)[args.warm_up - 1 :]
    return {
        "framework": framework,
        "mesh": task["mesh"],
        "device": backend.device_kind(device),
        "seconds": quartiles(seconds),
        "first_step": times[0] - start,
        "tokens": train.batch_size * train.seq_len,
        "flops": flops_per_step(cfg, train),
        "memory": backend.memory_used(device),
        "losses": [losses[0]["loss"], losses[-1]["loss"]],
        "versions": versions(framework, "numpy"),
        "settings": recipe.settings(),
    }


def line(args: argparse.Namespace, cfg: ModelConfig, results: list[dict[str, Any]], r: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in r:
        return f"| {r['framework']} | {r['mesh']} | failed: {r['error']} |"
    low, median, high = r["seconds"]
    devices = 1 if r["mesh"] is None else MeshConfig.parse(r["mesh"]).size
    base = next((x for x in results if x["framework"] == r["framework"] and x.get("mesh") is None), None)
    speed = r["tokens"] / median
    efficiency = ""
    if base is not None and "error" not in base:
        efficiency = f"{speed / devices / (base['tokens'] / base['seconds'][1]):.3f}"
    return (
        f"| {r['framework']} | {r['mesh'] or 'one device'} | {1e3 * median:.1f} ({1e3 * low:.1f} to "
        f"{1e3 * high:.1f}) | {speed:,.0f} "
        f"| {r['flops'] / median / devices / 1e12:.0f} | {efficiency} | {r['memory'] / GIB:.1f} | "
        f"{r['first_step']:.0f} "
        f"| {r['losses'][0]:.4f} to {r['losses'][1]:.4f} |"
    )


def table(args: argparse.Namespace, cfg: ModelConfig, results: list[dict[str, Any]]) -> str:
    good = [r for r in results if "error" not in r]
    if not good:
        raise UserError("every case failed: " + "; ".join(r["error"] for r in results))
    versions = {name: x for r in good for name, x in r["versions"].items()}
    rows = "\n".join(line(args, cfg, results, r) for r in results)
    return f"""# Several devices against one

{args.preset}: {cfg.num_parameters():,} parameters, {args.compute_dtype}, {args.batch_size} x {args.seq_len} tokens on each device, remat {args.remat}.
{args.steps} steps after {args.warm_up}; median and quartiles of a step. Efficiency: tokens per second over the number of devices times those of one
device, which runs without any machinery for several. The losses show that it learns the same.

| framework | mesh | ms a step | tokens/s | TFLOP/s a device | efficiency | GiB a device | s to the first step | loss |
|---|---|---|---|---|---|---|---|---|
{rows}

{date.today()}, {good[0]["device"]}; {", ".join(f"{name} {x}" for name, x in sorted(versions.items()))}. Made by `scripts/scaling.py`.
"""

"""How much faster several devices are than one: training steps of both frameworks on meshes against one device, as a
table.

    python scripts/scaling.py --device gpu --preset 1b --batch-size 8 --seq-len 2048 --mesh data=2 --mesh fsdp=2 --out docs/scaling.md

Every mesh gets the batch of one device times its number of devices along data and fsdp. The efficiency is the tokens
per second over those of one device times the number of devices. Each case runs in processes of its own, one case after
the other.
"""

import argparse
import json
import os
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ExecutionConfig, ModelConfig, OptimizerConfig, Recipe, TrainConfig, preset
from llm_common.errors import UserError, run_main
from llm_common.processes import end_with_launcher
from llm_common.run.estimates import GIB, flops_per_step
from llm_common.run.metrics import StepMetrics
from llm_common.sharding import ONE_DEVICE, MeshConfig, check_sharded
from llm_tools.bench.measure import RandomTokens, quartiles, run_json, versions
from llm_tools.flags import join, make_parser, only_the_first_prints, prepare_environment
from llm_tools.frameworks import open_backend


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences on each device")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--compute-dtype", default="bfloat16")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--framework", action="append", choices=["jax", "torch"], help="default: both")
    parser.add_argument("--mesh", action="append", default=[], help="may be given several times")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("--join-timeout", type=float, default=300, help="seconds to wait for the other processes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare_environment(None)
    if args.worker is not None:
        end_with_launcher()
        print(json.dumps(measure(args, json.loads(args.worker))), flush=True)
        return
    cfg, results = preset(args.preset), []
    meshes = [MeshConfig.parse(text) for text in args.mesh]
    for mesh in meshes:
        check_sharded(mesh, recipe_of(args, mesh))
    for framework in args.framework or ["jax", "torch"]:
        for mesh in (None, *meshes):
            results.append(run_case(args, framework, mesh))
            print(line(args, cfg, results, results[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(table(args, cfg, results), encoding="utf-8")


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


if __name__ == "__main__":
    run_main(main)

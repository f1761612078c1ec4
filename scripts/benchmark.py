"""How fast both frameworks train and decode, as shares of what the device itself reaches, beside other libraries.

    python scripts/benchmark.py train --preset 1b --batch-size 16 --seq-len 2048 --peer transformers --out runs/benchmark
    python scripts/benchmark.py decode --preset 1b --batch-size 1 --batch-size 32 --peer transformers
    python scripts/benchmark.py train --preset demo --compute-dtype float32 --device cpu --peer transformers
    python scripts/benchmark.py train --preset 1b --framework torch --profile runs/profile
    python scripts/benchmark.py startup --preset 1b

Every case runs in a process of its own, one after the other; the ceilings (a large matrix product, a large copy) are measured
before and after them. Training: model FLOPs of our own counter over the first ceiling. Decoding: the bytes that a step must read,
weights and cache, over the second. --out writes PREFIX.md, PREFIX.json and PREFIX.png.
"""

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from flags import add_flags, from_flags, make_parser, prepare_environment
from measure import RandomTokens, ceilings, profiled, quartiles, run_worker, top_kernels, versions
from peers import find_peer

from llm_common.budget import GIB, decode_bytes, flops_per_step
from llm_common.config import PRESETS, ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig, preset
from llm_common.errors import import_side, run_main

OURS = ("jax", "torch")
WHAT = ("train", "decode", "startup", "attention", "input")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--framework", choices=[*OURS, "both", "none"], default="both")
    parser.add_argument("--peer", action="append", default=[], help="transformers, transformers+liger, or a file")
    parser.add_argument("--preset", default="demo", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="a config.json instead of a preset")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    parser.add_argument("--groups", type=int, default=5, help="groups of steps, each timed as a whole")
    parser.add_argument("--steps", type=int, default=4, help="steps of a group")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first group; the first compiles")
    parser.add_argument("--batch", type=int, action="append", help="decode: texts at once; may be given several times")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="leave a trace there and print the top kernels")
    parser.add_argument("--cache-dir", type=Path, help="of compiled programs")
    parser.add_argument("--out", type=Path, metavar="PREFIX", help="of a .md, a .json and a .png file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_flags(parser, TrainConfig, "training")
    args = parser.parse_args()
    prepare_environment(args.cache_dir)
    if args.worker is not None:
        print(json.dumps(work(args, json.loads(args.worker))), flush=True)
        return
    for name in args.peer:
        find_peer(name)
    cases = list_cases(args)
    results = []
    before = run_worker({"what": "ceilings"})
    for case in cases:
        results.append(run_worker(case))
        print(describe(results[-1], before), flush=True)
    after = run_worker({"what": "ceilings"})
    report = summary(args, before, after, results)
    print(report)
    if args.out is not None:
        write(args.out, report, {"ceilings": [before, after], "cases": results, "date": date.today().isoformat()})


def list_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    sides = {"both": list(OURS), "none": []}.get(args.framework, [args.framework])
    batches = args.batch or [1, 32]
    if args.what == "decode":
        return [{"what": "decode", "side": side, "batch": b} for side in sides + args.peer for b in batches]
    if args.what == "startup":
        return [{"what": "startup", "side": side, "warm": warm} for side in sides for warm in (False, True)]
    return [{"what": args.what, "side": side} for side in (sides if args.what == "attention" else sides + args.peer)]


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_file(args.model_config) if args.model_config else preset(args.preset)


# --- what a worker does


def work(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    result = WORK[task["what"]](args, task)
    return {**{key: x for key, x in task.items() if key != "started"}, **result}


def measure_ceilings(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    side = import_side("torch", "train")
    return {**ceilings(args.device, args.compute_dtype), "device": side.device_kind(args.device)}


class Clock:
    """Called after every step with the loss, which it reads only at the borders of groups, so that a step is not waited for."""

    def __init__(self, args: argparse.Namespace, started: float) -> None:
        self.args, self.started = args, started
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.first_step = 0.0
        self.total = args.warm_up + args.groups * args.steps
        self._last = 0.0

    def __call__(self, step: int, loss: Any) -> None:
        timed = step - self.args.warm_up
        if step == 1 or (timed >= 0 and timed % self.args.steps == 0):
            self.losses.append(float(loss))
            now = time.perf_counter()
            if step == 1:
                self.first_step = time.time() - self.started
            if timed > 0:
                self.seconds.append((now - self._last) / self.args.steps)
            self._last = now


def measure_train(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    cfg, train, clock = model_config(args), from_flags(TrainConfig, args), Clock(args, task["started"])
    opt = OptimizerConfig(lr_max=1e-4, lr_min=1e-5, total_steps=clock.total)  # stable without a warm-up
    data, name = RandomTokens(cfg, train), task["side"]
    side = import_side(name if name in OURS else "torch", "train")
    folder = None if args.profile is None else args.profile / name
    note = lambda step, _, metrics: clock(step, metrics["loss"])
    if name == "torch":
        trainer = side.Trainer(cfg, train, opt, side.select_device(args.device))
        steps = lambda n: trainer.fit(data, trainer.step + n, note)
    elif name == "jax":
        import jax

        jax.config.update("jax_default_device", side.select_device(args.device))
        states = [side.init_state(cfg, train, opt)]

        def steps(n: int) -> None:
            state = states.pop()
            states.append(side.fit(state, cfg, train, opt, data, int(state.step) + n, note))

    else:
        step, done = find_peer(name).train(cfg, train, opt, side.select_device(args.device)), [0]

        def steps(n: int) -> None:
            for _ in range(n):
                loss = step(*data.batch(done[0]))
                done[0] += 1
                clock(done[0], loss)

    steps(clock.total)
    memory = side.memory_used(args.device)
    if folder is not None:
        with profiled("jax" if name == "jax" else "torch", folder):
            steps(3)
    return {
        "seconds": quartiles(clock.seconds),
        "first_step": clock.first_step,
        "losses": [clock.losses[0], clock.losses[clock.total // args.steps - 1 if folder else -1]],
        "tokens": train.batch_size * train.seq_len,
        "flops": flops_per_step(cfg, train),
        "memory": memory,
        "kernels": [] if folder is None else top_kernels(folder, 3),
        "settings": asdict(train),
        "uses": side.describe(cfg, train, args.device) if name in OURS else name,
        "versions": versions("jax" if name == "jax" else "torch", *([] if name in OURS else ["transformers"])),
    }


def measure_decode(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    cfg, name, b, n = model_config(args), task["side"], task["batch"], args.new_tokens
    side = import_side(name if name in OURS else "torch", "train")
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (b, args.prompt_length))
    sampling, seconds, prefill, started = SamplingConfig(args.temperature), [], [], time.perf_counter()
    folder = None if args.profile is None else args.profile / f"{name}-{b}"

    def measure(stream: Any) -> list[float]:
        """The times of the first ids and of the last."""
        start, times = time.perf_counter(), []
        for _ in stream():
            times.append(time.perf_counter() - start)
        return times

    if name in OURS:
        with open_generator(args, name, cfg) as generate:
            stream = lambda n=n: generate(prompts.tolist(), n, sampling)
            run(stream, measure, args, seconds, prefill, n)
            if folder is not None:
                with profiled(name, folder):
                    measure(lambda: stream(33))
    else:
        decode = find_peer(name).decode(cfg, args.compute_dtype, side.select_device(args.device))

        def stream(n: int = n) -> Any:  # the first new token alone, then all of them
            yield decode(prompts, 1)
            yield decode(prompts, n)

        run(stream, measure, args, seconds, prefill, n - 1, whole=True)
    context = args.prompt_length + n / 2
    return {
        "seconds": quartiles(seconds),
        "prefill": float(np.median(prefill)),
        "compile": seconds_to_compile(started, seconds, n),
        "bytes": decode_bytes(cfg, b, context, args.compute_dtype),
        "memory": side.memory_used(args.device),
        "kernels": [] if folder is None else top_kernels(folder, 33),
        "versions": versions("jax" if name == "jax" else "torch", *([] if name in OURS else ["transformers"])),
    }


def run(stream: Any, measure: Any, args: argparse.Namespace, seconds: list, prefill: list, n: int, whole=False) -> None:
    """Fill in the seconds of a step and of the first token: one round to warm up, then some more."""
    for i in range(1 + args.groups):
        times = measure(stream)
        if i == 0:
            continue
        prefill.append(times[0])
        last = times[-1] - times[0]
        seconds.append((last - times[0]) / n if whole else last / (n - 1))


def seconds_to_compile(started: float, seconds: list[float], n: int) -> float:
    """What the first round took beyond the others."""
    return max(0.0, time.perf_counter() - started - (len(seconds) + 1) * float(np.median(seconds)) * n)


@contextlib.contextmanager
def open_generator(args: argparse.Namespace, name: str, cfg: ModelConfig) -> Iterator[Callable[..., Any]]:
    """`generate_stream` with initial weights made on the device: those of a file would take a minute to come there."""
    side, generate = import_side(name, "train"), import_side(name, "generate")
    model, target = import_side(name, "model"), side.select_device(args.device)
    with side.matmul_precision(args.compute_dtype):
        if name == "torch":
            import torch

            backend = import_side(name, "attention").resolve_backend("auto", target.type, args.compute_dtype)
            made = model.init_model(cfg, 0, backend, getattr(torch, args.compute_dtype), target).requires_grad_(False)
            programs = generate.Programs(args.compile == "on") if target.type == "cuda" else None
            yield functools.partial(generate.generate_stream, made, programs=programs)
            return
        import jax

        with jax.default_device(target):
            resolve = import_side(name, "attention").resolve_backend
            backend = resolve("auto", target.platform, args.compute_dtype, cfg, seq_len=0)
            make = lambda: side.unstack(side.cast(model.init_params(cfg, 0), args.compute_dtype), cfg.num_hidden_layers)
            yield functools.partial(generate.generate_stream, model.CausalLM(cfg, backend=backend), jax.jit(make)())


def measure_startup(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    raise NotImplementedError


WORK = {"ceilings": measure_ceilings, "train": measure_train, "decode": measure_decode, "startup": measure_startup}


# --- tables


def describe(r: dict[str, Any], ceiling: dict[str, float]) -> str:
    """A row of the table."""
    if "error" in r:
        return f"| {r.get('side')} | failed: {r['error']} |"
    low, median, high = (1e3 * x for x in r["seconds"])
    spread = f"{median:.2f} ({low:.2f} to {high:.2f})" if median < 20 else f"{median:.1f} ({low:.1f} to {high:.1f})"
    if r["what"] == "train":
        return (
            f"| {r['side']} | {spread} | {1e3 * r['tokens'] / median:,.0f} | {1e-9 * r['flops'] / median:.0f} "
            f"| {1e3 * r['flops'] / median / ceiling['flops']:.3f} | {r['memory'] / GIB:.1f} | {r['first_step']:.0f} "
            f"| {r['losses'][0]:.4f} to {r['losses'][1]:.4f} |"
        )
    return (
        f"| {r['side']} | {r['batch']} | {spread} | {1e3 * r['batch'] / median:,.0f} "
        f"| {1e3 * r['bytes'] / median / ceiling['bytes']:.3f} | {1e3 * r['prefill']:.1f} | {r['memory'] / GIB:.1f} "
        f"| {r['compile']:.0f} |"
    )


HEADERS = {
    "train": "| | ms a step | tokens/s | TFLOP/s | of the ceiling | GiB | s from start to first step | loss |",
    "decode": "| | texts | ms a token | tokens/s | of the memory bound | ms to the first token | GiB | s to compile |",
}


def summary(args: argparse.Namespace, before: dict, after: dict, results: list[dict[str, Any]]) -> str:
    header = HEADERS[args.what]
    good = [r for r in results if "error" not in r]
    installed = {name: x for r in good for name, x in r["versions"].items()}
    lines = [
        f"{args.model_config or args.preset}, {args.compute_dtype}, {before.get('device')}, {date.today()}; "
        + ", ".join(f"{name} {x}" for name, x in sorted(installed.items())),
        "",
        f"Ceilings before and after: {before['flops'] / 1e12:.0f} and {after['flops'] / 1e12:.0f} TFLOP/s, "
        f"{before['bytes'] / 1e12:.2f} and {after['bytes'] / 1e12:.2f} TB/s.",
        "",
        header,
        "|" + "---|" * (header.count("|") - 1),
        *[describe(r, before) for r in results],
    ]
    for r in good:
        if r.get("kernels"):
            lines += ["", f"Kernels of {r['side']}, milliseconds and calls a step:", ""]
            lines += [
                f"{k['ms']:9.3f} {k['calls']:7.1f} {100 * k['share']:5.1f} %  {k['name'][:110]}" for k in r["kernels"]
            ]
    return "\n".join(lines)


def write(prefix: Path, report: str, content: dict[str, Any]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    prefix.with_suffix(".md").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)

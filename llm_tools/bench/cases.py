"""The cases of `benchmark.py`: what is measured in a process of its own. Each gets the flags and a task, and returns a
row.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig, Recipe, SamplingConfig, preset
from llm_common.data.datasets import TokenDataset
from llm_common.run.estimates import attention_flops, decode_bytes, flops_per_step
from llm_tools.bench.measure import RandomTokens, ceilings, profiled, quartiles, top_kernels, versions
from llm_tools.bench.peers import find_peer
from llm_tools.bench.tokenizer_cases import measure_tokenizer
from llm_tools.flags import keep_memory_of_a_small_step, recipe_from_flags
from llm_tools.frameworks import FRAMEWORKS, open_backend


def model_config(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_file(args.model_config) if args.model_config else preset(args.preset)


def recipe_of(args: argparse.Namespace, optimizer: OptimizerConfig | None = None) -> Recipe:
    return recipe_from_flags(args, model_config(args), optimizer)


def work(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    result = WORK[task["what"]](args, task)
    return {**{key: x for key, x in task.items() if key != "started"}, **result}


def measure_ceilings(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    kind = open_backend("torch").device_kind(args.device)
    return {**ceilings(args.device, args.compute_dtype), "device": kind}


def packages(name: str) -> list[str]:
    """What a side or a peer runs on, for the table."""
    needed = name if name in FRAMEWORKS else getattr(find_peer(name), "packages", ("torch",))
    return [needed] if isinstance(needed, str) else list(needed)


class Clock:
    """Called after every step with the loss, which it reads only at the borders of groups, so that a step is not waited
    for.
    """

    def __init__(self, args: argparse.Namespace, started: float) -> None:
        self.args, self.started = args, started
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.first_step = 0.0
        self.total = args.warm_up + args.groups * args.steps
        self._last = 0.0

    def __call__(self, step: int, read_loss: Callable[[], Any]) -> None:
        timed = step - self.args.warm_up
        if step == 1 or (timed >= 0 and timed % self.args.steps == 0):
            self.losses.append(float(read_loss()))
            now = time.perf_counter()
            if step == 1:
                self.first_step = time.time() - self.started
            if timed > 0:
                self.seconds.append((now - self._last) / self.args.steps)
            self._last = now


def measure_train(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    clock, name = Clock(args, task["started"]), task["side"]
    # stable without a warm-up
    recipe = recipe_of(args, OptimizerConfig(lr_max=1e-4, lr_min=1e-5, total_steps=clock.total))
    cfg, train = recipe.model, recipe.train
    data = RandomTokens(cfg, train)
    keep_memory_of_a_small_step(args.device, recipe)
    backend = open_backend(name if name in FRAMEWORKS else "torch")
    folder = None if args.profile is None else args.profile / Path(name).stem
    note = lambda step, _, metrics: clock(step, lambda: metrics["loss"])
    with contextlib.ExitStack() as stack:
        if name in FRAMEWORKS:
            session = stack.enter_context(backend.open_session(recipe, args.device, None))
            steps = lambda n: session.fit(data, session.step + n, note)
        else:
            steps = peer_steps(name, recipe, args, data, clock)
        steps(clock.total)
        last, memory = clock.losses[-1], backend.memory_used(args.device)
        if folder is not None:
            with profiled("jax" if name == "jax" else "torch", folder):
                steps(3)
    return {
        "seconds": quartiles(clock.seconds or [0.0]),
        "first_step": clock.first_step,
        "losses": [clock.losses[0], last],
        "tokens": train.batch_size * train.seq_len,
        "flops": flops_per_step(cfg, train),
        "memory": memory,
        "kernels": [] if folder is None else top_kernels(folder, 3),
        "settings": recipe.settings(),
        "uses": str(backend.plan_run(recipe, args.device)) if name in FRAMEWORKS else name,
        "versions": versions(*packages(name)),
    }


def peer_steps(
    name: str,
    recipe: Recipe,
    args: argparse.Namespace,
    data: Any,
    clock: Any,
) -> Callable[[int], None]:
    """A function that makes n more steps of a peer."""
    from torch_llm.engine.device import select_device

    step, done = find_peer(name).train(recipe, select_device(args.device)), itertools.count()

    def steps(n: int) -> None:
        for number in itertools.islice(done, n):
            loss = step(*data.batch(number))
            clock(number + 1, lambda loss=loss: loss)

    return steps


def measure_decode(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    cfg, name, b, n = model_config(args), task["side"], task["batch"], args.new_tokens
    backend = open_backend(name if name in FRAMEWORKS else "torch")
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (b, args.prompt_length))
    sampling, started = SamplingConfig(args.temperature), time.perf_counter()
    folder = None if args.profile is None else args.profile / f"{Path(name).stem}-{b}"

    def measure(stream: Any) -> list[float]:
        """The times of the first ids and of the last."""
        start, times = time.perf_counter(), []
        for _ in stream():
            times.append(time.perf_counter() - start)
        return times

    if name in FRAMEWORKS:
        with backend.generate_from_seed(cfg, args.device, args.compute_dtype, args.compile) as generate:
            stream = lambda n=n: generate(prompts.tolist(), n, sampling)
            timing = run(stream, measure, args, n, started)
            if folder is not None:
                with profiled(name, folder):
                    measure(stream)
    else:
        from torch_llm.engine.device import select_device

        decode = find_peer(name).decode(cfg, args.compute_dtype, select_device(args.device))

        def stream(n: int = n) -> Any:  # the first new token alone, then all of them
            yield decode(prompts, 1)
            yield decode(prompts, n)

        timing = run(stream, measure, args, n - 1, started, whole=True)
        if folder is not None:
            with profiled("torch", folder):
                decode(prompts, n)
    context = args.prompt_length + n / 2
    return {
        **timing,
        "bytes": decode_bytes(cfg, b, context, args.compute_dtype),
        "memory": backend.memory_used(args.device),
        "kernels": [] if folder is None else top_kernels(folder, n),
        "versions": versions(*packages(name)),
    }


def run(
    stream: Any, measure: Any, args: argparse.Namespace, n: int, started: float, whole: bool = False
) -> dict[str, Any]:
    """Seconds of a step, of the first token, and of compiling, by which the first round took longer than the others."""
    first, rounds, prefill, seconds = 0.0, [], [], []
    for i in range(1 + args.groups):
        times = measure(stream)
        if i == 0:
            first = time.perf_counter()
            continue
        rounds.append(times[-1])
        prefill.append(times[0])
        last = times[-1] - times[0]
        seconds.append((last - times[0]) / n if whole else last / (n - 1))
    compiling = max(0.0, first - started - float(np.median(rounds)))
    return {"seconds": quartiles(seconds), "prefill": float(np.median(prefill)), "compile": compiling}


def measure_startup(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """From the start of a process to the end of its first step, with the cache of compiled programs as it is found."""
    args.warm_up, args.groups = 1, 0
    result = measure_train(args, task)
    return {**result, "seconds": [result["first_step"]] * 3}


def measure_attention(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Attention alone, forward and backward, of one layer and the whole batch."""
    recipe, name, backend = recipe_of(args), task["side"], task["backend"]
    cfg, train = recipe.model, recipe.train
    b, t, n, kv_heads, h = (
        train.batch_size,
        train.seq_len,
        cfg.num_attention_heads,
        cfg.num_key_value_heads,
        cfg.head_dim,
    )
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((b, t, heads, h)).astype(np.float32) for heads in (n, kv_heads, kv_heads)]
    if name == "jax":
        import jax
        import jax.numpy as jnp

        from jax_llm.engine.device import matmul_precision, select_device
        from jax_llm.fast.attention import attention_kernel

        attention, target = attention_kernel(backend), select_device(args.device)
        q, k, v = (jax.device_put(jnp.array(x, train.compute_dtype), target) for x in arrays)
        loss = lambda *qkv: (attention(*qkv, None) * qkv[0]).sum()
        step = jax.jit(jax.grad(loss, (0, 1, 2)))
        once = lambda: jax.block_until_ready([step(q, k, v) for _ in range(args.steps)])
    else:
        import torch

        from torch_llm.engine.device import matmul_precision, select_device
        from torch_llm.fast.attention import attention_kernel

        attention, target = attention_kernel(backend), select_device(args.device)
        q, k, v = (torch.tensor(x, device=target).to(getattr(torch, train.compute_dtype)) for x in arrays)
        q, k, v = (x.requires_grad_() for x in (q, k, v))

        def once() -> None:
            for _ in range(args.steps):
                out = attention(q, k, v, None)
                torch.autograd.grad(out, (q, k, v), q.detach())
            if target.type == "cuda":
                torch.cuda.synchronize()

    seconds = []
    with matmul_precision(train.compute_dtype):
        for _ in range(2 + args.groups):
            start = time.perf_counter()
            once()
            seconds.append((time.perf_counter() - start) / args.steps)
    flops = attention_flops(replace(cfg, num_hidden_layers=1), train)
    return {"seconds": quartiles(seconds[2:]), "flops": flops, "versions": versions(name)}


def measure_input(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Batches as a run reads them, from a file of random tokens."""
    recipe = recipe_of(args)
    cfg, train = recipe.model, recipe.train
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        np.save(path, np.random.default_rng(0).integers(0, min(cfg.vocab_size, 65_536), 20_000_000).astype(np.uint16))
        data = TokenDataset(path, train.seq_len, train.batch_size, 0, cfg.vocab_size)
        seconds = []
        for group in range(1 + args.groups):
            start = time.perf_counter()
            for step in range(50):
                data.batch(50 * group + step)
            seconds.append((time.perf_counter() - start) / 50)
    return {
        "seconds": quartiles(seconds[1:]),
        "tokens": train.batch_size * train.seq_len,
        "versions": versions("numpy"),
    }


WORK = {
    "ceilings": measure_ceilings,
    "train": measure_train,
    "decode": measure_decode,
    "startup": measure_startup,
    "attention": measure_attention,
    "input": measure_input,
    "tokenizer": measure_tokenizer,
}

"""Training on many devices against training on one, in float64: the same logits, gradients, updates, texts and files.

Each case is a mesh. The processes of a group run several cases one after the other (`parity.sharded_worker`); what comes out is
compared here with the specification.
"""

import dataclasses
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.checkpoint import load_checkpoint
from llm_common.config import ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig
from llm_common.data import host_rows
from llm_common.errors import UserError
from llm_common.evaluation import Evaluation
from llm_common.processes import lifeline
from llm_common.sharding import MeshConfig
from llm_common.tensors import Tensors
from parity import spec, spec_run
from parity.cases import random_batch, random_weights
from parity.catalogue.sharding import SHARDING_BUGS, ShardingBug
from parity.compare import Row, tensor_errors

BASE = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
)
SHAPES = {
    "llama": BASE,
    "tied": dataclasses.replace(BASE, tie_word_embeddings=True),
    "qwen2": dataclasses.replace(BASE, model_type="qwen2"),
    "qwen3": dataclasses.replace(BASE, model_type="qwen3"),
    "documents": BASE,  # that do not see each other
}
SEPARATOR = 3
STEPS, SEED = 10, 5
TRAIN = TrainConfig(compute_dtype="float64", batch_size=16, seq_len=13, seed=SEED, gradient_accumulation_steps=2)
OPT = OptimizerConfig(lr_max=1e-3, total_steps=STEPS, max_grad_norm=0.05)  # far below the norm: the clip is active
EVALUATION = Evaluation(np.random.default_rng(SEED).integers(0, BASE.vocab_size, 300), TRAIN.seq_len, TRAIN.batch_size)
NEW_TOKENS, DRAWN = 6, SamplingConfig(seed=SEED)
PROMPTS = ([5, 7, 11], [2], [9, 9, 1, 4])


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
        ),
    ),
)
QUICK = (
    Group("jax", 1, 8, (("qwen3", "data=2,fsdp=2,tensor=2"), ("documents", "fsdp=4,tensor=2"))),
    Group("torch", 4, 1, (("qwen2", "fsdp=2,tensor=2"), ("tied", "data=2,fsdp=2"), ("documents", "fsdp=2,tensor=2"))),
)


PLAIN = (("llama", "data=2"), ("tied", "fsdp=2"), ("qwen2", "tensor=2"), ("qwen3", "fsdp=2"), ("documents", "data=2"))
TWO_GPUS = (Group("jax", 1, 2, PLAIN), Group("torch", 2, 1, PLAIN))


def train_of(shape: str) -> TrainConfig:
    return dataclasses.replace(TRAIN, document_separator=SEPARATOR if shape == "documents" else None)


def weights_of(cfg: ModelConfig) -> Tensors:
    return random_weights(cfg, SEED)


class Batches:
    """A dataset whose rows count very different numbers of targets: a mean of the devices' means would be another loss."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = cfg

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = random_batch(self.cfg, SEED + step, TRAIN.batch_size, TRAIN.seq_len)
        for row in range(TRAIN.batch_size):
            targets[row, : 1 + row * 11 // 15] = -100
            inputs[row, [row % 7, 9]] = SEPARATOR
        first = step * TRAIN.batch_size
        rows = [number - first for number in host_rows(step, TRAIN.batch_size, host, n_hosts)]
        return inputs[rows].astype(np.int32), targets[rows].astype(np.int32)

    def fingerprint(self) -> dict[str, Any]:
        return {}


def meshes(devices: int) -> list[MeshConfig]:
    """The plain meshes of some devices, to which a checkpoint is brought."""
    return [MeshConfig(data=devices), MeshConfig(fsdp=devices), MeshConfig(data=devices // 2, tensor=2)]


def texts(stream: Callable[..., Iterator[list[list[int]]]]) -> list[int]:
    """The new ids of all prompts in a row, first greedy, then drawn."""
    ids: list[int] = []
    for sampling in (SamplingConfig(temperature=0), DRAWN):
        words: list[list[int]] = [[] for _ in PROMPTS]
        for new in stream(PROMPTS, NEW_TOKENS, sampling):
            words = [text + more for text, more in zip(words, new, strict=True)]
        ids += itertools.chain(*words)
    return ids


# --- what must come out


@dataclasses.dataclass
class Expected:
    """What the specification, which knows no devices, gives for a shape."""

    init: Tensors
    logits: np.ndarray
    loss: float
    gradients: Tensors
    losses: list[float]
    update: Tensors  # of all steps together
    held_out: tuple[float, int]
    texts: list[int]


@functools.cache
def expected(shape: str) -> Expected:
    cfg, data, separator = SHAPES[shape], Batches(SHAPES[shape]), train_of(shape).document_separator
    weights = weights_of(cfg)
    shapes = spec.weight_shapes(cfg)
    init = {
        name: spec.initial_weight(SEED, i, name, size, cfg.num_hidden_layers)
        for i, (name, size) in enumerate(shapes.items())
    }
    inputs, targets = data.batch(0)
    logits, _ = spec.forward(weights, inputs, cfg, separator=separator)
    loss, gradients = spec.loss_and_grads(weights, inputs, targets, cfg, separator=separator)
    zero = {name: np.zeros(x.shape) for name, x in weights.items()}
    state, losses = (weights, zero, zero, 0, 0), []
    for step in range(STEPS):
        state, step_loss, _ = spec_run.train_step(*state, *data.batch(step), cfg, OPT, separator)
        losses.append(step_loss)
    update = {name: x - weights[name] for name, x in state[0].items()}
    total, count = 0.0, 0
    for ids, wanted in EVALUATION.batches():
        n = int((wanted != -100).sum())
        logits_there, _ = spec.forward(state[0], ids, cfg, separator=separator)
        total, count = total + n * spec.cross_entropy(logits_there, wanted), count + n
    words: list[int] = []
    for sampling in (SamplingConfig(temperature=0), DRAWN):
        words += itertools.chain(*spec.generate(weights, PROMPTS, cfg, sampling, NEW_TOKENS))
    return Expected(init, logits, loss, gradients, losses, update, (total, count), words)


def compare(group: Group, shape: str, mesh: str, got: dict[str, Any], folder: Path) -> Iterator[Row]:
    """The rows of a case. Bounds are those of one device (rule 1 of the design): sums over devices are sums in another order."""
    want, weights = expected(shape), weights_of(SHAPES[shape])
    _, end, _ = load_checkpoint(folder)
    parts: dict[str, dict[str, np.ndarray]] = {"init": {}, "gradients": {}}
    for key, x in got.items():
        part, _, tensor = key.partition("|")
        if tensor:
            parts[part][tensor] = x
    check, side = f"{group.framework} {mesh}", "JAX" if group.framework == "jax" else group.framework
    name = f"{shape}, {group.processes} process" + ("es" if group.processes > 1 else "")

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
    yield row("loss of uneven rows", abs(float(got["loss"]) - want.loss) / want.loss, 1e-12)
    yield worst("gradients", parts["gradients"], want.gradients, 1e-12)
    yield row(f"losses of {STEPS} steps", float(np.abs(got["losses"] - want.losses).max()), 1e-11)
    update = {tensor: x - weights[tensor] for tensor, x in end.weights.items()}
    yield worst(f"update of {STEPS} steps, clipped", update, want.update, 1e-10)
    total, count = got["held out"]
    yield row("held-out loss", abs(total - want.held_out[0]) / want.held_out[0] + abs(count - want.held_out[1]), 1e-11)
    if "short sums" in got:
        # The sum of two 8-bit numbers of one exponent fits in 8 bits when its last bit is 0: one in two, and fewer of other
        # exponents or of more numbers. Summed in bfloat16 all of them do: the bound lies halfway.
        short = row("gradients of 8 bits in a bfloat16 run", float(got["short sums"]), 0.75)
        yield dataclasses.replace(short, dtype="bfloat16")
    yield row("tokens of texts that differ", int((got["texts"] != np.array(want.texts)).sum()), 0)


# --- groups of processes


def run_group(group: Group, bug: str | None = None, device: str = "cpu") -> list[Row]:
    """Run a group's cases on the devices of a kind, "cpu" or "gpu". Raises UserError with the process's own words if one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        task = json.dumps(
            {"framework": group.framework, "cases": group.cases, "out": folder, "bug": bug, "device": device}
        )
        command, port = [sys.executable, "-m", "parity.sharded_worker", task], free_port()
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
                text = next((x for x in outputs if "Error" in x), output)
                raise UserError(f"{group}: {text.strip().splitlines()[-1] if text.strip() else process.returncode}")
        rows: list[Row] = []
        for i, (shape, mesh) in enumerate(group.cases):
            (saved,) = (Path(folder) / f"run-{i}").iterdir()
            with np.load(Path(folder) / f"{i}.npz") as got:
                rows += compare(group, shape, mesh, dict(got), saved)
        return rows


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
        flags = f"--xla_force_host_platform_device_count={group.devices}"
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
    """Whether the expected row is the first to go red under a bug, and which one that was."""
    group = Group(bug.framework, bug.processes, bug.devices, ((bug.shape, bug.mesh),))
    try:
        red = [row.item.split(": ")[1] for row in run_group(group, bug.name) if not row.ok]
    except UserError as error:
        red = [str(error)]
    return bool(red) and bug.item in red[0], red[0] if red else "nothing"

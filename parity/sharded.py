"""Training on many devices against training on one, in float64: the same logits, gradients, updates, texts and files.

Each case is a mesh. The processes of a group run several cases one after the other (`parity.sharded_worker`); what comes out is
compared here with the specification.
"""

import dataclasses
import functools
import itertools
import json
import math
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

from llm_common.checkpoint import TrainingState
from llm_common.config import ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig
from llm_common.data import host_rows
from llm_common.errors import UserError
from llm_common.evaluation import Evaluation
from llm_common.processes import lifeline
from llm_common.sharding import MeshConfig
from llm_common.tensors import Tensors
from parity import spec, spec_run
from parity.cases import random_batch, random_weights, start_state
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
    "overflow": BASE,  # the second batch has a token whose row of the embedding is infinite: its update is skipped
}
POISON = 13
# What else differs between the shapes: of the run's settings, and of the optimizer's.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.3, "warmup_steps": 2}),
    "tied": ({"remat": "dots"}, {"lr_min": 0.0, "total_steps": 7}),
    "qwen2": ({"remat": "full", "gradient_accumulation_steps": 1}, {"max_grad_norm": None, "weight_decay": 0.5}),
    "qwen3": ({"scan_layers": True}, {"max_grad_norm": 1e3, "beta1": 0.0}),
    "documents": ({}, {}),
    "overflow": ({}, {"warmup_steps": 1, "beta2": 0.9}),
}
SEPARATOR = 3
STEPS, SEED = 10, 5
TRAIN = TrainConfig(compute_dtype="float64", batch_size=16, seq_len=13, seed=SEED, gradient_accumulation_steps=2)
OPT = OptimizerConfig(lr_max=1e-3, total_steps=STEPS, max_grad_norm=0.05)  # far below the norm: the clip is active
_HELD_OUT = np.random.default_rng(SEED).integers(0, BASE.vocab_size, 300)
EVALUATION = Evaluation(np.where(_HELD_OUT == POISON, 0, _HELD_OUT), TRAIN.seq_len, TRAIN.batch_size)
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


PLAIN = (("llama", "data=2"), ("tied", "fsdp=2"), ("qwen2", "tensor=2"), ("qwen3", "fsdp=2"), ("documents", "data=2"))
TWO_GPUS = (Group("jax", 1, 2, PLAIN), Group("torch", 2, 1, PLAIN))


def train_of(shape: str) -> TrainConfig:
    return dataclasses.replace(
        TRAIN, document_separator=SEPARATOR if shape == "documents" else None, **RECIPES[shape][0]
    )


def opt_of(shape: str) -> OptimizerConfig:
    return dataclasses.replace(OPT, **RECIPES[shape][1])


def start_of(shape: str) -> TrainingState:
    """The state from which a shape trains: in the middle of a run, with fewer updates than steps, where something overflows."""
    state = start_state(weights_of(SHAPES[shape]))
    if shape == "overflow":
        state.weights["model.embed_tokens.weight"][POISON] = np.inf
        state.step, state.adam_count = 3, 1
    return state


def weights_of(cfg: ModelConfig) -> Tensors:
    return random_weights(cfg, SEED)


class Batches:
    """A dataset whose rows count very different numbers of targets: a mean of the devices' means would be another loss."""

    def __init__(self, shape: str) -> None:
        self.cfg, self.bad = SHAPES[shape], start_of(shape).step + 1 if shape == "overflow" else None

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = random_batch(self.cfg, SEED + step, TRAIN.batch_size, TRAIN.seq_len)
        inputs[inputs == POISON] = POISON + 1
        if step == self.bad:
            inputs[3, 2] = POISON
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
    rows: list[dict[str, float]]  # of every step, as its metrics say
    end: TrainingState
    held_out: tuple[float, int]
    texts: list[int]


@functools.cache
def expected(shape: str) -> Expected:
    cfg, data, separator = SHAPES[shape], Batches(shape), train_of(shape).document_separator
    weights, start = weights_of(cfg), start_of(shape)
    init = spec.initial_weights(SEED, cfg)
    inputs, targets = data.batch(start.step)
    logits, _ = spec.forward(weights, inputs, cfg, separator=separator)
    loss, gradients = spec.loss_and_grads(weights, inputs, targets, cfg, separator=separator)
    state = (start.weights, start.mu, start.nu, start.step, start.adam_count)
    state, rows = spec_run.train(state, data.batch, opt_of(shape).total_steps, cfg, opt_of(shape), separator)
    total, count = 0.0, 0
    for ids, wanted in EVALUATION.batches():
        n = int((wanted != -100).sum())
        logits_there, _ = spec.forward(state[0], ids, cfg, separator=separator)
        total, count = total + n * spec.cross_entropy(logits_there, wanted), count + n
    words: list[int] = []
    for sampling in (SamplingConfig(temperature=0), DRAWN):
        words += itertools.chain(*spec.generate(weights, PROMPTS, cfg, sampling, NEW_TOKENS))
    return Expected(init, logits, loss, gradients, rows, TrainingState(*state), (total, count), words)


def _without_poison(tensors: Tensors) -> dict[str, np.ndarray]:
    """Tensors without the row of the embedding that is not finite by design."""
    table = np.array(tensors["model.embed_tokens.weight"])
    if not np.isfinite(table[POISON]).all():
        table[POISON] = 0.0
    return {**tensors, "model.embed_tokens.weight": table}


def compare(group: Group, shape: str, mesh: str, got: dict[str, Any]) -> Iterator[Row]:
    """The rows of a case. Bounds are those of one device (rule 1 of the design): sums over devices are sums in another order."""
    want, start = expected(shape), start_of(shape)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, x in got.items():
        part, _, tensor = key.partition("|")
        if tensor:
            parts.setdefault(part, {})[tensor] = x
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
    for key in ("loss", "grad_norm", "lr", "skipped"):
        found, wanted = got[f"steps of {key}"], np.array([r[key] for r in want.rows])
        finite = np.isfinite(wanted)
        wrong = np.abs(found - wanted)[finite].max() if found.shape == wanted.shape else math.inf
        name_of = "losses" if key == "loss" else key
        yield row(f"{name_of} of {len(wanted)} steps", float(wrong), 1e-11, "train_step")
    counters = int(got["step"]) - want.end.step, int(got["adam_count"]) - want.end.adam_count
    yield row("counters that differ", sum(map(abs, counters)), 0, "fit (counters)")
    moments = lambda mu, nu: {**_without_poison(mu), **{f"nu.{k}": x for k, x in _without_poison(nu).items()}}
    yield worst("moments", moments(parts["mu"], parts["nu"]), moments(want.end.mu, want.end.nu), 1e-11)
    before = _without_poison(start.weights)
    update = lambda after: {tensor: x - before[tensor] for tensor, x in _without_poison(after).items()}
    yield worst(f"update of {len(want.rows)} steps", update(parts["weights"]), update(want.end.weights), 1e-10)
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
            with np.load(Path(folder) / f"{i}.npz") as got:
                rows += compare(group, shape, mesh, dict(got))
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

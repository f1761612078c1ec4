"""What is trained on a mesh, and what the specification, which knows no devices, gives for it.

A case has a name: one of `SHAPES`, or a line "SEED JSON" of a drawn case, whose values are those of `case_space.MESH`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_common.config import ExecutionConfig, ModelConfig, OptimizerConfig, Recipe, SamplingConfig, TrainConfig
from llm_common.data.datasets import Dataset
from llm_common.data.evaluation import Evaluation
from llm_common.run.checkpoint import TrainingState
from llm_common.sharding import MeshConfig
from llm_common.tensors import Tensors
from llm_common.text.drawn_texts import join
from parity import spec, spec_run
from parity.core import case_space, drawn
from parity.core.inputs import random_batch, random_weights, start_state
from parity.core.run_control import Run, control_runs
from parity.spec_run import rows_of_host

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
    "documents": ({"document_separator": 3}, {}),
    "overflow": ({"compile": "on"}, {"warmup_steps": 1, "beta2": 0.9}),
}
SEPARATOR = 3
STEPS, SEED = 10, 5
TRAIN = TrainConfig(compute_dtype="float64", batch_size=16, seq_len=13, seed=SEED)
EXECUTION = ExecutionConfig(gradient_accumulation_steps=2)
OPT = OptimizerConfig(lr_max=1e-3, total_steps=STEPS, max_grad_norm=0.05)  # far below the norm: the clip is active
NEW_TOKENS, DRAWN = 6, SamplingConfig(seed=SEED)
PROMPTS = ([5, 7, 11], [2], [9, 9, 1, 4])


@dataclasses.dataclass(frozen=True)
class MeshCase:
    """All of a run: what a mesh and the specification are given."""

    recipe: Recipe
    start: TrainingState
    data: Dataset
    poison: int | None  # a token whose row of the embedding is not finite
    until: int

    @property
    def cfg(self) -> ModelConfig:
        return self.recipe.model

    @property
    def train(self) -> TrainConfig:
        return self.recipe.train

    @property
    def opt(self) -> OptimizerConfig:
        return self.recipe.optimizer

    @functools.cached_property
    def weights(self) -> Tensors:
        """Finite weights: of the logits, gradients and texts."""
        return random_weights(self.cfg, self.train.seed)

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        held_out = np.random.default_rng(SEED).integers(0, self.cfg.vocab_size, 300)
        held_out[held_out == self.poison] = 0
        return Evaluation(held_out, self.train.seq_len, self.train.batch_size)

    def without_poison(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """Tensors without the rows that are not finite, or too large to compare others with, by design."""
        return dict(tensors) if self.poison is None else case_space.without_poison(tensors, self.poison)


@functools.cache
def mesh_case(name: str) -> MeshCase:
    """The case of this name."""
    if name not in SHAPES:
        return _drawn_case(name)
    cfg, (fields, hyper) = SHAPES[name], RECIPES[name]
    settings = Recipe(cfg, TRAIN, execution=EXECUTION).settings() | fields
    recipe = Recipe.from_settings(cfg, settings, dataclasses.replace(OPT, **hyper))
    state, poison = start_state(random_weights(cfg, SEED)), None
    if name == "overflow":  # in the middle of a run, with fewer updates than steps
        poison = POISON
        state.weights["model.embed_tokens.weight"][POISON] = np.inf
        state.step, state.adam_count = 3, 1
    data = Batches(cfg, state.step + 1 if poison is not None else None)
    return MeshCase(recipe, state, data, poison, recipe.optimizer.total_steps)


def _drawn_case(line: str) -> MeshCase:
    seed, _, features = line.partition(" ")
    case = drawn.from_line(features, case_space.MESH, case_space.fix)
    r = case_space.recipe(case, int(seed))
    recipe = Recipe.from_settings(r.cfg, {"compute_dtype": "float64", "seq_len": case["length"], **r.fields}, r.opt)
    poison = case_space.POISON if case["overflow"] != "none" else None
    return MeshCase(recipe, r.state, r.data, poison, r.until)


class Batches:
    """A dataset whose rows count very different numbers of targets: a mean of the devices' means would be
    another loss.
    """

    def __init__(self, cfg: ModelConfig, bad: int | None) -> None:
        self.cfg, self.bad = cfg, bad

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = random_batch(self.cfg, SEED + step, TRAIN.batch_size, TRAIN.seq_len)
        inputs[inputs == POISON] = POISON + 1
        if step == self.bad:
            inputs[3, 2] = POISON
        for row in range(TRAIN.batch_size):
            targets[row, : 1 + row * 11 // 15] = -100
            inputs[row, [row % 7, 9]] = SEPARATOR
        rows = rows_of_host(np.arange(TRAIN.batch_size), host, n_hosts)
        return inputs[rows].astype(np.int32), targets[rows].astype(np.int32)

    def fingerprint(self) -> dict[str, Any]:
        return {}


# A run from a folder: from given weights to one step, and longer from its checkpoint; of one shape.
THROUGH_FOLDER, FOLDER_STEPS = "llama", (2, 4)


def folder_recipes(case: MeshCase) -> list[Recipe]:
    """Of each part of such a run."""
    opts = (dataclasses.replace(case.opt, warmup_steps=1, total_steps=n) for n in FOLDER_STEPS)
    return [dataclasses.replace(case.recipe, optimizer=opt) for opt in opts]


def meshes(devices: int) -> list[MeshConfig]:
    """The plain meshes of some devices, to which a checkpoint is brought."""
    return [MeshConfig(data=devices), MeshConfig(fsdp=devices), MeshConfig(data=devices // 2, tensor=2)]


def texts(stream: Callable[..., Iterator[list[list[int]]]]) -> list[int]:
    """The new ids of all prompts in a row, first greedy, then drawn."""
    ids: list[int] = []
    for sampling in (SamplingConfig(temperature=0), DRAWN):
        ids += itertools.chain(*join(stream(PROMPTS, NEW_TOKENS, sampling), len(PROMPTS)))
    return ids


@dataclasses.dataclass
class Expected:
    """What must come out."""

    init: Tensors
    logits: np.ndarray
    loss: float
    gradients: Tensors
    rows: list[dict[str, float]]  # of every step, as its metrics say
    end: TrainingState
    controls: list[Run]  # the same run, from weights one ulp away
    held_out: tuple[float, int]
    texts: list[int]
    folder: Tensors | None  # the weights that a run from a folder ends with


@functools.cache
def expected(name: str) -> Expected:
    c = mesh_case(name)
    separator = c.train.document_separator
    inputs, targets = c.data.batch(c.start.step)
    logits, _ = spec.forward(c.weights, inputs, c.cfg, separator=separator)
    loss, gradients = spec.loss_and_grads(c.weights, inputs, targets, c.cfg, separator=separator)
    state = (c.start.weights, c.start.mu, c.start.nu, c.start.step, c.start.adam_count)
    state, rows = spec_run.train(state, c.data.batch, c.until, c.cfg, c.opt, separator)
    total, count = 0.0, 0
    for ids, wanted in c.evaluation.batches():
        n = int((wanted != spec.IGNORE_INDEX).sum())
        logits_there, _ = spec.forward(state[0], ids, c.cfg, separator=separator)
        total, count = total + n * spec.cross_entropy(logits_there, wanted), count + n
    words: list[int] = []
    for sampling in (SamplingConfig(temperature=0), DRAWN):
        words += itertools.chain(*spec.generate(c.weights, PROMPTS, c.cfg, sampling, NEW_TOKENS))
    init = spec.initial_weights(c.train.seed, c.cfg)
    controls = control_runs(c.start, c.data.batch, c.until, c.cfg, c.opt, separator, c.train.seed)
    folder = None
    if name == THROUGH_FOLDER:
        state_there = start_state(c.weights)
        values = (state_there.weights, state_there.mu, state_there.nu, 0, 0)
        for opt in (recipe.optimizer for recipe in folder_recipes(c)):
            values, _ = spec_run.train(values, c.data.batch, opt.total_steps, c.cfg, opt, separator)
        folder = values[0]
    return Expected(init, logits, loss, gradients, rows, TrainingState(*state), controls, (total, count), words, folder)

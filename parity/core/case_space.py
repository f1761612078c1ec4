"""What a drawn case can be: the values of every feature, and the config, optimizer, batches and first state that a case
is.

A case of a run goes the way of a user: its features become a `ModelConfig`, an `OptimizerConfig` and fields of a
`TrainConfig`.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig, RopeScaling
from llm_common.run.checkpoint import TrainingState
from parity import spec
from parity.core.compare import Tensors
from parity.core.drawn import Case, Space
from parity.core.inputs import random_batch, random_weights
from parity.spec_run import rows_of_host

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "llama 3")
# The values of a feature: the simplest first, then the one that the quicker ladder pairs with those of other features.
MODEL: Space = {
    "family": FAMILIES,
    "tied": (False, True),
    "layers": (1, 2, 3),
    "heads": ((2, 2), (4, 2), (6, 2), (3, 1)),  # of queries, of keys and values
    "head_dim": (4, 6, 10),
    "hidden": (16, 24),
    "eps": (1e-5, 1e-3, 1e-6),
    "theta": (1e4, 30.0, 5e5),
    "window": (4, 5, 6, 1, 11, 12),  # of Mistral: within a sequence of 6 or 12, all but its first position, all of it
}
RUN: Space = MODEL | {
    "length": (6, 12),
    "micro_batches": (1, 3, 2),
    "rows": (1, 2),  # of a micro-batch
    "chunks": (1, 3, 2),
    "separators": (0, 2, 1),
    "remat": ("none", "full", "dots"),
    "scan": (False, True),
    # torch takes the way of a compiled run, on a CPU without its compiler; JAX compiles every run
    "compiled": (False, True),
    "counted": ("all", "few", "most", "none"),
    "betas": ((0.9, 0.95), (0.8, 0.99), (0.0, 0.5), (0.95, 0.999)),
    "adam_eps": (1e-8, 1e-3),
    "decay": (0.1, 0.0, 0.5),
    "clip": ("none", "active", "loose"),
    "schedule": ((0, 9), (2, 5), (1, 3)),  # warmup and total: past the end, too
    "lr": ((1e-3, 1e-4), (3e-2, 0.0)),
    "resumed": (False, True),  # from a state with fewer updates than steps
    # in the second step, then on; gradient: that alone, of a loss that is finite
    "overflow": ("none", "nan", "gradient", "inf", "-inf"),
}
TEXT: Space = {name: MODEL[name] for name in ("family", "tied", "heads", "window")} | {
    "prompts": ((3, 3), (1, 4, 2), (5,)),  # how long they are
    "new": (4, 11),
    "dtype": ("float64", "float32"),
    "temperature": (1.0, 0.7, 0.0, 1.6),
    "top_k": (0, 7, 1),
    "top_p": (1.0, 0.5, 0.85),
    "min_p": (0.0, 0.25),
    "stops": (0, 3, 1),
    "numbers": (False, True),  # of the texts, given
    "seed": (0, 7, 2**32 - 1),
    "chunk": (16, 5, 1),  # tokens between two looks of the host
}
LOW: Space = MODEL | {
    "dtype": ("float32", "bfloat16"),
    "attention": ("reference", "fused"),
    "length": (6, 12),
    "micro_batches": (1, 3, 2),
    "rows": (1, 2),
    "chunks": (1, 3, 2),
    "separators": (0, 2, 1),
    "remat": ("none", "full", "dots"),
}
# A run on a mesh of several processes or devices: whatever a mesh does not refuse.
MESH: Space = {
    "framework": ("jax", "torch"),
    "mesh": ("data=2", "fsdp=2", "tensor=2", "data=4", "fsdp=4", "data=2,fsdp=2", "data=2,tensor=2", "fsdp=2,tensor=2"),
    "vocab": (44,),
    **{name: RUN[name] for name in RUN if name not in ("chunks", "heads", "head_dim")},
    "heads": ((2, 2), (4, 2), (6, 2)),
    "head_dim": (4, 8),
    "rows": (4, 8),
}
# What a user names a feature by, where the specification cannot see deeper: the function that it decides about.
PLACES = {
    "overflow": "train_step (skipped update)",
    "micro_batches": "loss_and_grads (accumulation)",
    "chunks": "chunked_cross_entropy",
    "separators": "inside_documents",
    "remat": "remat",
    "scan": "scan_layers",
    "compiled": "train_step (compiled)",
    "attention": "fused_attention",
    "clip": "clip",
    "decay": "AdamW (decay)",
    "betas": "AdamW",
    "adam_eps": "AdamW",
    "resumed": "fit (counters)",
    "schedule": "learning_rate",
    "lr": "learning_rate",
    "counted": "cross_entropy",
    "top_k": "filter_logits",
    "top_p": "filter_logits",
    "min_p": "filter_logits",
    "stops": "generate (stop ids)",
    "numbers": "generate (text ids)",
    "prompts": "prefill",
    "chunk": "generate (chunk)",
    "temperature": "sample",
    "seed": "generate (seed)",
}
OTHERWISE = {
    "run": "train_step",
    "mesh": "distributed",
    "text": "generate",
    "low": "loss_and_grads",
}  # where a case without any feature fails
STEPS = 3


def fix(case: Case) -> Case:
    """What cannot be together: a tied head has the row of the embedding that overflows in every batch; of a mesh a loss
    of 1e200 would hide all others. And a window is Mistral's.
    """
    if case.get("overflow") == "gradient" and "framework" in case:
        case = {**case, "overflow": "inf"}
    if case.get("tied") and case.get("overflow", "none") != "none":
        case = {**case, "overflow": "none"}
    return {**case, "window": 4} if case.get("family") != "mistral" and "window" in case else case


SPACES: dict[str, Space] = {"run": RUN, "text": TEXT, "low": LOW, "mesh": MESH}


def config_of(case: Case) -> ModelConfig:
    case = {name: values[0] for name, values in MODEL.items()} | {"layers": 2, "vocab": 41} | case
    family, (queries, kv) = case["family"], case["heads"]
    scaling = RopeScaling(4.0, 1.0, 3.0, 20) if family == "llama 3" else None
    return ModelConfig(
        case["vocab"],
        case["hidden"],
        20,
        case["layers"],
        queries,
        kv,
        head_dim=case["head_dim"],
        max_position_embeddings=24,
        rope_theta=case["theta"],
        rms_norm_eps=case["eps"],
        tie_word_embeddings=case["tied"],
        model_type="llama" if family == "llama 3" else family,
        rope_scaling=scaling,
        sliding_window=case["window"] if family == "mistral" else None,
    )


SEPARATORS = ((), (0,), (7, 11))  # by how many; id 0 is one as well
POISON = 5  # a token whose row of the embedding is not finite


def poisonous(overflow: str, weights: Tensors) -> None:
    """Makes a step that meets POISON overflow, and no other. In place.

    gradient: the logit of POISON is about -1e200 everywhere, so that it has no share in any other loss, but as a target
    its loss is 1e200, and the square of the gradient's norm is not finite.
    """
    if overflow != "gradient":
        weights["model.embed_tokens.weight"][POISON] = float(overflow)
        return
    weights["model.embed_tokens.weight"][:, 0] = 20.0  # of the same sign behind all layers
    weights["model.norm.weight"][0] = 1.0
    weights["lm_head.weight"][POISON] = 0.0
    weights["lm_head.weight"][POISON, 0] = -1e200


def poison(overflow: str, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Lets a batch meet POISON, where a counted target sees it. In place."""
    if overflow == "gradient":
        targets[0, -1] = POISON
    else:
        inputs[0, 0], targets[0, -1] = POISON, 3


def without_poison(tensors: Tensors, token: int = POISON) -> dict[str, np.ndarray]:
    """Copies in float64, without the rows that are not finite, or too large to compare others with, by design."""
    copies = {name: np.array(x, np.float64) for name, x in tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in copies:
            copies[name][token] = 0.0
    return copies


class Batches:
    """A batch for each step; in the second of the run the token that overflows, where the case has one."""

    def __init__(self, case: Case, cfg: ModelConfig, seed: int, first: int) -> None:
        self.case, self.cfg, self.seed, self.first = case, cfg, seed, first

    @functools.cached_property
    def separators(self) -> tuple[int, ...]:
        return SEPARATORS[self.case["separators"]]

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = self._whole(step)
        return rows_of_host(inputs, host, n_hosts), rows_of_host(targets, host, n_hosts)

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _whole(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        case, rng = self.case, np.random.default_rng((self.seed, 20, step))
        inputs, targets = random_batch(
            self.cfg, self.seed + 31 * step, case["micro_batches"] * case["rows"], case["length"], ignored=False
        )
        inputs[inputs == POISON] = POISON + 1
        for i in self.separators:  # some documents end within a row, at its very start and end among others
            inputs[rng.random(inputs.shape) < 0.15] = i
        share = {"all": 1.0, "most": 0.7, "few": 0.1, "none": 0.0}[case["counted"]]
        counted = rng.random(targets.shape) < share
        if case["counted"] == "few":  # all of them in one micro-batch
            counted[1:], counted[0, -2:] = False, True
        if case["counted"] == "none" and step != self.first:
            counted[:] = True
        targets[~counted] = spec.IGNORE_INDEX
        targets[targets == POISON] = POISON + 1
        if case["overflow"] != "none" and step == self.first + 1:
            poison(case["overflow"], inputs, targets)
        return inputs.astype(np.int32), targets.astype(np.int32)

    def fingerprint(self) -> dict[str, Any]:
        return {}


@dataclasses.dataclass
class Recipe:
    """All of a case: what the two sides and the specification are given."""

    cfg: ModelConfig
    opt: OptimizerConfig
    fields: dict[str, Any]  # of `Recipe.from_settings`
    state: TrainingState
    data: Batches

    @property
    def until(self) -> int:
        return self.state.step + STEPS


def recipe(case: Case, seed: int) -> Recipe:
    cfg = config_of(case)
    weights, rng = random_weights(cfg, seed), np.random.default_rng((seed, 21))
    step, count = (4, 2) if case["resumed"] else (0, 0)
    data = Batches(case, cfg, seed, step)
    separator = data.separators or None
    _, grads = spec.loss_and_grads(weights, *data.batch(step), cfg, separator=separator)
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    max_norm = {"none": None, "active": norm / 3 or 1.0, "loose": 3 * norm or 1.0}[case["clip"]]
    zero = lambda scale: {
        name: scale * rng.random(x.shape) if case["resumed"] else np.zeros(x.shape) for name, x in weights.items()
    }
    state = TrainingState(weights, zero(0.01), zero(1e-4), step, count)
    if case["overflow"] != "none":
        poisonous(case["overflow"], weights)
    (warmup, total), (lr_max, lr_min), (beta1, beta2) = case["schedule"], case["lr"], case["betas"]
    opt = OptimizerConfig(
        lr_max=lr_max,
        lr_min=lr_min,
        warmup_steps=warmup,
        total_steps=total,
        beta1=beta1,
        beta2=beta2,
        eps=case["adam_eps"],
        weight_decay=case["decay"],
        max_grad_norm=max_norm,
    )
    fields = {
        "batch_size": case["micro_batches"] * case["rows"],
        "gradient_accumulation_steps": case["micro_batches"],
        "loss_chunks": case.get("chunks", 1),
        "document_separator": separator,
        "remat": case["remat"],
        "scan_layers": case["scan"],
        "compile": "on" if case["compiled"] else "auto",
        "seed": seed,
    }
    return Recipe(cfg, opt, fields, state, data)

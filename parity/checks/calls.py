"""The library called as no run of the programs calls it: a stop rule of the caller's, an optimizer on other parameters,
no step at all.

A run passes every argument in one way. Whoever uses the functions by themselves passes others, and gets what their
docstrings say.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

from jax_llm import rope as jax_rope
from jax_llm.engine.backend import BACKEND as jax_backend
from llm_common.config import OptimizerConfig, Recipe, SamplingConfig, TrainConfig
from llm_common.data.evaluation import Evaluation
from llm_common.run.backend import Backend
from parity import spec
from parity.checks.kernels import chunks_of
from parity.checks.model import FLOAT64_ALLOWED
from parity.checks.training import MOMENTS_ALLOWED
from parity.core.compare import Row, on_both, refuses, tensor_errors, three_way, verdict, worse_side
from parity.core.inputs import RandomBatches, random_batch, random_weights, start_state, untraced
from parity.sides.settings import Settings
from torch_llm import model as torch_model
from torch_llm.engine.backend import BACKEND as torch_backend


def check_calls(s: Settings) -> Iterator[Row]:
    """Arguments that no program gives, on both sides and in the specification; float64."""
    if "float64" not in s.dtypes:
        return
    yield from _finished(s)
    yield _no_logits(s)
    if "float32" in s.dtypes:
        yield _products(s)
    yield _no_step(s)
    yield _own_parameters(s)
    yield from _scaled_loss(s)
    yield _converted(s)


def _counted(item: str, wrong: list[int], alike: bool, place: str, note: str = "") -> Row:
    side = verdict(wrong[0] > 0, wrong[1] > 0, alike)
    return Row("calls", item, "float64", max(wrong), 0, not side, side, note if side else "", place if side else "")


def _finished(s: Settings) -> Iterator[Row]:
    """What a stop rule of the caller's is given after every token: the row, and all of its new ids; and that it ends
    its text.
    """
    weights, sampling = random_weights(s.cfg, s.seed), SamplingConfig(seed=s.seed % 2**31)
    ids, _ = random_batch(s.cfg, s.seed, 2, 4)
    prompts, n = [ids[0].tolist(), ids[1, :2].tolist()], min(20, s.cfg.max_position_embeddings - 4)
    free = spec.generate(weights, prompts, s.cfg, sampling, n)
    last = (3, n)  # how many ids of each text the rule lets through
    expected = {(row, tuple(text[:k])) for row, text in enumerate(free) for k in range(1, min(last[row], n) + 1)}
    texts = [text[: last[row]] for row, text in enumerate(free)]
    for name in ("generate_stream", "generate"):

        def run(side: Any, name: str = name) -> tuple[list[list[int]], set[tuple[int, tuple[int, ...]]]]:
            seen: set[tuple[int, tuple[int, ...]]] = set()

            def finished(row: int, so_far: list[int]) -> bool:
                seen.add((row, tuple(so_far)))
                return len(so_far) >= last[row]

            call = side.stream if name == "generate_stream" else side.generate
            return call(weights, prompts, n, sampling, finished=finished), seen

        results = on_both(s.sides("float64"), run)
        wrong = [
            len(seen ^ expected) + sum(a != b for a, b in zip(found, texts, strict=True)) for found, seen in results
        ]
        yield _counted(
            f"{name} with a stop rule of the caller's", wrong, results[0] == results[1], f"{name} (finished)"
        )


def _no_logits(s: Settings) -> Row:
    """A logit that is not a number, or infinite, in the prompt's draw or in a later one: an error, never a token.

    The last weight of the head's first row is broken. -inf is a logit like others: nobody draws it.
    """
    cfg = dataclasses.replace(s.cfg, num_hidden_layers=1, tie_word_embeddings=False)
    sides, wrong, n = s.sides("float64", cfg), [0, 0], 0
    for value, sampling in itertools.product((np.nan, np.inf), (SamplingConfig(temperature=0.0), SamplingConfig())):
        weights = random_weights(cfg, s.seed)
        weights["lm_head.weight"][0, -1] = value
        if value == np.inf and spec.forward(weights, np.array([[1, 2]]), cfg)[0][0, -1, 0] < 0:
            weights["lm_head.weight"][0, -1] = -value  # the logit is infinite with the sign of the product
        n += 1
        for i, side in enumerate(sides):
            wrong[i] += not refuses(side.generate, weights, [[1, 2]], 3, sampling)
    return _counted(f"texts of logits that are not finite, of {n}", wrong, True, "generate (not finite)")


def _products(s: Settings) -> Row:
    """That float32 means float32 where an accelerator would take less: in training, evaluation and generation, as
    programs call them. A CPU has one way, so the setting itself is looked at.
    """
    cfg = untraced(dataclasses.replace(s.cfg, num_hidden_layers=1, sliding_window=None))
    recipe = Recipe(cfg, TrainConfig(batch_size=1, seq_len=3), OptimizerConfig(total_steps=2))
    weights = random_weights(cfg, s.seed, "float32")
    evaluation = Evaluation(np.arange(8, dtype=np.int32), 3, 1)
    wrong: dict[str, dict[str, set[Any]]] = {"JAX": {}, "torch": {}}  # side -> use -> what it was told instead
    for side, backend in (("JAX", jax_backend), ("torch", torch_backend)):

        def fit(backend: Backend = backend) -> None:
            with backend.open_session(recipe, s.device, None) as session:
                data: Any = RandomBatches(cfg, s.seed, batch=1, length=3)
                session.fit(data, 1)

        def evaluate(backend: Backend = backend) -> None:
            with backend.evaluator(recipe, weights, s.device, None) as held_out:
                held_out(evaluation)

        def generate(backend: Backend = backend) -> None:
            with backend.generator(cfg, weights, "float32", s.device, None, "off") as stream:
                list(stream([[1, 2]], 2, SamplingConfig()))

        for what, use in (("train", fit), ("evaluate", evaluate), ("generate", generate)):
            with _exactness(side) as seen:
                use()
            if seen != {"highest"}:
                wrong[side][what] = seen
    blamed, item = verdict(*map(bool, wrong.values()), alike=True), "uses in which float32 is not float32, of 6"
    notes = [f"{side}, {what}: {seen or 'nothing'}" for side, uses in wrong.items() for what, seen in uses.items()]
    place = next((f"matmul_precision ({what})" for uses in wrong.values() for what in uses), "")
    most = max(map(len, wrong.values()))
    return Row("calls", item, "float32", most, 0, not blamed, blamed, "; ".join(notes), place)


@contextlib.contextmanager
def _exactness(side: str) -> Iterator[set[Any]]:
    """What a framework is told of the exactness of products, whenever the model's table of rotations is looked up."""
    seen: set[Any] = set()
    if side == "JAX":
        told, owner, name = lambda: jax.config.jax_default_matmul_precision, jax_rope, "rope_table"  # type: ignore[attr-defined]
    else:
        told, owner, name = torch.get_float32_matmul_precision, torch_model.Transformer, "forward"
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.add(told())
        return original(*args, **kwargs)

    with mock.patch.object(owner, name, noted):
        yield seen


def _no_step(s: Settings) -> Row:
    """Training to where it stands, or to before that: nothing changes, from the first step on."""
    data, weights = RandomBatches(s.cfg, s.seed, batch=1, length=4), random_weights(s.cfg, s.seed)
    opt = OptimizerConfig(total_steps=6)

    def moved(side: Any) -> int:
        wrong = 0
        for step, until in ((0, 0), (4, 4), (4, 0), (4, 3)):
            state = start_state(weights)
            state.step = step
            end = side.train(state, opt, data, until)
            wrong += end.step != step or any(not np.array_equal(end.weights[k], x) for k, x in weights.items())
        return wrong

    wrong = on_both(s.sides("float64"), moved)
    return _counted("runs to a step that is reached already", wrong, wrong[0] == wrong[1], "fit")


def _own_parameters(s: Settings) -> Row:
    """The optimizer on parameters that are no language model's, one of them without a gradient in some steps."""
    rng = np.random.default_rng((s.seed, 33))
    shapes = {"matrix": (3, 4), "gain": (5,), "scalar": (), "kernel": (2, 3, 2), "unused": (4, 2)}
    start = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    grads = [{name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(3)]
    for i in (1, 2):
        grads[i]["unused"] = np.zeros(shapes["unused"])
    opt = OptimizerConfig(lr_max=0.05, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.4, max_grad_norm=None)
    w, mu, nu = start, *({name: np.zeros_like(x) for name, x in start.items()} for _ in range(2))
    for n, g in enumerate(grads, start=1):
        w, mu, nu = spec.adamw_step(w, mu, nu, g, opt, opt.lr_max, n)
    given = [{name: x for name, x in g.items() if x.any()} for g in grads]  # no gradient, where it is zero
    ends = on_both(s.sides("float64"), lambda side: side.optimize(start, given, opt))
    of = lambda end: {name: np.asarray(x) - start[name] for name, x in end.items()}
    row = three_way("calls", "AdamW on other parameters", "float64", [*map(of, ends), of(w)], MOMENTS_ALLOWED)
    return row if row.ok else dataclasses.replace(row, place="AdamW (other parameters)")


def _scaled_loss(s: Settings) -> Iterator[Row]:
    """The gradient of three times the loss, by thirds: plain, and of logits in parts."""
    weights, (ids, targets) = random_weights(s.cfg, s.seed), random_batch(s.cfg, s.seed, 2, min(8, s.length))
    _, exact = spec.loss_and_grads(weights, ids, targets, s.cfg)
    for chunks in (1, chunks_of(ids.shape[1])):
        errors = [
            tensor_errors(side.scaled_gradients(weights, ids, targets, 3.0, chunks), exact)
            for side in s.sides("float64")
        ]
        item = f"gradient of a loss that is scaled, in {chunks} part{'s' if chunks > 1 else ''}"
        row = worse_side("calls", item, "float64", errors, FLOAT64_ALLOWED)
        place = "ChunkedLoss (scaled)" if chunks > 1 else "loss (scaled)"
        yield row if row.ok else dataclasses.replace(row, place=place)


def _converted(s: Settings) -> Row:
    """A model that has computed in float32, and computes in float64 from then on."""
    weights, (ids, _) = random_weights(s.cfg, s.seed), random_batch(s.cfg, s.seed, 2, s.length)
    exact = {"logits": spec.forward(weights, ids, s.cfg)[0]}
    found = [{"logits": side.converted_logits(weights, ids)} for side in s.sides("float64")]
    row = three_way(
        "calls", "logits of a model turned from float32 to float64", "float64", [*found, exact], FLOAT64_ALLOWED
    )
    return row if row.ok else dataclasses.replace(row, place="rotary table")

"""What the tolerances that others publish let through: our planted bugs, judged as other projects judge two
implementations.

A gate is a rule that somebody published: what is compared, and how near it must be. Each is written anew here, on our
own pair, from the numbers in its source. The side with the bug is the candidate, the other one the reference, and all
are given what is kind to a gate: float32, weights of which no gain is 1, several batches. Shared bugs, which both sides
have, no such gate can see; they are left out.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, OptimizerConfig, SamplingConfig, preset
from llm_common.run.log import environment
from parity.checks.ladder import processes
from parity.checks.precision import op_inputs, results_of_ops
from parity.core.compare import JAX, TORCH, Tensors
from parity.core.inputs import RandomBatches, random_batch, random_weights, start_state
from parity.core.planting import Edit, planted
from parity.mutants.catalogue import EQUIVALENTS, MUTANTS, Mutant
from parity.mutants.score import uncompiled
from parity.sides.settings import Settings

BATCHES, BATCH, LENGTH, NEW_TOKENS, STEPS = 12, 2, 13, 16, 10


class Evidence:
    """What a gate may ask of the two sides, made when it is first asked for."""

    def __init__(self, side: str, seed: int = 0, cfg: ModelConfig | None = None) -> None:
        self.settings = settings = Settings(cfg=cfg or preset("tiny"), seed=seed)
        pair = settings.sides("float32")
        self.reference, self.candidate = pair if side == TORCH else pair[::-1]
        self.cfg, self.seed = settings.cfg, seed
        self.weights = random_weights(self.cfg, seed, "float32")
        self.batches = [random_batch(self.cfg, seed + i, BATCH, LENGTH) for i in range(BATCHES)]

    def of_both(self, ask: Callable[[Any], Any]) -> tuple[Any, Any]:
        return ask(self.reference), ask(self.candidate)

    @functools.cached_property
    def logits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(B, T, V) of every batch, of the reference and of the candidate."""
        return [self.of_both(lambda side, ids=ids: side.logits(self.weights, ids)) for ids, _ in self.batches]

    @functools.cached_property
    def hidden(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What leaves every layer, and the last norm, for the first batch."""

        def record(side: Any) -> list[np.ndarray]:
            recorder, _, _ = side.tapped(self.weights, *self.batches[0], {}, {})
            names = [f"model.layers.{i}" for i in range(self.cfg.num_hidden_layers)] + ["model.norm"]
            return [recorder.forward[name, "out"] for name in names]

        return list(zip(*self.of_both(record), strict=True))

    @functools.cached_property
    def divergence(self) -> float:
        """The largest KL(reference || candidate) of a position, in nats."""
        worst = 0.0
        for pair in self.logits:
            p, q = (_log_softmax(x) for x in pair)
            worst = max(worst, float((np.exp(p) * (p - q)).sum(-1).max()))
        return worst

    @functools.cached_property
    def losses_of_sgd(self) -> tuple[list[float], list[float]]:
        """Of ten steps of plain gradient descent."""

        def descend(side: Any) -> list[float]:
            weights, losses = dict(self.weights), []
            for step in range(STEPS):
                loss, grads = side.loss_and_grads(weights, *self.batches[step % BATCHES])
                losses.append(loss)
                weights = {name: x - 1e-3 * grads[name] for name, x in weights.items()}
            return losses

        return self.of_both(descend)

    @functools.cached_property
    def trained(self) -> tuple[tuple[Tensors, list[float]], tuple[Tensors, list[float]]]:
        """The weights after one step of a run, and the losses of ten, at a rate of 1e-3."""
        opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-3, total_steps=STEPS)
        data: Any = RandomBatches(self.cfg, self.seed, batch=BATCH, length=LENGTH)

        def run(side: Any) -> tuple[Tensors, list[float]]:
            losses, first = [], {}

            def note(step: int, state: Any, metrics: Any) -> None:
                losses.append(float(metrics["loss"]))
                if step == 1:
                    first.update(state().weights)

            side.train(start_state(self.weights, "float32"), opt, data, STEPS, note)
            return first, losses

        return self.of_both(run)

    @functools.cached_property
    def greedy(self) -> tuple[list[list[int]], list[list[int]]]:
        prompts = [ids[0, :n].tolist() for n, (ids, _) in zip((3, 5, 8), self.batches, strict=False)]
        sampling = SamplingConfig(temperature=0.0)
        return self.of_both(lambda side: side.generate(self.weights, prompts, NEW_TOKENS, sampling))

    @functools.cached_property
    def operations(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each operation by itself, on the same inputs."""
        results = results_of_ops(self.settings, op_inputs(self.seed, "float32"), "float32")
        first, second = results if self.reference.name == JAX else results[::-1]
        return [(first[name], second[name]) for name in first]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def near(pairs: Sequence[tuple[Any, Any]], atol: float, rtol: float = 0.0) -> bool:
    """Whether all candidates are near their references, element by element; NaN is near nothing."""
    return all(
        np.shape(a) == np.shape(b)
        and bool((np.abs(np.subtract(b, a)) <= atol + rtol * np.abs(a)).all())  # NaN compares as False
        for a, b in pairs
    )


def _losses(pair: tuple[list[float], list[float]], rtol: float, atol: float = 0.0) -> bool:
    return near([(np.array(pair[0][-1]), np.array(pair[1][-1]))], atol, rtol)


def _first_step(evidence: Evidence) -> list[tuple[np.ndarray, np.ndarray]]:
    (a, _), (b, _) = evidence.trained
    return [(a[name], b[name]) for name in a]


@dataclasses.dataclass(frozen=True)
class Gate:
    """A published rule."""

    who: str
    where: str  # the file or paper that it is read from
    what: str
    passes: Callable[[Evidence], bool]


# Figures as they stand in the sources named; what several files of a project use differently has a row for each.
GATES = (
    Gate("AlgoPerf", "tests/test_traindiffs.py", "loss after 10 SGD steps, rtol 1",
         lambda e: _losses(e.losses_of_sgd, 1.0)),
    Gate("KernelBench, JAXBench", "correctness harness", "outputs, atol = rtol = 1e-2",
         lambda e: near(e.logits, 1e-2, 1e-2)),
    Gate("Tunix", "qwen_align_test.py", "each layer 1e-3, logits 2e-3",
         lambda e: near(e.hidden, 1e-3, 1e-3) and near(e.logits, 2e-3, 2e-3)),
    Gate("Tunix, script", "KL script", "KL 0.02", lambda e: e.divergence <= 0.02),
    Gate("MaxText, advice", "logit checker", "KL 1e-4", lambda e: e.divergence <= 1e-4),
    Gate("MaxText, tests", "vs_reference tests", "KL 1e-2", lambda e: e.divergence <= 1e-2),
    Gate("SkyRL-tx", "tests against Hugging Face", "hidden 1e-3, log-probabilities 1e-3, greedy tokens equal",
         lambda e: near(e.hidden, 1e-3, 1e-3)
         and near([tuple(map(_log_softmax, pair)) for pair in e.logits], 1e-3) and e.greedy[0] == e.greedy[1]),
    Gate("MaxCode", "generated tests", "outputs of 12 cases, atol 1e-5", lambda e: near(e.logits, 1e-5)),
    Gate("torchtitan, pass", "MODEL_COMPATIBILITY.md", "KL 1e-6", lambda e: e.divergence < 1e-6),
    Gate("torchtitan, warning", "MODEL_COMPATIBILITY.md", "KL 1e-3", lambda e: e.divergence < 1e-3),
    Gate("torchax", "test_ops.py", "each operation, atol 1e-3, rtol 1e-5", lambda e: near(e.operations, 1e-3, 1e-5)),
    Gate("keras", "numerical_test.py", "loss after an epoch of 10 steps, 1e-3",
         lambda e: _losses((e.trained[0][1], e.trained[1][1]), 1e-3, 1e-3)),
    Gate("levanter, logits", "round trip to Hugging Face", "logits, 1e-3", lambda e: near(e.logits, 1e-3, 1e-3)),
    Gate("levanter, AdamW", "one step at a rate of 1e-3", "weights, atol 2e-3", lambda e: near(_first_step(e), 2e-3)),
)  # fmt: skip


def _always() -> list[Mutant]:
    """Candidates that do nothing, which every gate must refuse."""
    found: list[Mutant] = []

    def add(name: str, side: str, *edits: Edit) -> None:
        found.append(Mutant(name, "does nothing", edits, "", side))

    logits = "self.model.embed_tokens.attend(x) if self.cfg.tie_word_embeddings else self.lm_head(x)"
    add("logits are zeros", JAX, Edit("jax_llm.model:CausalLM.__call__", logits, f"0.0 * ({logits})"))
    head = "self.model.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)"
    add("logits are zeros", TORCH, Edit("torch_llm.model:CausalLM.forward", head, f"0.0 * ({head})"))
    add("layers hand on what they get", JAX, Edit("jax_llm.model:DecoderLayer.__call__", "...", "return x, cache"))
    add("layers hand on what they get", TORCH, Edit("torch_llm.model:DecoderLayer.forward", "...", "return x"))
    update = "jnp.where(finite, new, old)"
    add("the optimizer changes nothing", JAX, Edit("jax_llm.engine.train:make_train_step", update, "old"))
    add("the optimizer changes nothing", TORCH, Edit("torch_llm.optim:AdamW.update_group", "...", "pass"))
    return found


def bugs() -> list[Mutant]:
    """All that one side has and the other has not, with those that do nothing."""
    return [*_always(), *(m for m in MUTANTS if m.side in (JAX, TORCH))]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one bug: which gates let it through."""

    name: str
    area: str
    side: str
    let_through: tuple[str, ...]


def let_through(side: str, seed: int = 0, gates: Sequence[Gate] = GATES) -> list[str]:
    """The gates that let through what this side computes. What raises is refused."""
    through, evidence = [], Evidence(side, seed)
    with np.errstate(all="ignore"):
        for gate in gates:
            try:
                if gate.passes(evidence):
                    through.append(gate.who)
            except Exception:  # a candidate that cannot be run is refused by who runs it
                continue
    return through


def judge(mutant: Mutant, seed: int = 0, gates: Sequence[Gate] = GATES) -> Verdict:
    """The gates' verdicts on a bug."""
    with planted(mutant.edits), uncompiled():
        through = let_through(mutant.side or JAX, seed, gates)
    return Verdict(mutant.name, mutant.area, str(mutant.side), tuple(through))


def run_gates(jobs: int | None = None, on_verdict: Callable[[Verdict], None] | None = None) -> list[Verdict]:
    """Of every bug, and of code that is equal by mathematics, whose area says so."""
    chosen = [*bugs(), *(m for m in EQUIVALENTS if m.check == "model")]
    verdicts = []
    with processes(jobs or os.cpu_count() or 1) as pool:
        for future in [pool.submit(judge, mutant) for mutant in chosen]:
            verdicts.append(future.result())
            if on_verdict is not None:
                on_verdict(verdicts[-1])
    return verdicts


EQUAL = "equal by mathematics"


def divided(verdicts: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """Those of bugs, and those of code that is equal by mathematics."""
    return [v for v in verdicts if v.area != EQUAL], [v for v in verdicts if v.area == EQUAL]


def table(verdicts: Sequence[Verdict]) -> Iterator[tuple[Gate, int, int, dict[str, tuple[int, int]]]]:
    """For each gate: bugs seen, refusals of equal code, and by area how many of how many are seen."""
    real, equal = divided(verdicts)
    for gate in GATES:
        seen = lambda v, gate=gate: gate.who not in v.let_through
        areas = {
            area: (sum(seen(v) for v in real if v.area == area), sum(v.area == area for v in real))
            for area in dict.fromkeys(v.area for v in real)
        }
        yield gate, sum(map(seen, real)), sum(map(seen, equal)), areas


def markdown(verdicts: Sequence[Verdict]) -> str:
    real, equal = divided(verdicts)
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items() if version)
    rows = list(table(verdicts))
    areas = list(rows[0][3])
    lines = [
        "# What published tolerances let through",
        "",
        f"{len(real)} bugs of one side, {sum(v.area == 'does nothing' for v in real)} of which make the candidate do "
        f"nothing at all, and {len(equal)} edits that are equal by mathematics, judged by the rules that other "
        "projects publish for two implementations of one model. Each rule is written anew on this project's pair, in "
        "float32, on a tiny Llama whose weights are all random; where a project uses several tolerances, the row says "
        "which. A rule about outputs is not meant for samplers and optimizers: the second table says which kinds it "
        "sees. The bugs are this project's catalogue, which grew together with its own checks: that `parity mutants` "
        "sees them all is no measure of it; [parity.md](parity.md) has its score on bugs that others planted.",
        "",
        f"{date.today().isoformat()}, {environment()['system']}, Python {environment()['python']}; {versions}. Made by "
        "`parity mutants --gates`.",
        "",
        "![share of bugs that each rule sees](gates.png)",
        "",
        "| who | source | rule | bugs seen | share | refused though equal |",
        "|---|---|---|---|---|---|",
    ]
    for gate, seen, refused, _ in rows:
        share = f"{100 * seen / len(real):.0f} %"
        lines.append(
            f"| {gate.who} | {gate.where} | {gate.what} | {seen} of {len(real)} | {share} | {refused} of {len(equal)} |"
        )
    lines += ["", "## By kind of bug", "", "Seen of planted.", ""]
    lines += [f"| who | {' | '.join(areas)} |", "|---|" + "---|" * len(areas)]
    for gate, _, _, by_area in rows:
        lines.append(f"| {gate.who} | " + " | ".join(f"{a} of {n}" for a, n in by_area.values()) + " |")
    everywhere = [v for v in real if len(v.let_through) == len(GATES)]
    lines += [
        "",
        "## What every rule lets through",
        "",
        "; ".join(f"{v.area}: {v.name} ({v.side})" for v in everywhere) or "Nothing.",
    ]
    return "\n".join(lines) + "\n"


def draw(verdicts: Sequence[Verdict], path: Path) -> None:
    """A bar for each rule, the best on top."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = sorted(table(verdicts), key=lambda row: row[1])
    n = len(divided(verdicts)[0])
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    names = [f"{gate.who}: {gate.what}" for gate, *_ in rows]
    shares = [100 * seen / n for _, seen, _, _ in rows]
    bars = axes.barh(names, shares, color="#4a6fa5")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(xlim=(0, 108), xlabel=f"bugs seen, % of {n} planted")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def to_json(verdicts: Sequence[Verdict]) -> str:
    return json.dumps([dataclasses.asdict(v) for v in verdicts], indent=1) + "\n"

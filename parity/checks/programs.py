"""Checks of the programs as a user calls them: text in; token files, logs, checkpoints, losses and texts out.

`prepare_data.py`, `train.py`, `evaluate.py` and `generate.py` run on files, with no setting at its default that a run
could drop unseen. What they leave behind is read by `json`, `numpy` and `safetensors`, and compared with `spec_run.py`.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.numpy

from parity import spec, spec_run
from parity.checks.text_programs import mismatches, text_rows
from parity.checks.training import UPDATE_ALLOWED
from parity.core.compare import Raised, Row, Tensors, crash, each_number, on_both, shared, three_way, verdict
from parity.core.inputs import random_weights, start_state
from parity.core.workshop import CONFIG, END, FRAMEWORKS, Workshop, call, flat, log_numbers, recorded_losses
from parity.sides.settings import Settings
from parity.spec_config import architecture

ALLOWED = 1e-12  # numbers of a log, float64
LENGTH, BATCH, STEPS, EVERY, EVAL_EVERY, SEED, EVAL_BATCHES = 8, 6, 6, 2, 3, 11, 2
OPT = SimpleNamespace(
    lr_max=2e-2, lr_min=3e-3, warmup_steps=2, total_steps=STEPS, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3,
    max_grad_norm=0.7,
)  # fmt: skip
FLAGS = {
    **{f"--{key.replace('_', '-')}": x for key, x in vars(OPT).items()},
    "--seed": SEED,
    "--batch-size": BATCH,
    "--seq-len": LENGTH,
    "--gradient-accumulation-steps": 3,
    "--loss-chunks": 2,
    "--compute-dtype": "float64",
    "--device": "cpu",
    "--log-every": 1,
}
KEEPING = {
    "--save-every": EVERY,
    "--eval-every": EVAL_EVERY,
    "--eval-batches": EVAL_BATCHES,
    "--keep-last": 1,
    "--keep-best": 1,
}
PROMPTS = ("The low", "wide é", "new")


def check_programs(s: Settings) -> Iterator[Row]:
    """The programs, on files."""
    if "float64" not in s.dtypes:
        return
    with tempfile.TemporaryDirectory() as name:
        shop = Workshop(Path(name))
        try:
            yield from _prepared(shop)
            yield from _trained(shop)
            yield from _evaluated(shop)
            yield from _generated(shop)
            yield _exported(shop)
            yield _converted(shop)
            yield from _tuned(shop)
            yield from _extended(shop)
            yield from _bfloat16(shop)
            yield from text_rows(shop, FLAGS)
        except Raised as error:
            yield dataclasses.replace(crash("programs", error), item="a program", dtype="float64")


def _prepared(shop: Workshop) -> Iterator[Row]:
    """Documents to tokens: each in one of the two files, encoded and ended as the definition says."""
    folder = shop.folder
    call("prepare_data", "--tokenizer", folder / "bpe.json", "--data", folder / "text.txt", "--out", folder / "t.npy",
         "--validation", 0.3)  # fmt: skip
    wrong = 0
    for name, held in (("t.npy", False), ("t-validation.npy", True)):
        documents = [text for text in shop.documents if spec_run.is_held_out(text, 0.3) == held]
        wanted = [i for text in documents for i in spec_run.document([], shop.ids(text), shop.end)]
        found = np.load(folder / name).tolist()
        wrong += mismatches(found, wanted)
    yield shared("programs", "tokens that prepare_data.py writes otherwise", wrong, place="prepare_data.py")
    lines = [json.dumps({"q": f"wide {i}", "a": f"newer {i % 7}"}) for i in range(30)]
    (folder / "many.jsonl").write_text("\n".join(lines), encoding="utf-8")
    call("prepare_data", "--tokenizer", folder / "bpe.json", "--data", folder / "many.jsonl",
         "--out", folder / "many.npz",
         "--prompt-field", "q", "--answer-field", "a", "--validation", 0.4)  # fmt: skip
    wrong = 0
    for name, held in (("many.npz", False), ("many-validation.npz", True)):
        texts = [(f"wide {i}", f"newer {i % 7}") for i in range(30)]
        texts = [pair for pair in texts if spec_run.is_held_out("\n".join(pair), 0.4) == held]
        wanted = [i for pair in texts for i in [*shop.ids("".join(pair)), shop.end]]
        found = np.load(folder / name)["tokens"].tolist()
        wrong += mismatches(found, wanted)
    yield shared(
        "programs", "tokens of examples that prepare_data.py writes otherwise", wrong, place="prepare_examples"
    )


def _start(weights: Tensors) -> tuple[Any, ...]:
    """The state before the first step, as the specification takes it."""
    state = start_state(weights)
    return state.weights, state.mu, state.nu, state.step, state.adam_count


def _spec_run(shop: Workshop) -> dict[str, Any]:
    """The specification's run: the numbers of every step, held-out results, and the weights after each."""
    tokens, held = (np.load(shop.folder / name) for name in ("t.npy", "t-validation.npy"))
    weights = spec.initial_weights(SEED, CONFIG)
    state = _start(weights)
    numbers, kept, start = {}, {0: weights}, state
    inputs, targets = (x[: EVAL_BATCHES * BATCH] for x in spec_run.held_out_rows(held, LENGTH))
    batch = lambda step: spec_run.batch(tokens, LENGTH, BATCH, SEED, step)
    for step in range(1, STEPS + 1):
        state, (row,) = spec_run.train(state, batch, step, CONFIG, OPT, shop.end)
        kept[step] = state[0]
        numbers |= {f"{key} of step {step}": x for key, x in row.items()}
        if step % EVERY == 0 or step % EVAL_EVERY == 0:  # with each checkpoint, and without one
            held_out = spec_run.held_out(state[0], inputs, targets, CONFIG, shop.bytes_of_ids, shop.end)
            numbers |= {f"held-out {key} after step {step}": x for key, x in held_out.items()}
    return {"numbers": numbers, "weights": kept, "tokens": tokens, "held": held, "start": start, "state": state}


# Of which function a number of a log is.
PLACES = {
    "held-out": "evaluate",
    "lr of": "learning_rate",
    "skipped of": "train_step (skipped update)",
    "loss of": "train_step",
    "grad_norm of": "train_step",
}


def numbers_row(item: str, results: Sequence[dict[str, float]], expected: dict[str, float], place: str) -> Row:
    """One row for many single numbers, each compared by itself."""
    row = each_number("programs", item, results, expected, ALLOWED)
    where = "" if row.ok else next((x for word, x in PLACES.items() if word in row.note), place)
    return dataclasses.replace(row, place=where, item=f"{item} ({len(expected)} numbers)")


def _trained(shop: Workshop) -> Iterator[Row]:
    folder, expected = shop.folder, _spec_run(shop)
    shop.spec = expected
    common = ["--model-config", folder / "config.json", "--data", folder / "t.npy", "--tokenizer", folder / "bpe.json"]
    common += ["--document-mask", *flat(FLAGS | KEEPING)]
    shop.train_flags = common

    def run(framework: str) -> Path:
        call("train", "--framework", framework, "--out", folder / framework, *common)
        return folder / framework

    runs = on_both(FRAMEWORKS, run)
    logs = [log_numbers(path / "log.jsonl") for path in runs]
    yield numbers_row("log of train.py", logs, expected["numbers"], "train.py")

    # the newest and the best are kept, and nothing else
    losses = {n: expected["numbers"][f"held-out loss after step {n}"] for n in range(EVERY, STEPS + 1, EVERY)}
    keep = {f"step-{n:08d}" for n in (STEPS, min(losses, key=losses.__getitem__))}
    recorded = [recorded_losses(path) for path in runs]
    of_kept = {name: losses[int(name[5:])] for name in keep}
    yield numbers_row("held-out losses that checkpoints record", recorded, of_kept, "save_checkpoint")
    yield _kept_row("checkpoints kept: newest and best", runs, losses)
    start, end = expected["start"], expected["state"]
    yield _saved_row(f"state that train.py saves after {STEPS} steps", runs, start, end, STEPS)


def _evaluated(shop: Workshop) -> Iterator[Row]:
    """evaluate.py of a run on tokens, all of them, and on a text."""
    folder, expected = shop.folder, shop.spec
    weights = expected["weights"][STEPS]
    rows = spec_run.held_out_rows(expected["held"], LENGTH)
    few = rows[0][: EVAL_BATCHES * BATCH], rows[1][: EVAL_BATCHES * BATCH]
    texts = ["low lower, quick brown naïve", "你好 newest zebras", "café"]  # some longer than windows of 5 tokens
    (folder / "held.txt").write_text(END.join(texts), encoding="utf-8")
    documents = [shop.ids(text) for text in texts]  # each predicted from the end of a text
    short, long = (spec_run.rolling_rows(documents, [shop.end], n) for n in (40, 5))
    stored = np.load(folder / "many-validation.npz")
    ids, starts, answers = (stored[name].tolist() for name in ("tokens", "starts", "answers"))
    pairs = [(ids[a:b], ids[b:c]) for a, b, c in zip(starts, answers, starts[1:], strict=False)]
    examples = spec_run.example_rows(pairs, max(len(q) + len(a) for q, a in pairs) - 1)

    def of(rows: tuple[np.ndarray, np.ndarray], separator: int | None = None) -> dict[str, float]:
        inputs, targets = rows
        return spec_run.held_out(weights, inputs, targets, CONFIG, shop.bytes_of_ids, separator)

    for what, arguments, wanted in (
        ("tokens", ["--data", folder / "t-validation.npy", "--batches", "all"], of(rows, shop.end)),
        ("tokens, as many as in the run", ["--data", folder / "t-validation.npy"], of(few, shop.end)),
        (
            "examples",
            ["--data", folder / "many-validation.npz", "--batches", "all", "--seq-len", 20],
            of(examples, shop.end),
        ),
        (
            "examples, the first two of them",
            ["--data", folder / "many-validation.npz", "--batches", 1, "--batch-size", 2, "--seq-len", 20],
            of((examples[0][:2], examples[1][:2]), shop.end),
        ),
        ("a text", ["--text", folder / "held.txt"], of(short)),
        ("a text in windows", ["--text", folder / "held.txt", "--seq-len", 5, "--batch-size", 2], of(long)),
    ):
        flags = ["--device", "cpu", "--json", *arguments]
        run = lambda framework, flags=flags: json.loads(
            call("evaluate", "--framework", framework, "--checkpoint", folder / framework, *flags).splitlines()[-1]
        )
        kind = {"t": "Evaluation", "e": "ExampleEvaluation", "a": "DocumentEvaluation"}[what[0]]
        yield numbers_row(f"evaluate.py of {what}", on_both(FRAMEWORKS, run), wanted, f"evaluate.py, {kind}")


def _generated(shop: Workshop) -> Iterator[Row]:
    """generate.py: texts of several prompts, several texts of each, with filters and a stop."""
    folder, weights = shop.folder, shop.spec["weights"][STEPS]
    sampling = SimpleNamespace(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=3)
    flags = {"--temperature": 0.8, "--top-k": 40, "--top-p": 0.9, "--min-p": 0.02, "--seed": 3, "--max-new-tokens": 9}
    prompts, new = [ids for text in PROMPTS for ids in [shop.ids(text)] * 2], 9
    expected = spec.generate(weights, prompts, CONFIG, sampling, new, (shop.end,), [0, 1] * len(PROMPTS))
    wanted = "".join(
        f"--- prompt {i // 2}, text {i % 2}\n{PROMPTS[i // 2]}{shop.text(text)}\n" for i, text in enumerate(expected)
    )
    arguments = [x for text in PROMPTS for x in ("--prompt", text)] + ["--texts", 2, "--compute-dtype", "float64"]
    arguments += ["--batch-size", 4]  # the last texts are worked on after the others, under their own names
    run = lambda framework: call(
        "generate",
        "--framework",
        framework,
        "--checkpoint",
        folder / framework,
        "--device",
        "cpu",
        *arguments,
        *flat(flags),
    )
    texts = on_both(FRAMEWORKS, run)
    wrong = [int(text != wanted) for text in texts]
    side = verdict(wrong[0] > 0, wrong[1] > 0, texts[0] == texts[1])
    note = next(
        (
            f"{a!r} for {b!r}"
            for text in texts
            for a, b in zip(text.splitlines(), wanted.splitlines(), strict=False)
            if a != b
        ),
        "",
    )
    yield Row(
        "programs",
        f"texts of generate.py, {len(prompts)} of them",
        "float64",
        max(wrong),
        0,
        not side,
        side,
        note,
        "generate.py" if side else "",
    )


# The same weights, rounded to bfloat16, in the program that trains and in the one that evaluates: the order of float32
# sums is all that may differ, relative 1e-6; a held-out loss in float32 of a bfloat16 run is 1e-3 away.
SAME_LOSS = 1e-5


def _bfloat16(shop: Workshop) -> Iterator[Row]:
    """The held-out loss of a bfloat16 run, as its log has it and as evaluate.py has it of the checkpoint of
    that step.
    """
    folder = shop.folder
    arguments = ["--data", folder / "t.npy", "--tokenizer", folder / "bpe.json"]
    arguments += flat({**FLAGS, "--compute-dtype": "bfloat16", "--total-steps": 1, "--warmup-steps": 0})

    def run(framework: str) -> float:
        path = folder / f"bfloat16-{framework}"
        config = ["--model-config", folder / "config.json"]
        call("train", "--framework", framework, "--out", path, *config, *arguments)
        in_run = log_numbers(path / "log.jsonl")["held-out loss after step 1"]
        flags = ["--data", folder / "t-validation.npy", "--device", "cpu", "--json"]
        found = json.loads(call("evaluate", "--framework", framework, "--checkpoint", path, *flags).splitlines()[-1])
        return abs(in_run - found["loss"]) / found["loss"]

    jax, torch = on_both(FRAMEWORKS, run)
    side = verdict(not jax <= SAME_LOSS, not torch <= SAME_LOSS, True)
    item, place = "held-out loss of a run, beside evaluate.py of its checkpoint", "evaluate (in a run)" if side else ""
    yield Row("programs", item, "bfloat16", max(jax, torch), SAME_LOSS, not side, side, place=place)
    yield _masters_row(shop, arguments)


def _masters_row(shop: Workshop, arguments: list[Any]) -> Row:
    """What a bfloat16 run makes of float32 weights that it begins with: a step at a rate of nothing leaves masters as
    they are.
    """
    folder = shop.folder
    given = safetensors.numpy.load_file(folder / "other" / "model.safetensors")

    def run(framework: str) -> int:
        path = folder / f"masters-{framework}"
        more = flat({"--init-from": folder / "other", "--lr-max": 1e-30, "--lr-min": 0.0})
        call("train", "--framework", framework, "--out", path, *arguments, *more)
        found = safetensors.numpy.load_file(path / "step-00000001" / "model.safetensors")
        return sum(int((found[name] != x).sum()) if name in found else x.size for name, x in given.items())

    wrong = on_both(FRAMEWORKS, run)
    side = verdict(wrong[0] > 0, wrong[1] > 0, wrong[0] == wrong[1])
    item, place = "weights that a bfloat16 run begins with otherwise", "train.py --init-from (masters)" if side else ""
    return Row("programs", item, "float32", max(wrong), 0, not side, side, place=place)


LONGER = STEPS + 3


def _extended(shop: Workshop) -> Iterator[Row]:
    """Each run made longer in the other framework: from its newest checkpoint on, at the rates of the new total."""
    folder, before = shop.folder, shop.spec
    batch = lambda step: spec_run.batch(before["tokens"], LENGTH, BATCH, SEED, step)
    opt = SimpleNamespace(**{**vars(OPT), "total_steps": LONGER})
    state, rows = spec_run.train(before["state"], batch, LONGER, CONFIG, opt, shop.end)
    more = {f"{key} of step {STEPS + 1 + i}": x for i, row in enumerate(rows) for key, x in row.items()}
    expected = before["numbers"] | more  # every earlier step is still there, once
    folders = {"jax": "torch", "torch": "jax"}  # who goes on with whose

    def run(framework: str) -> Path:
        path = folder / folders[framework]
        call("train", "--framework", framework, "--out", path, *shop.train_flags, "--total-steps", LONGER)
        return path

    runs = on_both(FRAMEWORKS, run)
    logs = [log_numbers(path / "log.jsonl") for path in runs]
    yield numbers_row("log of train.py, extended in the other framework", logs, expected, "train.py (resume)")
    yield _saved_row(f"state that train.py saves after {LONGER} steps", runs, before["state"], state, LONGER)
    yield _segments_row(shop, folders)


def _segments_row(shop: Workshop, folders: dict[str, str]) -> Row:
    """What a run that was made longer twice remembers of its lengths."""
    last = LONGER + 1

    def run(framework: str) -> list[Any]:
        path = shop.folder / folders[framework]
        call("train", "--framework", framework, "--out", path, *shop.train_flags, "--total-steps", last)
        return json.loads((path / f"step-{last:08d}" / "state.json").read_text(encoding="utf-8"))["settings"][
            "segments"
        ]

    found, at = on_both(FRAMEWORKS, run), (0, STEPS, LONGER)
    wanted = [{"from_step": a, "total_steps": b} for a, b in zip(at, (STEPS, LONGER, last), strict=True)]
    wrong = [int(segments != wanted) for segments in found]
    side = verdict(wrong[0] > 0, wrong[1] > 0, found[0] == found[1])
    item, place = "lengths that a run remembers, made longer twice", "Run.resume" if side else ""
    return Row("programs", item, "", max(wrong), 0, not side, side, str(found[0])[:200] if side else "", place)


def _saved_row(item: str, runs: Sequence[Path], start: Any, end: Any, step: int) -> Row:
    """What a checkpoint holds, read by safetensors and json: what moved since `start`, the moments, the counters."""
    weights, mu, nu, steps, count = end
    wanted = {name: x - start[0][name] for name, x in weights.items()}
    wanted |= {f"mu.{k}": x for k, x in mu.items()} | {f"nu.{k}": x for k, x in nu.items()}
    results = []
    for path in runs:
        folder = path / f"step-{step:08d}"
        stored = safetensors.numpy.load_file(folder / "model.safetensors")
        moments = safetensors.numpy.load_file(folder / "optimizer.safetensors")
        counters = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        found = {name: x - start[0][name] for name, x in stored.items() if name in start[0]} | moments
        found |= {"step": np.array(counters["step"]), "adam_count": np.array(counters["adam_count"])}
        results.append(found)
    counts = {"step": np.array(float(steps)), "adam_count": np.array(float(count))}
    for key, x in counts.items():
        pair = [{key: np.array(float(r[key]))} for r in results]
        row = three_way("programs", item, "float64", [*pair, {key: x}], 0.0, key)
        if not row.ok:
            return dataclasses.replace(row, place="state.json")
    row = three_way("programs", item, "float64", [*results, wanted], UPDATE_ALLOWED)
    return row if row.ok else dataclasses.replace(row, place="train.py")


def _exported(shop: Workshop) -> Row:
    """Files of an export; the first holds two tensors and not a byte more; in bfloat16 half as long."""
    out, wrong = shop.folder / "exported", 0
    shapes = spec.weight_shapes(architecture(CONFIG))
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        sizes = {name: size * math.prod(shape) for name, shape in shapes.items()}
        most = sum(list(sizes.values())[:2])
        path = out.with_name(f"exported-{dtype}")
        call(
            "export", "--checkpoint", shop.folder / "jax", "--out", path, "--dtype", dtype, "--shard-gib", most / 2**30
        )
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        found = [[name for name in shapes if index[name] == file] for file in sorted(set(index.values()))]
        wrong += found != spec_run.divided(sizes, most)
    return shared("programs", "files that export.py divides weights into", wrong, place="export.py")


def _converted(shop: Workshop) -> Row:
    """A checkpoint in torch's distributed format and back: the same bits of weights and moments, the same counters."""
    source, wrong = max((shop.folder / "jax").glob("step-*")), 0
    call("convert_checkpoint", "--from", source, "--to-dcp", shop.folder / "dcp")
    call("convert_checkpoint", "--from-dcp", shop.folder / "dcp", "--like", source, "--to", shop.folder / "back")
    again = shop.folder / "back" / source.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        before, after = (safetensors.numpy.load_file(path / file) for path in (source, again))
        wrong += len(before.keys() ^ after.keys())
        wrong += sum(x.dtype != after[k].dtype or int((x != after[k]).sum()) for k, x in before.items() if k in after)
    counters = [json.loads((path / "state.json").read_text(encoding="utf-8")) for path in (source, again)]
    wrong += sum(counters[0][name] != counters[1][name] for name in ("step", "adam_count"))
    return shared("programs", "what a checkpoint loses in another format", wrong, place="convert_checkpoint.py")


def _tuned(shop: Workshop) -> Iterator[Row]:
    """Fine-tuning: examples out of a file, weights out of somebody else's folder, at rates that soon make held-out
    answers worse.
    """
    folder = shop.folder
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    weights = {k: x.astype(np.float32) for k, x in random_weights(architecture(CONFIG), 77).items()}
    safetensors.numpy.save_file(weights, folder / "other" / "model.safetensors", {"format": "pt"})
    pairs = [("low ", "lowest"), ("new", "er café"), ("wide wider ", "widest"), ("a", "b"), ("你 ", "好")]
    examples = _prepared_examples(shop, pairs, "e")
    held = spec_run.example_rows(_prepared_examples(shop, [("你 ", "好")], "e-held"), 12)
    batch = lambda step: spec_run.example_batch(examples, 12, 2, 4, step)
    state = _start(weights)
    changed = {"total_steps": 3, "max_grad_norm": None, "lr_max": 0.3, "warmup_steps": 0}
    expected, losses = {}, {}
    for step in (1, 2, 3):
        state, (row,) = spec_run.train(state, batch, step, CONFIG, SimpleNamespace(**{**vars(OPT), **changed}))
        expected |= {f"{key} of step {step}": x for key, x in row.items()}
        held_out = spec_run.held_out(state[0], *held, CONFIG, shop.bytes_of_ids)
        expected |= {f"held-out {key} after step {step}": x for key, x in held_out.items()}
        losses[step] = held_out["loss"]
    assert min(losses, key=losses.__getitem__) == 1, losses  # the first step's batch has the held-out pair
    flags = {
        **FLAGS, "--seed": 4, "--batch-size": 2, "--seq-len": 12, "--total-steps": 3, "--max-grad-norm": "none",
        "--gradient-accumulation-steps": 1, "--init-from": folder / "other", "--data": folder / "e.npz",
        "--tokenizer": folder / "bpe.json", "--lr-max": 0.3, "--warmup-steps": 0,
        "--save-every": 1, "--eval-every": 1, "--keep-last": 1, "--keep-best": 1, "--eval-data": folder / "e-held.npz",
    }  # fmt: skip

    def run(framework: str) -> Path:
        call("train", "--framework", framework, "--out", folder / f"tuned-{framework}", *flat(flags))
        return folder / f"tuned-{framework}"

    runs = on_both(FRAMEWORKS, run)
    logs = [log_numbers(path / "log.jsonl") for path in runs]
    yield numbers_row("log of train.py from other weights, on examples", logs, expected, "train.py --init-from")
    yield _kept_row("checkpoints kept: the newest, and an older one that is best", runs, losses)
    yield _roles_row("ids that end documents and answers, as a checkpoint records them", runs, (None, shop.end))
    # the same command again goes on from the checkpoint, not from the other weights
    longer = flat({**flags, "--total-steps": 5, "--eval-every": 9})
    on_both(FRAMEWORKS, lambda name: call("train", "--framework", name, "--out", folder / f"tuned-{name}", *longer))
    opt = SimpleNamespace(**{**vars(OPT), **changed, "total_steps": 5})
    _, rows = spec_run.train(state, batch, 5, CONFIG, opt)
    later = {f"{key} of step {4 + i}": x for i, row in enumerate(rows) for key, x in row.items()}
    logs = [{key: x for key, x in log_numbers(path / "log.jsonl").items() if key in later} for path in runs]
    yield numbers_row("log of train.py from other weights, made longer", logs, later, "fit_and_save (initial)")


def _prepared_examples(shop: Workshop, pairs: list[tuple[str, str]], name: str) -> list[tuple[list[int], list[int]]]:
    """Pairs of prompt and answer in a file that prepare_data.py makes, and their ids as the definition has them."""
    lines = [json.dumps({"q": q, "a": a}) for q, a in pairs]
    (shop.folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    call("prepare_data", "--tokenizer", shop.folder / "bpe.json", "--data", shop.folder / f"{name}.jsonl",
         "--out", shop.folder / f"{name}.npz", "--prompt-field", "q", "--answer-field", "a")  # fmt: skip
    examples = []
    for question, answer in pairs:
        ids = shop.ids(question + answer)
        at = np.cumsum([len(shop.letters[i]) for i in ids])  # in bytes
        examples.append(spec_run.example([], ids, at.tolist(), len(question.encode()), shop.end))
    return examples


def _roles_row(item: str, runs: Sequence[Path], wanted: tuple[int | None, int | None]) -> Row:
    """What the newest checkpoints say ends a document and an answer."""
    read = lambda path: json.loads((max(path.glob("step-*")) / "state.json").read_text(encoding="utf-8"))["settings"]
    found = [(x.get("document_end"), x.get("turn_end")) for x in (read(path)["roles"] for path in runs)]
    wrong = [int(x != wanted) for x in found]
    side = verdict(wrong[0] > 0, wrong[1] > 0, found[0] == found[1])
    note, place = (str(found[0]), "train.py (roles)") if side else ("", "")
    return Row("programs", item, "", max(wrong), 0, not side, side, note, place)


def _kept_row(item: str, runs: Sequence[Path], losses: dict[int, float]) -> Row:
    """Which checkpoints are left of a run that keeps one newest and one best. losses: held-out, by the step of a
    checkpoint.
    """
    keep = {f"step-{n:08d}" for n in (max(losses), min(losses, key=losses.__getitem__))}
    found = [{x.name for x in path.glob("step-*")} for path in runs]
    wrong = [len(names ^ keep) for names in found]
    side = verdict(wrong[0] > 0, wrong[1] > 0, found[0] == found[1])
    return Row("programs", item, "", max(wrong), 0, not side, side, place="prune_checkpoints" if side else "")

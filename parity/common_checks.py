"""Checks of what neither framework owns: step scalars, tokens, batches, held-out loss, files. Only the specification, which
shares no line with them, can see a mistake there: both sides would make it alike.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy

from llm_common import bpe_reference, schedule
from llm_common.bpe_trainer import MANY, count_words, learn_merges, train_bpe
from llm_common.checkpoint import load_checkpoint, save_checkpoint
from llm_common.config import ModelConfig, OptimizerConfig
from llm_common.data import ORDER, TokenDataset
from llm_common.evaluation import Evaluation
from llm_common.examples import ExampleDataset, write_examples
from llm_common.export import export
from llm_common.tensor_files import open_model_files
from llm_common.tokenizer import Tokenizer
from parity import spec
from parity.cases import RandomBatches, families, random_weights, start_state
from parity.compare import SHARED, Row, round_to, three_way
from parity.settings import Settings
from parity.training_checks import UPDATE_ALLOWED, spec_train, update_of

SCHEDULE_ALLOWED = 1e-15  # two float64 spellings of one formula, relative to lr_max; one step early shows above 1e-6
FLOAT64_ALLOWED = 1e-12
END = "<|endoftext|>"
TEXTS = [
    "The quick brown fox's tail; they'll say it isn't, we've 1234 reasons (or 56).  Two spaces,\ttabs\nand lines.\n\n",
    "low lower lowest new newer newest wide wider widest " * 3,
    "aaaa aaaaaaa abababab   ----==== " + "Grüße, дом, 你好世界, naïve café, 😀😀👩‍👩‍👧 " * 2,
    f"one document{END}another one{END}{END}the last <|end of it",
]


def _shared(check: str, item: str, wrong: float, allowed: float = 0.0, place: str = "", dtype: str = "") -> Row:
    ok = wrong <= allowed
    return Row(check, item, dtype, wrong, allowed, ok, "" if ok else SHARED, place=place)


def check_schedule(s: Settings) -> Iterator[Row]:
    """The learning rate and the bias corrections of every step, as numbers."""
    configs = [
        OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=w, total_steps=n) for w, n in ((0, 1), (3, 7), (10, 50))
    ]
    worst = 0.0
    for opt in configs:
        for step in range(opt.total_steps + 3):
            difference = abs(schedule.learning_rate(opt, step) - spec.learning_rate(opt, step)) / opt.lr_max
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
    yield _shared("schedule", "learning rate of every step", worst, SCHEDULE_ALLOWED, "learning_rate", "float64")
    worst = 0.0
    for n in (1, 2, 3, 10, 100, 10_000):
        pair = schedule.bias_corrections(0.9, 0.95, n)
        worst = max(worst, abs(pair[0] - (1 - 0.9**n)), abs(pair[1] - (1 - 0.95**n)))
    yield _shared("schedule", "bias corrections", worst, SCHEDULE_ALLOWED, "bias_corrections", "float64")
    scalars = schedule.step_scalars(configs[1], 4, 2)
    wanted = (spec.learning_rate(configs[1], 4), 1 - configs[1].beta1 ** 3, 1 - configs[1].beta2 ** 3)
    worst = max(abs(a - b) for a, b in zip(scalars, wanted, strict=True))
    yield _shared("schedule", "scalars of a step after a skip", worst, SCHEDULE_ALLOWED, "step_scalars", "float64")


def check_tokenizer(s: Settings) -> Iterator[Row]:
    """Merges and ids of a small text in many scripts, against the definition; and the text back."""
    merges, differing = bpe_reference.train(TEXTS, 120, END), 0
    by_ids = bpe_reference.train(TEXTS, 120, END, smaller_ids=True)
    words = count_words(TEXTS, [END], "gpt2")
    for tie_rule, expected in (("greater-bytes", merges), ("smaller-ids", by_ids)):
        for many in (MANY, 3, 0):  # in a loop, in NumPy, and in both
            found = learn_merges(words, 120, tie_rule, many=many)
            differing += sum(a != b for a, b in itertools.zip_longest(found, expected))
    differing += train_bpe(TEXTS, 256 + 120 + 1).merges != merges
    yield _shared("tokenizer", f"merges that differ, of {7 * len(merges)}", differing, place="train_bpe")
    tokenizer = Tokenizer(merges, fast=False)
    wrong = back = 0
    for text in (*TEXTS, "", "  lowest\u00a0wider??", "😀 aaaaa<|endoftext|>", "abaaab" * 60, "= " + "=-" * 200):
        expected = bpe_reference.encode(text, merges, END)
        chunks = [text[i : i + 3] for i in range(0, len(text), 3)]
        found = [tokenizer.encode(text), *(list(tokenizer.encode_iterable(chunks, block)) for block in (1, 20, 10_000))]
        wrong += sum(ids != expected for ids in found)
        back += tokenizer.decode(expected) != text
    yield _shared("tokenizer", "texts whose ids differ", wrong, place="Tokenizer.encode")
    yield _shared("tokenizer", "texts that do not come back", back, place="Tokenizer.decode")


def check_data(s: Settings) -> Iterator[Row]:
    """Batches of a small token file: consecutive tokens, targets one to the right, the order, the rows of each host."""
    length, n = s.length, 7
    tokens = np.arange(1, 2 + n * length + length // 2, dtype=np.int32)  # 7 windows and a rest
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens)
        dataset = TokenDataset(Path(folder) / "tokens.npy", length, 2, s.seed)
        batches = [dataset.batch(step) for step in range(n)]  # two epochs
        hosts = [[dataset.batch(step, host, 2)[0] for host in (0, 1)] for step in range(n)]
    inputs, targets = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
    wrong = int((targets != inputs + 1).sum() + (inputs[:, 1:] != inputs[:, :-1] + 1).sum())
    for epoch in (inputs[:n], inputs[n:]):
        wrong += int((np.sort(epoch[:, 0]) != 1 + length * np.arange(n)).sum())
    yield _shared("data", "tokens out of place in two epochs", wrong, place="TokenDataset.batch")
    order = np.concatenate([_order(s.seed, epoch, n) for epoch in (0, 1)])
    wrong = int((inputs[:, 0] != 1 + length * order).sum())
    yield _shared("data", "windows out of order in two epochs", wrong, place="Order")
    wrong = sum(int((np.concatenate(pair) != batches[step][0]).sum()) for step, pair in enumerate(hosts))
    yield _shared("data", "tokens that two hosts see otherwise", wrong, place="host_rows")

    examples = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [10, 11, 12])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "examples.npz"
        write_examples(path, examples, Tokenizer([]))
        batch = ExampleDataset(path, 5, 3, s.seed).batch(0)
    wrong = 0
    for row, i in enumerate(_order(s.seed, 0, 3)):
        prompt, answer = examples[i]
        ids = prompt + answer
        expected = np.full((2, 5), -100)
        expected[0] = 0
        expected[0, : len(ids) - 1] = ids[:-1]
        expected[1, len(prompt) - 1 : len(ids) - 1] = answer
        wrong += int((np.stack([batch[0][row], batch[1][row]]) != expected).sum())
    yield _shared("data", "tokens of examples out of place", wrong, place="ExampleDataset.batch")


def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The windows of an epoch, out of a table of the whole permutation of a square's cells."""
    key = spec.fold_in(spec.fold_in((0, seed), ORDER), epoch)
    b0, b1 = spec.threefry2x32(key, np.zeros(6, np.uint64), np.arange(6, dtype=np.uint64))
    side = 2
    while side * side < n:
        side *= 2
    column, row = (x.astype(np.uint64) for x in np.divmod(np.arange(side * side), side))
    for word in (b0 ^ b1).astype(np.uint64):
        x = (row ^ word) & np.uint64(2**32 - 1)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) % np.uint64(2**32)
        column, row = row, column ^ ((x ^ (x >> np.uint64(16))) % np.uint64(side))
    table, order = (column * np.uint64(side) + row).tolist(), []
    for cell in range(n):
        cell = table[cell]
        while cell >= n:
            cell = table[cell]
        order.append(cell)
    return np.array(order)


def check_evaluation(s: Settings) -> Iterator[Row]:
    """The held-out loss of both sides over windows of which the last is not full, and its bits per byte."""
    if "float64" not in s.dtypes:
        return
    weights, rng = random_weights(s.cfg, s.seed), np.random.default_rng((s.seed, 9))
    length = min(s.length, s.cfg.max_position_embeddings)
    tokens = rng.integers(0, s.cfg.vocab_size, 4 * length + max(2, length // 2))
    lengths = 1 + rng.permutation(s.cfg.vocab_size)  # no two alike
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, length):
        window = tokens[None, start : start + length + 1]
        logits = spec.forward(weights, window[:, :-1], s.cfg)[0]
        total += spec.cross_entropy(logits, window[:, 1:]) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    bits = total / math.log(2) / lengths[tokens[1:]].sum()
    expected = {"loss": np.array(total / count), "tokens": np.array(float(count)), "bits per byte": np.array(bits)}
    results = []
    for side in s.sides("float64"):
        evaluation = Evaluation(tokens, length, 2, lengths)
        found = evaluation.summary(*side.evaluate(weights, evaluation))
        results.append(
            {
                "loss": np.array(found["loss"]),
                "tokens": np.array(float(found["tokens"])),
                "bits per byte": np.array(found["bits_per_byte"]),
            }
        )
    yield three_way("evaluation", "held-out loss", "float64", [*results, expected], FLOAT64_ALLOWED)


def check_files(s: Settings) -> Iterator[Row]:
    """A checkpoint and an export as others read them: names, values bit for bit, counters, roundings, config."""
    wrong = 0
    for cfg in (s.cfg, *families(s.cfg).values()):
        config = cfg.to_hf()
        plain = {key: config.get(key) for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps")}
        wrong += sum(value != getattr(cfg, key) for key, value in plain.items())
        wrong += config["rope_parameters"]["rope_theta"] != cfg.rope_theta
        wrong += config["tie_word_embeddings"] != cfg.tie_word_embeddings
        wrong += ModelConfig.from_hf(config) != cfg
    yield _shared("files", "fields of config.json", wrong, place="to_hf")
    weights = random_weights(s.cfg, s.seed, "float32")
    state = start_state(weights, "float32")
    rng = np.random.default_rng((s.seed, 10))
    for moment in (state.mu, state.nu):
        for name, x in moment.items():
            moment[name] = rng.random(x.shape).astype(np.float32)  # type: ignore[index]
    state.step, state.adam_count = 12, 11
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), s.cfg, state, {})
        stored = safetensors.numpy.load_file(path / "model.safetensors")
        moments = safetensors.numpy.load_file(path / "optimizer.safetensors")
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        _, loaded, _ = load_checkpoint(path, s.cfg)
        wrong = _differing(stored, state.weights) + abs(content["step"] - 12) + abs(content["adam_count"] - 11)
        expected = {f"mu.{k}": x for k, x in state.mu.items()} | {f"nu.{k}": x for k, x in state.nu.items()}
        wrong += _differing(moments, expected)
        yield _shared("files", "values of a checkpoint, as safetensors reads it", wrong, place="save_checkpoint")
        wrong = _differing(loaded.weights, state.weights) + _differing(loaded.mu, state.mu)
        wrong += _differing(loaded.nu, state.nu) + abs(loaded.step - 12) + abs(loaded.adam_count - 11)
        yield _shared("files", "values of a checkpoint, read back", wrong, place="load_checkpoint")
        for dtype in ("float32", "bfloat16"):
            export(Path(folder) / dtype, s.cfg, weights, dtype=dtype, shard_bytes=1 << 14)
            read = open_model_files(Path(folder) / dtype)
            wrong = sum(int((read[k].astype(np.float64) != round_to(x, dtype)).sum()) for k, x in weights.items())
            yield _shared("files", f"values of an export in {dtype}, in shards", wrong, place="export")


def _differing(a, b) -> int:
    """Elements that are not bit for bit the same; all of a tensor that is missing."""
    return sum(int((np.asarray(a[k]) != x).sum()) if k in a else x.size for k, x in b.items()) + len(set(a) - set(b))


def check_resume(s: Settings) -> Iterator[Row]:
    """Three steps in one framework, a checkpoint on disk, three more in the other, against six of the specification."""
    if "float64" not in s.dtypes:
        return
    data, weights = RandomBatches(s.cfg, s.seed, batch=s.batch, length=s.length), random_weights(s.cfg, s.seed)
    opt = OptimizerConfig(lr_max=1e-3, lr_min=1e-4, warmup_steps=2, total_steps=6, max_grad_norm=1.0)
    expected = spec_train(s, start_state(weights), opt, data, 6)[0]
    ends = []
    for first, second in (s.sides("float64"), s.sides("float64")[::-1]):
        half = first.train(start_state(weights), opt, data, 3)
        with tempfile.TemporaryDirectory() as folder:
            _, loaded, _ = load_checkpoint(save_checkpoint(Path(folder), s.cfg, half, {}), s.cfg)
        ends.append(second.train(loaded, opt, data, 6))
    updates = [update_of(end.weights, weights) for end in (ends[1], ends[0], expected)]
    item = "JAX goes on from torch, torch from JAX"
    yield three_way("resume", item, "float64", updates, UPDATE_ALLOWED, "the side named is the one that went on")

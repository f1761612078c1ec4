"""Checks of text, tokens, batches and held-out loss, which neither framework owns: only the specification, which shares
no line with them, can see a mistake there.
"""

import dataclasses
import itertools
import json
import queue
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from llm_common.config import ModelConfig
from llm_common.data import datasets
from llm_common.data.answers import ExampleDataset, write_examples
from llm_common.data.datasets import Prefetch, TokenDataset, Windows
from llm_common.data.evaluation import Evaluation, ExampleEvaluation
from llm_common.data.sequences import DocumentEncoder, answer_encoder
from llm_common.text import bpe_reference, bpe_trainer
from llm_common.text.bpe_trainer import NUMPY_FROM_POSITIONS, count_words, learn_merges, train_bpe
from llm_common.text.tokenizer import Tokenizer
from parity import spec_run
from parity.checks.model import FLOAT64_ALLOWED
from parity.checks.streams import stream_rows
from parity.core.compare import SHARED, Row, each_number, shared
from parity.core.inputs import families, random_weights
from parity.core.workshop import END
from parity.sides.settings import Settings
from parity.trace.trace import located_or

TEXTS = [
    "The quick brown fox's tail; they'll say it isn't, we've 1234 reasons (or 56).  Two spaces,\ttabs\nand lines.\n\n",
    "low lower lowest new newer newest wide wider widest " * 3,
    "aaaa aaaaaaa abababab   ----==== " + "Grüße, дом, 你好世界, naïve café, 😀😀👩‍👩‍👧 " * 2,
    f"one document{END}another one{END}{END}the last <|end of it",
]


def check_tokenizer(s: Settings) -> Iterator[Row]:
    """Merges and ids of a small text in many scripts, against the definition; and the text back."""
    merges, differing = bpe_reference.train(TEXTS, 120, END), 0
    by_ids = bpe_reference.train(TEXTS, 120, END, smaller_ids=True)
    words = count_words(TEXTS, [END], "gpt2")
    for tie_rule, expected in (("greater-bytes", merges), ("smaller-ids", by_ids)):
        for many in (NUMPY_FROM_POSITIONS, 3, 0):  # in a loop, in NumPy, and in both
            found = learn_merges(words, 120, tie_rule, many=many)
            differing += sum(a != b for a, b in itertools.zip_longest(found, expected))
    with mock.patch.object(bpe_trainer, "COUNTED_IDS", 0):  # as with more than 65,536 tokens
        differing += learn_merges(words, 120, "greater-bytes") != merges
    yield shared("tokenizer", f"merges that differ, of {7 * len(merges)}", differing, place="train_bpe")
    differing = int(train_bpe(TEXTS, 256 + 120 + 1).merges != merges)
    differing += train_bpe("".join(TEXTS), 256 + 120 + 1).merges != bpe_reference.train(["".join(TEXTS)], 120, END)
    # until no pair is left: most of them occur once; the byte 0 is a letter like others
    rare = ["one\0two \0\0\0\0 three\0", "\0\0four \0two"]
    differing += train_bpe(rare, 1000).merges != bpe_reference.train(rare, 1000, END)
    differing += train_bpe(iter(TEXTS), 256 + 120 + 1, iter([END])).merges != merges  # read once
    differing += sum(
        _counted_beside(pattern) != count_words(TEXTS, [END], pattern) for pattern in ("gpt2", "llama3", "smollm2")
    )
    yield shared("tokenizer", "texts that other merges are learned from", differing, place="train_bpe")
    tokenizer = Tokenizer(merges, fast=False)
    wrong = back = 0
    for text in (*TEXTS, "", "  lowest\u00a0wider??", "😀 aaaaa<|endoftext|>", "abaaab" * 60, "= " + "=-" * 200):
        expected = bpe_reference.encode(text, merges, END)
        chunks = [text[i : i + 3] for i in range(0, len(text), 3)]
        found = [tokenizer.encode(text), *(list(tokenizer.encode_iterable(chunks, block)) for block in (1, 20, 10_000))]
        wrong += sum(ids != expected for ids in found)
        back += tokenizer.decode(expected) != text
    yield shared("tokenizer", "texts whose ids differ", wrong, place="Tokenizer.encode")
    yield shared("tokenizer", "texts that do not come back", back, place="Tokenizer.decode")
    yield _documents_row(merges)
    yield from stream_rows(merges)


def _counted_beside(pattern: str) -> dict[bytes, int]:
    """The words as one of several processes counts them."""
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()
    for text in (*TEXTS, None):
        todo.put(text)
    with mock.patch.object(bpe_trainer, "end_with_parent"):
        bpe_trainer._count_in_worker(todo, done, (END,), pattern)
    return done.get()


NUL = "\0"  # its id is 0, which is an id like others


def _documents_row(merges: list[tuple[bytes, bytes]]) -> Row:
    """What stands around a document; where an answer begins."""
    letters, wrong = [bytes([b]) for b in range(256)] + [a + b for a, b in merges], 0
    for prefixed, end in itertools.product((False, True), (END, "none", NUL)):
        text = "a naïve café, 你好"
        one = Tokenizer(merges, fast=False, prompt_prefix=[END] if prefixed else [])
        ids = bpe_reference.encode(text, merges, END)
        prefix = [one.special_tokens[END]] if prefixed else []
        last = {"none": None, NUL: 0}.get(end, one.special_tokens[END])
        wrong += DocumentEncoder(one, end)(text) != spec_run.document(prefix, ids, last)
        for at in range(1, len(text)):
            head, answer = answer_encoder(one, end)(text[:at], text[at:])
            where = np.cumsum([len(letters[i]) for i in ids])
            ends = [len(text.encode()[: int(x)].decode(errors="ignore")) for x in where]
            ends = [
                n + (text.encode()[: int(x)].decode(errors="ignore").encode() != text.encode()[: int(x)])
                for n, x in zip(ends, where, strict=True)
            ]
            wrong += (head, answer) != spec_run.example(prefix, ids, ends, at, last)
    return shared("tokenizer", "documents and answers with other ids", wrong, place="DocumentEncoder")


def _same_data(s: Settings) -> int:
    """Whether a run would notice that its data has another id somewhere, another seed or another shape of batches;
    and that the same data, read again, is the same.
    """
    tokens = np.arange(40, dtype=np.int32)
    others = [tokens.copy() for _ in range(3)]
    for other, at in zip(others, (0, 20, 39), strict=True):
        other[at] += 1
    with tempfile.TemporaryDirectory() as name:

        def of(ids: np.ndarray, length: int = 4, size: int = 2, seed: int = s.seed) -> str:
            np.save(Path(name) / "t.npy", ids)
            return json.dumps(TokenDataset(Path(name) / "t.npy", length, size, seed).fingerprint())

        first = of(tokens)
        found = [of(x) for x in (*others, tokens[:-1])]
        with mock.patch.object(datasets, "HASHED_AT_ONCE", 7):  # a file of many pieces, each of which counts
            pieces = {of(np.where(np.arange(40) == at, 99, tokens)) for at in range(40)}
            found += [first] * (40 - len(pieces)) + [first] * (of(tokens) != first)
        found += [of(tokens, length=5), of(tokens, size=3), of(tokens, seed=(s.seed + 1) % 2**32)]
        return len(found) + 1 - len({first, *found}) + (of(tokens) != first)


def check_data(s: Settings) -> Iterator[Row]:
    """Batches of a small token file: consecutive tokens, targets one to the right, the order, the rows of each host."""
    length, n = s.length, 7
    tokens = np.arange(1, 2 + n * length + length // 2, dtype=np.int32)  # 7 windows and a rest
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens)
        dataset = TokenDataset(Path(folder) / "tokens.npy", length, 2, s.seed)
        batches = [dataset.batch(step) for step in range(n)]  # two epochs
        everyone = Windows(dataset)
        windows = [everyone[i] for i in range(len(everyone))]
        again = [dataset.batch(step) for step in range(n)]  # the first epoch after the second, as a run that goes on
        hosts = [[dataset.batch(step, host, 2)[0] for host in (0, 1)] for step in range(n)]
    inputs, targets = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
    wrong = int((targets != inputs + 1).sum() + (inputs[:, 1:] != inputs[:, :-1] + 1).sum())
    for epoch in (inputs[:n], inputs[n:]):
        wrong += int((np.sort(epoch[:, 0]) != 1 + length * np.arange(n)).sum())
    yield shared("data", "tokens out of place in two epochs", wrong, place="TokenDataset.batch")
    order = np.concatenate([spec_run.order(s.seed, epoch, n) for epoch in (0, 1)])
    wrong = int((inputs[:, 0] != 1 + length * order).sum())
    wrong += sum(_unequal(a, b) for pair in zip(again, batches, strict=True) for a, b in zip(*pair, strict=True))
    yield shared("data", "windows out of order in two epochs", wrong, place="Order")
    wrong = abs(len(windows) - n)
    for i, window in enumerate(windows):
        cut = tokens[i * length : (i + 1) * length + 1]
        wrong += _unequal(window["inputs"], cut[:-1]) + _unequal(window["targets"], cut[1:])
    yield shared("data", "windows that are read by their numbers", wrong, place="Windows")
    yield shared("data", "other data taken for the same", _same_data(s), place="fingerprint")
    wrong = sum(int((np.concatenate(pair) != batches[step][0]).sum()) for step, pair in enumerate(hosts))
    yield shared("data", "tokens that two hosts see otherwise", wrong, place="host_rows")

    yield from _batches(s)
    yield from _examples(s)


# window length, batch size, windows, tokens left over, dtype of the file, seed
FILES = (
    (5, 3, 11, 4, np.uint16, 3),
    (4, 6, 5, 0, np.uint32, 2**31 + 5),
    (3, 4, 1, 1, np.int32, 0),
    (7, 2, 64, 6, np.uint16, 2**32 - 1),
)


def _batches(s: Settings) -> Iterator[Row]:
    """Batches of files of several kinds, ids above 65,535 and 131,071 among them, over epochs, hosts and
    reading ahead.
    """
    rng, wrong, hosts_wrong, ahead_wrong, types = np.random.default_rng((s.seed, 12)), 0, 0, 0, 0
    for length, size, n, rest, dtype, seed in FILES:
        largest = min(np.iinfo(dtype).max, 200_000)
        tokens = rng.integers(0, largest + 1, n * length + 1 + rest).astype(dtype)
        tokens[:3] = largest, largest // 2 + 1, 0
        seed = (seed + s.seed) % 2**32
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "tokens.npy", tokens)
            dataset = TokenDataset(Path(folder) / "tokens.npy", length, size, seed, largest + 1)
            ahead = Prefetch(dataset)
            for step in (0, 1, 2, n // size, n, 3 * n + 1):
                expected = spec_run.batch(tokens, length, size, seed, step)
                found = dataset.batch(step)
                wrong += sum(_unequal(*pair) for pair in zip(found, expected, strict=True))
                types += sum(x.dtype != np.int32 for x in found)
                ahead_wrong += sum(_unequal(*pair) for pair in zip(ahead.batch(step), expected, strict=True))
                for count in [k for k in (1, 2, 3) if size % k == 0]:
                    for host in range(count):
                        part = dataset.batch(step, host, count)
                        whole = [spec_run.rows_of_host(x, host, count) for x in expected]
                        hosts_wrong += sum(_unequal(*pair) for pair in zip(part, whole, strict=True))
                        again = ahead.batch(step, host, count)  # one process may read the parts of several
                        ahead_wrong += sum(_unequal(*pair) for pair in zip(again, whole, strict=True))
    yield shared("data", f"tokens of batches of {len(FILES)} files that differ", wrong, place="TokenDataset.batch")
    yield shared("data", "arrays that are not int32", types, place="TokenDataset.batch")
    yield shared("data", "tokens that differ when read ahead", ahead_wrong, place="Prefetch")
    yield shared("data", "tokens that one of several hosts sees otherwise", hosts_wrong, place="host_rows")


def _unequal(a: np.ndarray, b: np.ndarray) -> int:
    return int((np.asarray(a, np.int64) != b).sum()) if a.shape == b.shape else b.size


def _examples(s: Settings) -> Iterator[Row]:
    """Prompts and answers, in batches and held out. Only the answers count."""
    examples = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [10, 11, 12]), ([13], [14, 15, 16, 17])]
    wrong, rng = 0, np.random.default_rng((s.seed, 13))
    bytes_of_ids = rng.integers(1, 9, 257)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "examples.npz"
        too_long = ([1, 2, 3], [4, 5, 6])  # one more than what is asked for; others are just as long
        write_examples(
            path, [*examples[:2], too_long, *examples[2:], ([], [1]), ([1], [])], Tokenizer([]), max_length=5
        )
        dataset = ExampleDataset(path, 5, 3, s.seed)
        for step in range(4):
            expected = spec_run.example_batch(examples, 5, 3, s.seed, step)
            wrong += sum(_unequal(*pair) for pair in zip(dataset.batch(step), expected, strict=True))
        yield shared("data", "tokens of examples out of place", wrong, place="ExampleDataset.batch")
        longest = max(len(prompt) + len(answer) for prompt, answer in examples)
        wrong = abs(ExampleEvaluation(path, None, 2).seq_len - (longest - 1))
        evaluation = ExampleEvaluation(path, 6, 2, bytes_of_ids)
        found = [np.concatenate(x)[: len(examples)] for x in zip(*evaluation.batches(), strict=True)]
        expected = spec_run.example_rows(examples, 6)
        wrong += sum(_unequal(*pair) for pair in zip(found, expected, strict=True))
        counted = expected[1][expected[1] != spec_run.IGNORE_INDEX]
        wrong += abs((evaluation.n_bytes() or 0) - int(bytes_of_ids[counted].sum()))
        wrong += abs(evaluation.n_targets - len(counted))
        yield shared("data", "tokens of held-out examples out of place", wrong, place="ExampleEvaluation")


def check_evaluation(s: Settings) -> Iterator[Row]:
    """The held-out loss of both sides over windows, the last of them not full, its perplexity and its bits
    per byte.
    """
    if "float64" not in s.dtypes:
        return
    others, length = families(s.cfg), min(s.length, s.cfg.max_position_embeddings)
    tied = dataclasses.replace(s.cfg, tie_word_embeddings=not s.cfg.tie_word_embeddings)
    chunks = next(n for n in (3, 2, 5, 13, 1) if length % n == 0)
    cases: list[tuple[str, ModelConfig, dict[str, Any], int | None]] = [
        ("held-out loss", s.cfg, {}, None),
        ("held-out loss, first 2 batches; Qwen2", others["Qwen2: biases"], {}, 2),
        (
            "held-out loss, document mask; Mistral",
            others["Mistral: window of 4"],
            {"document_separator": (1, 3)},
            None,
        ),
        (
            "held-out loss, settings of a run; other head",
            tied,
            {"loss_chunks": chunks, "remat": "full", "seed": 9},
            None,
        ),
    ]
    for item, cfg, fields, max_batches in cases:
        row, place = _evaluation_row(s, item, cfg, fields, max_batches, length)
        yield located_or(row, s, cfg, place, fields.get("document_separator"))


def _evaluation_row(
    s: Settings, item: str, cfg: ModelConfig, fields: dict[str, Any], max_batches: int | None, length: int
) -> tuple[Row, str]:
    """The row, and what is wrong if it is not the model."""
    weights, rng, batch = random_weights(cfg, s.seed), np.random.default_rng((s.seed, 9)), 2
    tokens = rng.integers(0, cfg.vocab_size, 5 * length + max(2, length // 2))
    lengths = 1 + rng.permutation(cfg.vocab_size)  # no two alike
    inputs, targets = spec_run.held_out_rows(tokens, length)
    if max_batches is not None:
        inputs, targets = inputs[: max_batches * batch], targets[: max_batches * batch]
    reported = lambda found: {key: float(found[key]) for key in REPORTED}
    expected = reported(spec_run.held_out(weights, inputs, targets, cfg, lengths, fields.get("document_separator")))
    results = []
    for side in s.sides("float64", cfg):
        evaluation = Evaluation(tokens, length, batch, lengths, max_batches)
        results.append(reported(evaluation.summary(*side.evaluate(weights, evaluation, **fields))))
    row = each_number("evaluation", item, results, expected, FLOAT64_ALLOWED)
    differs = lambda key: any(not abs(x[key] / expected[key] - 1.0) <= FLOAT64_ALLOWED for x in results)
    if differs("bytes"):
        return row, "Evaluation.n_bytes"
    if not differs("tokens") and not differs("loss"):
        return row, "Evaluation.summary"
    return row, "Evaluation.batches" if row.side == SHARED else "evaluate"


REPORTED = ("loss", "perplexity", "tokens", "bytes", "bits_per_byte")

"""The tokenizer beside other libraries: `benchmark.py tokenizer`. Every figure comes from a process of its own."""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import random
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.errors import UserError
from llm_common.text.bpe_trainer import train_bpe
from llm_common.text.corpus import Corpus, python_documentation
from llm_common.text.tokenizer import END_OF_TEXT, Tokenizer
from llm_common.text.tokenizer_json import to_hf_files
from llm_common.text.words import PATTERNS, without_possessive
from llm_tools.bench.measure import run_worker

TRAINERS = {"ours, 1 process": None, "ours, 2 processes": None, "tokenizers": "tokenizers", "rustbpe": "rustbpe"}
ENCODERS = {
    "ours, Python": None,
    "ours, through tiktoken": "tiktoken",
    "tiktoken": "tiktoken",
    "tokenizers": "tokenizers",
}
LIMIT = 12_000_000  # characters of the default corpus


@functools.cache
def read_documents(paths: tuple[Path, ...]) -> list[str]:
    """The corpus: the files given, or Python's documentation and as much of its library's source as fills it up."""
    if paths:
        return list(Corpus(paths).documents())
    texts = list(python_documentation())
    size = sum(map(len, texts))
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if size >= LIMIT:
            break
        if "site-packages" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(texts[-1])
    return texts


def usage() -> tuple[float, float]:
    """CPU seconds of this process and those it has waited for, and the most MB that it or one of them had."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in both), max(x.ru_maxrss for x in both) / 1e3


def train_once(name: str, texts: list[str], vocab_size: int, pattern: str) -> None:
    if name == "tokenizers":
        import tokenizers
        from tokenizers import Regex, models, pre_tokenizers, trainers

        split = pre_tokenizers.Split(Regex(without_possessive(PATTERNS[pattern])), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT]
        )
        made.train_from_iterator(texts, trainer)
    elif name == "rustbpe":
        rustbpe = importlib.import_module(name)  # has no types
        spelling = PATTERNS[pattern] if pattern == "cl100k" else without_possessive(PATTERNS[pattern])
        rustbpe.Tokenizer().train_from_iterator(iter(texts), vocab_size - 1, pattern=spelling)
    else:
        train_bpe(texts, vocab_size, pattern=pattern, processes=2 if "2" in name else 1)


def measure_training(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    texts = read_documents(tuple(args.data))
    importlib.import_module(TRAINERS[task["side"]] or "llm_common.text.bpe_trainer")
    (before, _), start = usage(), time.perf_counter()
    train_once(task["side"], texts, args.vocab_size, args.pattern)
    wall = time.perf_counter() - start
    after, memory = usage()
    return {"cpu": after - before, "wall": wall, "memory": memory}


def open_encoder(name: str, tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    if name == "tiktoken":
        import tiktoken

        tokens = {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
        encoding = tiktoken.Encoding(
            "x", pat_str=PATTERNS[tokenizer.pattern], mergeable_ranks=tokens, special_tokens={}
        )
        return encoding.encode_ordinary
    if name == "tokenizers":
        import tokenizers

        library = tokenizers.Tokenizer.from_str(to_hf_files(tokenizer)["tokenizer.json"].decode("utf-8"))
        return lambda text: library.encode(text, add_special_tokens=False).ids
    made = Tokenizer(tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern, fast="Python" not in name)
    if made.fast:
        made.encode_batch(["x" * (1 << 20)])  # now tiktoken is ready
    return made.encode


def measure_encoding(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    texts = [text.replace(END_OF_TEXT, "") for text in read_documents(tuple(args.data))]
    encode = open_encoder(task["side"], Tokenizer.load(task["tokenizer"]))
    start = time.process_time()
    ids = [encode(text) for text in texts]
    seconds = time.process_time() - start
    digest = hash(tuple(map(tuple, ids)))  # of numbers: the same in every process
    return {"cpu": seconds, "bytes": sum(len(text.encode()) for text in texts), "digest": digest}


def hostile_texts() -> dict[str, str]:
    """A megabyte each of what slow or unwary tokenizers fail at."""
    rng, n = random.Random(0), 1_000_000
    letters = "abcdefghijklmnopqrstuvwxyz"
    pick = lambda characters, many: "".join(rng.choices(characters, k=many))
    return {
        "one letter": "a" * n,
        "spaces, then a letter": " " * n + "x",
        "newlines": "\n" * n,
        "random letters": pick(letters, n),
        "random digits": pick("0123456789", n),
        "combining marks": "e\u0301\u0302" * (n // 5),
        "joined emoji": "👩‍👩‍👧‍👦" * (n // 25),
        "random ideographs": pick([chr(c) for c in range(0x4E00, 0xA000)], n // 3),
        "random bytes": rng.randbytes(n).decode("utf-8", "replace"),
        "lone surrogates": "a\ud800" * (n // 4),
        "special tokens": END_OF_TEXT * (n // 13),
        "nearly special tokens": END_OF_TEXT[:-1] * (n // 12),
    }


def measure_hostile(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    text, tokenizer = hostile_texts()[task["text"]], Tokenizer.load(task["tokenizer"])
    made = Tokenizer(tokenizer.merges, tokenizer.special_tokens, tokenizer.pattern, fast=task["side"] != "Python")
    if made.fast:
        made.encode_batch(["x" * (1 << 20)])
    start = time.perf_counter()
    ids = made.encode(text)
    seconds = time.perf_counter() - start
    came_back = made.decode(ids) == text.replace("\ud800", "\ufffd")
    return {"cpu": seconds, "came_back": came_back}


MEASURES = {"train": measure_training, "encode": measure_encoding, "hostile": measure_hostile}


def measure_tokenizer(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    return MEASURES[task["part"]](args, task)


def installed(names: dict[str, str | None]) -> list[str]:
    return [name for name, package in names.items() if package is None or importlib.util.find_spec(package)]


def run(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """All cases, each `groups` times, one after the other in turn; the report, and every result."""
    if args.vocab_size < 257:
        raise UserError(f"--vocab-size {args.vocab_size}: at least 257")
    texts, results = read_documents(tuple(args.data)), []
    megabytes = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    trainers, encoders = installed(TRAINERS), installed(ENCODERS)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "bpe.json")
        train_bpe(texts, args.vocab_size, pattern=args.pattern).save(path)
        cases = [{"part": "train", "side": x} for x in trainers] + [{"part": "encode", "side": x} for x in encoders]
        cases = [case for _ in range(args.groups) for case in cases]
        cases += [{"part": "hostile", "side": x, "text": t} for t in hostile_texts() for x in ("Python", "tiktoken")]
        for case in cases:
            result = run_worker({"what": "tokenizer", "tokenizer": path, **case})
            if "error" in result:
                raise UserError(f"{case}: {result['error']}")
            results.append(result)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    packages = sorted({"numpy", *filter(None, map(PACKAGE.get, trainers + encoders))})
    names = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        f"Byte-level BPE, {megabytes:.1f} MB of text in {len(texts):,} documents, vocabulary {args.vocab_size:,}, "
        "pattern "
        f"{args.pattern}; {os.cpu_count()} cores; {names}; medians of {args.groups} runs (quartiles)",
        "",
        *_training_table(results, trainers),
        "",
        *_encoding_table(results, encoders),
        "",
        *_hostile_table(results),
    ]
    return "\n".join(lines), results


PACKAGE = {name: package for names in (TRAINERS, ENCODERS) for name, package in names.items()}


def _values(results: list[dict[str, Any]], part: str, side: str, key: str) -> np.ndarray:
    return np.array([r[key] for r in results if (r["part"], r["side"]) == (part, side)], float)


def _spread(values: np.ndarray, digits: int = 2) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _training_table(results: list[dict[str, Any]], sides: list[str]) -> list[str]:
    peers = [x for x in sides if not x.startswith("ours")]
    against = "".join(f" CPU against {x} | wall against {x} |" for x in peers)
    rows = [f"| training | CPU s | wall s | MB |{against}", "|" + "---|" * (4 + 2 * len(peers))]
    for side in sides:
        cells = [_spread(_values(results, "train", side, key)) for key in ("cpu", "wall")]
        cells.append(f"{np.median(_values(results, 'train', side, 'memory')):.0f}")
        for peer in peers:
            for key in ("cpu", "wall"):
                ratio = np.median(_values(results, "train", side, key)) / np.median(
                    _values(results, "train", peer, key)
                )
                cells.append(f"{ratio:.2f}")
        rows.append(f"| {side} | " + " | ".join(cells) + " |")
    return rows


def _encoding_table(results: list[dict[str, Any]], sides: list[str]) -> list[str]:
    peers = [x for x in sides if not x.startswith("ours")]
    rows = ["| encoding | MB/s of CPU |" + "".join(f" times {x} |" for x in peers) + " ids |"]
    rows.append("|" + "---|" * (3 + len(peers)))
    digests = {r["digest"] for r in results if r["part"] == "encode" and r["side"] == sides[0]}
    rate = lambda side: _values(results, "encode", side, "bytes") / _values(results, "encode", side, "cpu") / 1e6
    for side in sides:
        cells = [_spread(rate(side))]
        cells += [f"{np.median(rate(side)) / np.median(rate(peer)):.2f}" for peer in peers]
        same = {r["digest"] for r in results if r["part"] == "encode" and r["side"] == side} == digests
        rows.append(f"| {side} | " + " | ".join(cells) + f" | {'the same' if same else 'DIFFERENT'} |")
    return rows


def _hostile_table(results: list[dict[str, Any]]) -> list[str]:
    rows = ["| 1 MB of | Python, s | with tiktoken, s | comes back |", "|---|---|---|---|"]
    for name in hostile_texts():
        two = [r for r in results if r["part"] == "hostile" and r["text"] == name]
        cells = [f"{r['cpu']:.2f}" for r in two]
        rows.append(f"| {name} | {' | '.join(cells)} | {'yes' if all(r['came_back'] for r in two) else 'NO'} |")
    return rows

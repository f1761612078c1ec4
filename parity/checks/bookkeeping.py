"""What a run and its programs keep account of: presets, checkpoints, logs, ends of texts, lengths of prompts,
conversations.

Both sides share all of it, so each row has the rule written a second time, in a line or a literal table.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from llm_common.config import (
    PRESETS,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from llm_common.data.answers import ExampleReader
from llm_common.data.evaluation import DocumentEvaluation
from llm_common.errors import UserError
from llm_common.files import tensor_files
from llm_common.files.tensor_files import check_finite
from llm_common.run.checkpoint import latest_checkpoint, prune_checkpoints
from llm_common.run.log import RunLog, read_log
from llm_common.run.settings import trained_ends
from llm_common.tensors import check_prompts
from llm_common.text.hf_tokenizer import HfTokenizer, open_tokenizer
from llm_common.text.tokenizer import Tokenizer
from parity import spec_run
from parity.checks.shared_rules import rule_rows
from parity.checks.streams import pieces_at
from parity.core.compare import Row, refuses, shared
from parity.core.workshop import load_script
from parity.sides.settings import Settings

# name -> vocabulary, hidden, intermediate, layers, heads, key/value heads, head_dim, positions, theta, eps, tied head.
# 8b is Llama 3 8B as Meta published it; the others are this project's own.
SHAPES: dict[str, tuple[Any, ...]] = {
    "tiny": (96, 32, 56, 2, 8, 2, 10, 64, 1e4, 1e-5, False),
    "demo": (2048, 128, 352, 4, 4, 2, 32, 512, 1e4, 1e-5, True),
    "124m": (32_768, 768, 2560, 12, 12, 12, 64, 2048, 1e4, 1e-5, True),
    "350m": (32_768, 1024, 2816, 24, 16, 8, 64, 2048, 1e4, 1e-5, False),
    "1b": (32_768, 2048, 8192, 16, 32, 8, 64, 2048, 1e4, 1e-5, False),
    "8b": (128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 5e5, 1e-5, False),
}
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


def check_bookkeeping(s: Settings) -> Iterator[Row]:
    """Every row against a rule of its own; nothing here runs a model."""
    row = lambda item, wrong, place: shared("bookkeeping", item, wrong, place=place)
    yield row("presets with another shape", _presets(), "PRESETS")
    yield row("settings with another default", _defaults(), "config defaults")
    with tempfile.TemporaryDirectory() as folder:
        plain = _tokenizers(_folder(Path(folder) / "plain", PLAIN))
        yield row("checkpoints that are the newest, or are kept", _checkpoints(Path(folder)), "checkpoints")
        yield row("rows of a log that goes on from an earlier step", _logs(Path(folder)), "RunLog")
        yield row("settings that a TOML file gives otherwise than flags", _toml(Path(folder)), "parse_with_toml")
        yield row("counts of data that is read in pieces", _counts(s), "data_report.read")
        yield row("ids at which a run's texts end", _ends(), "trained_ends")
        yield row("prompts refused or padded wrongly", _prompts(s), "check_prompts")
        yield row("places of numbers that are not finite", _not_finite(), "check_finite")
        yield row("windows of documents", _windows(s), "DocumentEvaluation")
        yield row("ids of long words, merges in any order", _long_words(s), "Tokenizer.encode")
        yield row("bytes of ids in a Hugging Face folder", _bytes_of_ids(plain), "byte_lengths")
        yield row("texts of a vocabulary that lacks bytes", _lacking(Path(folder)), "WordEncoder._encode_word")
        yield row("fingerprints of Hugging Face folders", _fingerprints(Path(folder)), "Tokenizer.fingerprint")
        yield row("conversations and where their answers begin", _conversations(Path(folder)), "ExampleReader")
        yield row("tokens that end documents and answers", _ends_of_folders(Path(folder)), "TokenizerFolder")
        yield from rule_rows(s, Path(folder), plain)


# What a setting is if nothing is said, as docs and DESIGN say it. `auto` and None are resolved by rows of their own.
DEFAULTS: dict[type, dict[str, Any]] = {
    ModelConfig: {
        "head_dim": 0, "max_position_embeddings": 2048, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "model_type": "llama", "rope_scaling": None, "sliding_window": None,
    },
    TrainConfig: {
        "seed": 0, "batch_size": 16, "seq_len": 128, "compute_dtype": "float32", "document_separator": None,
        "max_skipped_steps": 10,
    },
    ExecutionConfig: {
        "attention_backend": "auto", "gradient_accumulation_steps": 1, "loss_chunks": 1, "remat": "none",
        "compile": "auto", "scan_layers": False, "deterministic": False,
    },
    OptimizerConfig: {
        "lr_max": 1e-3, "lr_min": 1e-4, "warmup_steps": 0, "total_steps": 1000, "beta1": 0.9, "beta2": 0.95,
        "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0,
    },
    SamplingConfig: {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0},
    RunConfig: {
        "save_every": None, "save_minutes": None, "keep_last": 3, "keep_best": 1, "eval_every": None,
        "eval_batches": None, "log_every": 10,
    },
}  # fmt: skip


TOKENIZER: dict[str, Any] = {
    "special_tokens": ("<|endoftext|>",), "pattern": "gpt2", "vocab": None, "ignore_merges": False,
    "normalization": None, "prompt_prefix": (), "end_token": "<|endoftext|>", "fast": True, "added_tokens": (),
    "folder": None,
}  # fmt: skip


def _defaults() -> int:
    """Each by its type, too: False is not 0."""
    wrong = 0
    parameters = inspect.signature(Tokenizer).parameters
    for name, value in TOKENIZER.items():
        wrong += repr(parameters[name].default) != repr(value)
    for config, wanted in DEFAULTS.items():
        missing = dataclasses.MISSING
        found = {f.name: f.default for f in dataclasses.fields(config) if f.default is not missing}
        names = found.keys() | wanted.keys()
        wrong += sum(repr(found.get(name, missing)) != repr(wanted.get(name, missing)) for name in names)
    return wrong


def _presets() -> int:
    found = {name: tuple(getattr(cfg, field) for field in FIELDS) for name, cfg in PRESETS.items()}
    plain = all((c.model_type, c.rope_scaling, c.sliding_window) == ("llama", None, None) for c in PRESETS.values())
    return sum(found.get(name) != SHAPES.get(name) for name in found.keys() | SHAPES.keys()) + (not plain)


STEPS = (0, 9, 10, 99, 100, 99_999_999, 100_000_000, 1_000_000_005)


def _checkpoints(folder: Path) -> int:
    """Numbers of steps of every length: the newest of the first so many, and what a run keeps of all."""
    wrong = 0
    losses: dict[int, float] = dict(zip(STEPS, (3.0, 1.0, math.nan, 0.5, 2.0, 2.5, 4.0, 9.0), strict=True))
    for n in range(1, len(STEPS) + 1):
        run = folder / f"newest-{n}"
        for step in STEPS[:n]:
            (run / f"step-{step:08d}").mkdir(parents=True)
            (run / f"step-{step:08d}" / "state.json").write_text("{}", encoding="utf-8")
        (run / "step-2000000000").mkdir()  # a save that was cut off
        wrong += latest_checkpoint(run) != run / f"step-{STEPS[n - 1]:08d}"
    for last, best, n in itertools.product((0, 1, 3), (0, 1, 2), (1, 2, 3, 4, len(STEPS))):  # fewer than are kept, too
        run, steps = folder / f"kept-{last}-{best}-{n}", STEPS[:n]
        for step, loss in list(losses.items())[:n]:
            (run / f"step-{step:08d}").mkdir(parents=True)
            settings = {} if math.isnan(loss) else {"evaluation": {"loss": loss}}
            content = {"format": 1, "step": step, "adam_count": 0, "files": {}, "settings": settings}
            (run / f"step-{step:08d}" / "state.json").write_text(json.dumps(content), encoding="utf-8")
        prune_checkpoints(run, last, best)
        good = sorted((step for step in steps if not math.isnan(losses[step])), key=lambda step: losses[step])[:best]
        kept = {*good, *steps[-last:]} if last else set(steps)
        wrong += {x.name for x in run.glob("step-*")} != {f"step-{step:08d}" for step in kept}
    return wrong


def _logs(folder: Path) -> int:
    """A log of steps, evaluations and resumptions that is opened again after an earlier step: later rows go."""
    wrong = 0
    rows: list[dict[str, Any]] = []
    for step in range(1, 7):
        rows.append({"step": step, "loss": 1.0 / step})
        if step % 2 == 0:
            rows.append({"event": "evaluation", "step": step, "loss": 2.0 / step})
        if step == 3:
            rows.append({"event": "extend", "step": 3, "total_steps": 6})
    rows.append({"event": "end", "step": 6})
    for after in range(1, 7):
        path = folder / f"log-{after}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "lo', encoding="utf-8")
        with RunLog(path, after) as log:
            log.write({"step": 99, "loss": 5.0})
        found = [row for row in read_log(path) if row.get("event") != "start"]
        wrong += found != [*(row for row in rows if row["step"] <= after), {"step": 99, "loss": 5.0}]
        wrong += sum(row.get("event") == "start" and row["step"] == after for row in read_log(path)) != 1
    return wrong


# Odd digits, an exponent, both signs of rounding; integers of any size.
FLOATS, INTEGERS = (0.1234567890123, 1e-12, 0.999999999, 3.0), (1, 12, 1_234_567)


def _toml(folder: Path) -> int:
    """Every setting of a training run that is a number, on the command line and in a file."""
    program, wrong = load_script("train"), 0
    make_parser = program.make_train_parser
    for action in make_parser()._actions:
        values = {"float": FLOATS, "int": INTEGERS}.get(getattr(action.type, "__name__", "").split(" ")[0], ())
        for value in values:
            path = folder / "run.toml"
            path.write_text(f"{action.dest} = {value!r}\n", encoding="utf-8")
            given = vars(program.parse_with_toml(make_parser(), ["--config", str(path)]))
            wrong += given[action.dest] != value
            given = vars(make_parser().parse_args([action.option_strings[0], repr(value)]))
            wrong += given[action.dest] != value
    return wrong


def _counts(s: Settings) -> int:
    """How often each id occurs and how long documents are, whatever the pieces are that data is read in."""
    read, wrong, rng = load_script("inspect_data").read, 0, np.random.default_rng((s.seed, 37))
    tokens = rng.integers(0, 6, 50)
    for end, piece in itertools.product((None, 0, 3, 5, 9), (1, 7, 25, 49, 50, 100)):
        with mock.patch.dict(read.__globals__, PIECE=piece):
            counts, lengths = read(tokens, end)
        at = [i + 1 for i, token in enumerate(tokens) if token == end]
        at = [0, *at, *([len(tokens)] if len(tokens) not in at else [])]
        wrong += lengths.tolist() != [b - a for a, b in itertools.pairwise(at)]
        wrong += counts.tolist() != [int((tokens == i).sum()) for i in range(len(counts))]
    return wrong


def _ends() -> int:
    """Any token can end a document or an answer: the first of all, too."""
    wrong, values = 0, (None, 0, 1, 7, 2**31 - 1)
    for document, turn in itertools.product(values, values):
        roles = {"document_end": document, "turn_end": turn}
        wrong += set(trained_ends({"roles": roles})) != {x for x in (document, turn) if x is not None}
    refused = ("7", -1, True, 2.0, 2**31)
    return wrong + sum(trained_ends({"roles": {"document_end": x}}) != [] for x in refused) + len(trained_ends({}))


def _prompts(s: Settings) -> int:
    """Prompts of unequal lengths at the limit of the positions, the longest at every place."""
    wrong, limit = 0, s.cfg.max_position_embeddings
    for longest, new, at in itertools.product((1, limit - 2, limit - 1, limit), (1, 2), range(3)):
        lengths = [1, 1, 1]
        lengths[at] = longest
        prompts = [[(i + 1) % s.cfg.vocab_size] * n for i, n in enumerate(lengths)]
        try:
            padded, found = check_prompts(prompts, s.cfg, new)
        except UserError:
            wrong += longest + new <= limit
            continue
        wanted = np.zeros((3, longest), int)
        for i, prompt in enumerate(prompts):
            wanted[i, : len(prompt)] = prompt
        wrong += longest + new > limit or found.tolist() != lengths or not np.array_equal(padded, wanted)
    for bad in ([], [[]], [[1], []], [[1], [0, s.cfg.vocab_size]], [[-1]]):
        wrong += not refuses(check_prompts, bad, s.cfg, 1)
    return wrong


def _not_finite() -> int:
    """NaN or an infinity at the first, the last and some other number of tensors of every rank, a large one too."""
    wrong, rng = 0, np.random.default_rng(3)
    for shape in ((1,), (7,), (3, 5), (2, 3, 4), (2049, 2049)):
        x = np.zeros(shape, np.float32)
        wrong += refuses(check_finite, "x", x)
        for at in {0, x.size - 1, int(rng.integers(x.size))}:
            x.flat[at] = rng.choice([np.nan, np.inf, -np.inf])
            try:
                check_finite("x", x)
                wrong += 1
            except UserError as error:
                wrong += f"at {[int(i) for i in np.unravel_index(at, shape)]}" not in str(error)
            x.flat[at] = 0.0
    with mock.patch.object(tensor_files, "CHECKED_AT_ONCE", 4):  # every place of several pieces
        for size, at in itertools.product((4, 5, 9), range(9)):
            x = np.zeros(size, np.float32)
            x[at % size] = np.nan
            wrong += not refuses(check_finite, "x", x)
    return wrong


def _windows(s: Settings) -> int:
    """Documents of every length around a window's, with nothing, one id and several before a text."""
    wrong, rng = 0, np.random.default_rng((s.seed, 35))
    for length, before in itertools.product((3, 4, 7), (0, 1, 2, 3)):
        documents = [rng.integers(1, 90, n).tolist() for n in (1, 2, length - 1, length, length + 1, 2 * length, 17)]
        context = rng.integers(90, 96, before).tolist()
        longest = len(context) + 1  # of two short documents: windows are no longer than they must be
        short = DocumentEvaluation([[1, 2], [3]], context, 1000, 2, 1).seq_len
        evaluation = DocumentEvaluation(documents, context, length, 2, 1)
        wrong += (evaluation.seq_len != length) + (not longest <= short < 100)
        rows = [row for batch in evaluation.batches() for row in zip(*batch, strict=True)][: evaluation.n_rows]
        wanted = list(zip(*spec_run.rolling_rows(documents, context, length), strict=True))
        differ = (
            any(not np.array_equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(rows, wanted, strict=False)
        )
        wrong += len(rows) != len(wanted) or any(differ)
        wrong += evaluation.n_targets != sum(int((y != spec_run.IGNORE_INDEX).sum()) for _, y in wanted)
    return wrong


def _long_words(s: Settings) -> int:
    """Words of every size, up to some hundred bytes, with merges some of which stand before those that they need."""
    wrong, rng = 0, np.random.default_rng((s.seed, 36))
    for _ in range(12):
        tokens, merges = [b"a", b"b", b"c"], set()
        for _ in range(12):
            a, b = (tokens[int(i)] for i in rng.integers(0, len(tokens), 2))
            if a + b not in (x + y for x, y in merges):  # a token has one id
                merges.add((a, b))
            tokens = [b"a", b"b", b"c", *(a + b for a, b in sorted(merges) if len(a + b) < 5)]
        order = [sorted(merges)[i] for i in rng.permutation(len(merges))]
        tokenizer = Tokenizer(order, fast=False)
        for n in (1, 3, 20, 255, 256, 300):
            word = "".join(rng.choice(list("abc"), n))
            wrong += tokenizer.encode(word) != _replayed(word.encode(), order)
        for a, b in order:  # what is joined at the very start and at the very end of a long word
            pair = (a + b).decode()
            for word in (pair + "c" * 256, "c" * 256 + pair):
                wrong += tokenizer.encode(word) != _replayed(word.encode(), order)
    return wrong


def _replayed(word: bytes, merges: list[tuple[bytes, bytes]]) -> list[int]:
    """The ids of a word: whichever pair stands first among the merges is joined, the leftmost of several, until none
    is there.
    """
    tokens = [word[i : i + 1] for i in range(len(word))]
    while found := [merges.index(pair) for pair in itertools.pairwise(tokens) if pair in merges]:
        at = next(i for i, pair in enumerate(itertools.pairwise(tokens)) if pair == merges[min(found)])
        tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]
    number = {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    return [number[x] if len(x) > 1 else x[0] for x in tokens]


# --- a Hugging Face folder, written by hand: every byte a token, no merges

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|bos|>", "<|endoftext|>", "<turn>")
ADDED = ("<tool>", "đé")  # text, and one token each
NAMES = {"eos_token": "<|im_end|>", "bos_token": "<|bos|>"}
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a thought, which no conversation has; contents are written as JSON.
INDENTED = (
    "{% for m in messages %}\n    {% if true %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n    {% endif %}\n"
    "{% endfor %}\n  {% if add_generation_prompt %}\n<|im_start|>assistant\n\n  {% endif %}"
)
THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content | tojson }}{% else %}"
    "<|im_end|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)


def _letters() -> list[str]:
    """The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(b if b in printable else next(others)) for b in range(256)]


def _folder(path: Path, template: str, lacks: str = "") -> Path:
    """lacks: letters of bytes that are not in its vocabulary."""
    path.mkdir(parents=True, exist_ok=True)
    letters = [x for x in _letters() if x not in lacks]
    added = [
        {"id": len(letters) + i, "content": text, "special": text in SPECIAL, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, text in enumerate((*SPECIAL, *ADDED))
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {letter: i for i, letter in enumerate(letters)}, "merges": [],
        },
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **NAMES}
    for name, x in (("tokenizer.json", content), ("tokenizer_config.json", config)):
        (path / name).write_text(json.dumps(x), encoding="utf-8")
    return path


def _tokenizers(path: Path) -> list[Any]:
    """The folder's tokenizer without the tokenizers library, and through it, if it is installed."""
    find = importlib.util.find_spec
    with mock.patch.object(importlib.util, "find_spec", side_effect=lambda x: None if x == "tokenizers" else find(x)):
        plain = open_tokenizer(path)
    return [plain, *([HfTokenizer(path)] if find("tokenizers") is not None else [])]


def _bytes_of_ids(tokenizers: list[Any]) -> int:
    """A special token stands for no text, another added one for its own bytes, not its characters."""
    wanted = [1] * 256 + [0] * len(SPECIAL) + [len(x.encode()) for x in ADDED]
    found = [list(one.byte_lengths()) for one in tokenizers]
    return sum(x != wanted for x in found)


def _lacking(folder: Path) -> int:
    """A text loses the bytes that no token stands for, in words of every length."""
    wrong, kept = 0, [b for b in range(256) if b not in b"bX"]
    for one in _tokenizers(_folder(folder / "lacking", PLAIN, lacks="bX")):
        for text in ("abc", "b", "bXb", "X a", "ab" * 200, "cab" * 100 + "X"):
            wrong += one.encode(text) != [kept.index(b) for b in text.encode() if b in kept]
    return wrong


def _fingerprints(folder: Path) -> int:
    """The hash of the file that has the vocabulary; not of what else is in the folder."""
    wrong, found = 0, set()
    for name, lacks in (("one", ""), ("two", "b")):
        path = _folder(folder / f"fingerprint-{name}", PLAIN, lacks)
        wanted = hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest()
        wrong += sum(one.fingerprint() != wanted for one in _tokenizers(path))
        found.add(wanted)
        (path / "generation_config.json").write_text("{}", encoding="utf-8")
        wrong += sum(one.fingerprint() != wanted for one in _tokenizers(path))
    return wrong + (len(found) < 2)


def _ends_of_folders(folder: Path) -> int:
    """A turn ends with what the template writes after it; a document with the end of the text, if there is one beside
    it.
    """
    wrong = 0
    nameless = _folder(folder / "nameless", PLAIN)
    (nameless / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    wrong += sum(one.turn_end is not None for one in _tokenizers(nameless))
    for number, (eos, turn) in enumerate(
        (("<|im_end|>", "<|im_end|>"), ("<turn>", "<turn>"), ("<turn>", "<|im_end|>"))
    ):
        path = _folder(folder / f"ends-{number}", PLAIN.replace("<|im_end|>", turn))
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        (path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": eos}), encoding="utf-8")
        document = _ids("<|endoftext|>" if eos == turn else eos)  # an eos that ends no turn ends documents
        for one in _tokenizers(path):
            wrong += ([one.end_of_text], [one.turn_end]) != (document, _ids(turn))
    return wrong


QUESTIONS = ("Say 4", 'naïve 你好 "quoted" <&>', "a <|im_end|> b", "<think>", "assistant\n")
ANSWERS = ("four", "<table>", "<think>\n", "no <|im_end|><|im_start|>!", "é<tool>đé", "\u205d", "assistant")


def _conversations(folder: Path) -> int:
    """Questions and answers in two templates, special tokens written out among them, which stay text."""
    wrong = 0
    start, end, bos = SPECIAL[:3]
    for number, template in enumerate((PLAIN, INDENTED, THOUGHT)):
        for tokenizer in _tokenizers(_folder(folder / f"chat-{number}", template)):
            reader = ExampleReader(tokenizer, chat=True)
            if number == 0:  # special tokens that a text is said to have are those tokens
                question, answer = f"a{end}b", f"{bos}c"
                head = _ids(start), _text("user\na"), _ids(end), _text("b"), _ids(end), _text("\n"), _ids(start)
                head, tail = (*head, _text("assistant\n")), (_ids(bos), _text("c"), _ids(end), _text("\n"))
                found = ExampleReader(tokenizer, chat=True, parse_special=True)(question, answer)
                wrong += found != tuple(list(itertools.chain(*part)) for part in (head, tail))
            for question, answer in itertools.product(QUESTIONS, ANSWERS):
                if template is not THOUGHT:
                    head = _ids(start), _text(f"user\n{question}"), _ids(end), _text("\n"), _ids(start)
                    head, tail = (*head, _text("assistant\n")), (_text(answer), _ids(end), _text("\n"))
                else:
                    head = _ids(bos), _ids(start), _text(json.dumps(question, ensure_ascii=False)), _ids(end)
                    opened = answer.startswith(
                        "<think>\n"
                    )  # then the conversation begins as the generation prompt does
                    head = (*head, _text("<think>\n" if opened else ""))
                    tail = _text(answer.removeprefix("<think>\n")), _ids(end)
                found = reader(question, answer)
                wrong += found != tuple(list(itertools.chain(*part)) for part in (head, tail))
    return wrong


def _ids(token: str) -> list[int]:
    return [256 + (*SPECIAL, *ADDED).index(token)]


def _text(text: str) -> list[int]:
    """The ids of a text: bytes, but for the added tokens that are text."""
    return [i for piece in pieces_at(text, ADDED) for i in (_ids(piece) if piece in ADDED else piece.encode())]

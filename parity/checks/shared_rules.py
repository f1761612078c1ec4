"""Rules that both sides share, each written a second time: counts, texts of tables, merges, files, clocks.

Rows of the check `bookkeeping`, with those of `parity.checks.bookkeeping`.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import regex

from llm_common.config import ExecutionConfig, OptimizerConfig, Recipe, RunConfig, TrainConfig
from llm_common.data.answers import ExampleReader
from llm_common.data.datasets import write_tokens
from llm_common.data.evaluation import Evaluation
from llm_common.data.sequences import DocumentEncoder, resolve_token
from llm_common.data.shards import id_dtype
from llm_common.errors import UserError
from llm_common.files.export import export
from llm_common.files.tensor_files import plan_shards
from llm_common.run import folder as run_folder
from llm_common.run.estimates import attention_flops, decode_bytes, flops_per_step
from llm_common.run.settings import check_resumable, run_settings, well_formed_settings
from llm_common.text import bpe_reference, records
from llm_common.text.bpe_trainer import count_words, learn_merges
from llm_common.text.corpus import Corpus
from llm_common.text.hf_tokenizer import companions
from llm_common.text.tokenizer import Tokenizer
from llm_common.text.words import PATTERNS, blocks
from parity import spec, spec_run
from parity.checks.streams import pieces_at
from parity.core.compare import Row, refuses, shared
from parity.core.inputs import random_weights, start_state, variants
from parity.core.workshop import END, call, load_script
from parity.sides.settings import Settings

# How published tokenizers cut a text into words, as their own files say. smollm2: GPT-2's, after digits are set apart.
WORDS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
NAMED = "generation_config.json"
SAMPLES = (
    "a  1", "a   12 3", "x 12345,  67", "don't DON'T we'LL it'S", "  two\n\n three \n", "=== ---\n\n", "naïve 你好 12",
    "end  ", "\ttab\t9", "e\u0301 cafe\u0301s", "a\u00a0b", "'s 're''ve",
)  # fmt: skip


def rule_rows(s: Settings, folder: Path, tokenizers: list[Any]) -> Iterator[Row]:
    """All of them, in a folder of their own. tokenizers: of a Hugging Face folder."""
    row = lambda item, wrong, place: shared("bookkeeping", item, wrong, place=place)
    for place, wrong in _counts(s).items():
        yield row(f"what {place} counts", wrong, place)
    yield row("settings that make another run", _settings(s), "settings.differences")
    yield row("settings of a form that no run gives", _forms(), "settings.well_formed_settings")
    yield row("tokenizers that are saved and read again", _saved(folder), "Tokenizer.load")
    yield row("words of published patterns", _words(), "PATTERNS")
    yield row("texts of a table with line breaks", _tables(folder), "csv_records")
    yield row("sizes at which something else is chosen", _sizes(), "id_dtype, summary")
    yield row("records that are refused, by their place", _refused(folder), "records")
    yield row("merges of runs of one sign", _runs(), "learn_merges")
    yield row("ids of texts that are composed first", _composed(), "Tokenizer (NFC)")
    yield row("tokens named by a number", _named(), "resolve_token")
    yield row("special tokens in examples, which stay text", _examples(), "answer_encoder")
    yield row("ends that stand inside documents", _ends_inside(folder), "write_tokens")
    yield row("ends that a folder names for generation", _generation(s, folder, tokenizers), "companions")
    yield row("files that tensors are divided into", _files(s), "plan_shards")
    yield row("checkpoints by the clock", _clock(s, folder), "Run.after_step")
    yield row("flags beside a TOML file", _flags(folder), "parse_with_toml")
    yield row("merges of a corpus without its special token", _trained(folder), "train_tokenizer.py")


def _counts(s: Settings) -> dict[str, int]:
    wrong: dict[str, int] = dict.fromkeys(("num_parameters", "attention_flops", "flops_per_step", "decode_bytes"), 0)
    tied = dataclasses.replace(s.cfg, tie_word_embeddings=True)
    for cfg in (*variants(s.cfg).values(), tied):
        shapes = spec.weight_shapes(cfg)
        parameters = sum(math.prod(shape) for shape in shapes.values())
        wrong["num_parameters"] += cfg.num_parameters() != parameters
        # each weight of a product once for a token: all but gains, biases and a table that is looked up
        of_products = sum(math.prod(x) for name, x in shapes.items() if len(x) == 2 and "embed" not in name)
        of_products += math.prod(shapes["model.embed_tokens.weight"]) * cfg.tie_word_embeddings
        for length in (1, 3, 4, 5, 9):
            train = TrainConfig(batch_size=2, seq_len=length)
            window = cfg.sliding_window or length
            pairs = sum(min(t + 1, window) for t in range(length))  # each a product with k and one with v
            wanted = 3 * 2 * 2 * 2 * pairs * cfg.num_hidden_layers * cfg.num_attention_heads * cfg.head_dim
            wrong["attention_flops"] += not np.isclose(attention_flops(cfg, train), wanted, rtol=1e-12)
            wanted += 6 * of_products * 2 * length
            wrong["flops_per_step"] += not np.isclose(flops_per_step(cfg, train), wanted, rtol=1e-12)
            # all weights but a table in which one row is looked up; k and v of every position before
            read = parameters - (0 if cfg.tie_word_embeddings else math.prod(shapes["model.embed_tokens.weight"]))
            read += 2 * 3 * length * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim
            for dtype, size in (("float64", 8), ("float32", 4), ("bfloat16", 2)):
                wrong["decode_bytes"] += decode_bytes(cfg, 3, length, dtype) != size * read
    return wrong


# Of what a run is made, a value that is not the default; what may change from one start to the next.
OTHER: dict[str, Any] = {
    "seed": 5, "batch_size": 3, "seq_len": 7, "compute_dtype": "bfloat16", "document_separator": 4, "lr_max": 0.5,
    "lr_min": 5e-5, "warmup_steps": 4, "beta1": 0.5, "beta2": 0.6, "eps": 1e-3, "weight_decay": 0.7,
    "max_grad_norm": 9.0, "tokens": 2, "sha256": "b", "order": 3,
}  # fmt: skip
MAY_CHANGE = {
    "attention_backend": "reference", "gradient_accumulation_steps": 2, "loss_chunks": 2, "remat": "full",
    "compile": "off", "scan_layers": True, "deterministic": True, "max_skipped_steps": 3, "total_steps": 2000,
}  # fmt: skip


@dataclasses.dataclass
class _NoBatches:
    """A dataset that is asked for its fingerprint alone."""

    tokens: int = 1
    sha256: str = "a"
    order: int = 2

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> Any:
        raise NotImplementedError("no step is made")

    def fingerprint(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _settings(s: Settings) -> int:
    """Every field by itself: whether a run that was begun without it may go on with it. And fewer steps, which no run
    takes.
    """

    def of(**fields: Any) -> dict[str, Any]:
        take = lambda kind: kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})
        cfg = dataclasses.replace(s.cfg, max_position_embeddings=256)
        recipe = Recipe(cfg, *map(take, (TrainConfig, OptimizerConfig, ExecutionConfig)))
        return json.loads(json.dumps(run_settings(recipe, take(_NoBatches))))

    stops = lambda **fields: refuses(check_resumable, Path("run"), of(), of(**fields))
    wrong = sum(not stops(**{key: x}) for key, x in OTHER.items())
    wrong += sum(stops(**{key: x}) for key, x in MAY_CHANGE.items())
    declared = {f.name for kind in (TrainConfig, OptimizerConfig, ExecutionConfig) for f in dataclasses.fields(kind)}
    return wrong + stops() + (not stops(total_steps=999)) + len(declared - {*OTHER, *MAY_CHANGE})


def _forms() -> int:
    good: dict[str, Any] = {"train": {}, "optimizer": {}, "data": {}, "segments": [{}, {}]}
    bad = [{**good, key: x} for key in ("train", "optimizer", "data", "segments") for x in (None, 3, "x", True, "[]")]
    bad += [{**good, "segments": x} for x in ({"a": {}}, [3], [{}, []])]
    bad += [{**good, key: []} for key in ("train", "optimizer", "data", "roles", "evaluation")]
    found = [well_formed_settings(x) for x in (good, {}, *bad, [], None, 3)]
    return sum(a != b for a, b in zip(found, [True, True, *[False] * (len(bad) + 3)], strict=True))


def _saved(folder: Path) -> int:
    """Every setting that decides ids: the file, written by hand, too; what is read from it; its fingerprint."""
    merges, letters = [(b"a", b"b"), (b"ab", b"c")], {i: bytes([i * 7 % 256]) for i in range(256)}
    vocab, wrong = letters | {260: b"ab", 258: b"abc"}, 0
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"ignore_merges": True},
        {"normalization": "NFC"},
        {"pattern": "llama3"},
        {"prompt_prefix": [END]},
        {"special_tokens": [END, "<x>"], "end_token": "<x>"},
        {"added_tokens": ["<x>"]},
    )
    for fields in cases:
        one = Tokenizer(merges, vocab=vocab, fast=False, **fields)
        one.save(folder / "saved.json")
        special, added = fields.get("special_tokens", [END]), fields.get("added_tokens", [])
        numbers = {text: 261 + i for i, text in enumerate([*special, *added])}
        content = {
            "format": 1,
            "pattern": fields.get("pattern", "gpt2"),
            "special_tokens": {text: numbers[text] for text in special},
            "merges": ["61 62", "6162 63"],
            "vocab": {str(i): token.hex() for i, token in vocab.items()}
            | {str(i): text.encode().hex() for text, i in numbers.items()},
        }
        as_given = ("ignore_merges", "normalization", "prompt_prefix", "end_token")
        content |= {key: fields[key] for key in as_given if key in fields}
        content |= {"added_tokens": {text: numbers[text] for text in added}} if added else {}
        written = json.dumps(content, indent=0)
        wrong += (folder / "saved.json").read_text(encoding="utf-8") != written
        wrong += one.fingerprint() != hashlib.sha256(written.encode()).hexdigest()
        again = Tokenizer.load(folder / "saved.json")
        for text in ("abc abcab", "e\u0301 <x>", f"q{END}abc"):
            ids = one.encode(text)
            wrong += again.encode(text) != ids or again.decode(ids) != one.decode(ids)
        wrong += (one.end_of_text, one.prompt_prefix) != (again.end_of_text, tuple(again.prompt_prefix))
    return wrong


def _words() -> int:
    """Every pattern on texts of spaces, digits, contractions, line breaks and marks."""
    wrong = 0
    for name, text in itertools.product(PATTERNS, SAMPLES):
        pieces = regex.split(r"(\p{N})", text) if name == "smollm2" else [text]
        wanted = [word for piece in pieces for word in regex.findall(WORDS.get(name, WORDS["gpt2"]), piece)]
        wrong += regex.findall(PATTERNS[name], text) != wanted
    return wrong


def _tables(folder: Path) -> int:
    """Rows as Python's own reader has them."""
    texts = ["one \n two\t\n\nthree", 'quoted "x", y', " lead and trail ", "你好 \r\n café", "plain"]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["n", "text"])
    writer.writerows(enumerate(texts))
    (folder / "table.csv").write_text(file.getvalue(), encoding="utf-8", newline="")
    wanted = [row["text"] for row in csv.DictReader(io.StringIO(file.getvalue(), newline=""))]
    found = list(Corpus([folder / "table.csv"]).documents())
    clean = lambda text: text.replace("\r\n", "\n")
    return sum(clean(a) != clean(b) for a, b in itertools.zip_longest(found, wanted, fillvalue="(none)"))


def _sizes() -> int:
    """The dtype of a file of ids, on both sides of 2^16; the perplexity of a loss that is beyond all numbers."""
    wrong = 0
    for more, wanted in ((0, np.uint16), (2**16 - 257, np.uint16), (2**16 - 256, np.uint32)):
        vocab = {i: bytes([i]) for i in range(256)} | ({256 + more - 1: b"ab"} if more else {})
        one = Tokenizer([], vocab=vocab, fast=False)
        wrong += (id_dtype(one) is not wanted) + (one.plain_vocab_size != max(vocab) + 1)
    evaluation = Evaluation(np.arange(4, dtype=np.int32), 3, 1)
    for loss in (0.5, 30.0, 5000.0):
        wrong += evaluation.summary(3 * loss, 3)["perplexity"] != math.exp(min(loss, 700.0))
    return wrong


# A file's name, its contents, and where its error is, or nothing if it is read.
RECORDS = (
    ("good.jsonl", '{"text": "a"}\n\n{"text": "b"}\n', ""),
    ("bad.jsonl", '{"text": "a"}\n{"text": b}\n', "line 2:"),
    ("gap.jsonl", '{"text": "a"}\n\n[1, 2\n', "line 3:"),
    ("deep.jsonl", '{"text": "a"}\n' + "[" * 100_000 + "\n", "line 2:"),
    ("bad.json", '[{"text": "a"}, {"text": b}]', "record 2:"),
    ("two.json", '{"text": "a"}\n{"text": "b"}\n{"text" "c"}', "record 3:"),
    ("cut.json", '[{"text": "a"}', "cut off:"),
    ("wide.csv", "text,n\na,1\nb,2,3\n", "line 3:"),
    ("twice.csv", "text,text\na,b\n", "twice.csv:"),
    ("unit.jsonl", json.dumps({"text": "x" * 28}) + "\n", ""),  # 40 characters, as many as a line may have below
    ("long.jsonl", json.dumps({"text": "x" * 40}) + "\n", "long.jsonl:"),
)


def _refused(folder: Path) -> int:
    wrong = 0
    for name, content, where in RECORDS:
        (folder / name).write_text(content, encoding="utf-8")
        limit = 40 if name in ("unit.jsonl", "long.jsonl") else records.LARGEST_RECORD
        with (
            mock.patch.object(records, "LARGEST_RECORD", limit),
            mock.patch.object(Corpus._bytes, "__defaults__", (16,)),
        ):
            try:
                found, text = len(list(Corpus([folder / name]).documents())), ""
            except UserError as error:
                found, text = 0, str(error)
        wrong += (where not in text) if where else (found != content.count("text") or text != "")
    return wrong


def _runs() -> int:
    """Rows of spaces, dashes and pairs of letters, of many lengths: pairs that overlap themselves."""
    texts = [f"{sign * n} x" for sign in ("-", " ", "ab", "aab") for n in (1, 2, 3, 5, 8, 9, 16, 17, 31, 40)] * 3
    wanted = bpe_reference.train(texts, 60, END)
    words = count_words(texts, [END], "gpt2")
    return sum(learn_merges(words, 60, "greater-bytes", many=many) != wanted for many in (0, 3, 10**9))


def _composed() -> int:
    """Texts not in NFC, in blocks with a border at every place, and where each of their ids ends."""
    tokenizer, wrong = Tokenizer([], fast=False, normalization="NFC"), 0
    for text in ("cafe\u0301 a\u0308b", "e\u0301\u0302x", "\u1112\u1161\u11ab yo", "plain"):
        wanted = list(unicodedata.normalize("NFC", text).encode())
        wrong += tokenizer.encode(text) != wanted
        for size, block in itertools.product((1, 2, 3, len(text)), (1, 2, 3, 100)):
            pieces = [text[i : i + size] for i in range(0, len(text), size)]
            wrong += list(tokenizer.encode_iterable(pieces, block)) != wanted
        ids, ends = tokenizer.encode_with_ends(text)
        normal = unicodedata.normalize("NFC", text)
        for size in range(1, len(text)):  # a long text is worked on in blocks
            wrong += "".join(unicodedata.normalize("NFC", block) for block in blocks(text, size)) != normal
        behind = {unicodedata.normalize("NFC", text[:i]): i for i in range(len(text) + 1)}  # the last of several
        places = [behind[normal[: i + 1]] for i, c in enumerate(normal) for _ in c.encode()]
        wrong += ids != wanted or list(ends) != places
    return wrong


def _named() -> int:
    """A token's text goes before its id; a number that is no token's text is an id."""
    tokenizer = Tokenizer([], [END, "17", "<x>"], fast=False)
    cases = {"17": 257, "7": ord("7"), "30": 30, "<x>": 258, "257": 257, END: 256, "none": None}
    wrong = sum(resolve_token(tokenizer, text, "`turn_end`") != wanted for text, wanted in cases.items())
    for text in ("<y>", "259", "0000000005"):  # no token's text, and no id
        wrong += not refuses(resolve_token, tokenizer, text, "`turn_end`")
    return wrong


def _examples() -> int:
    """Without a chat template."""
    tokenizer, wrong = Tokenizer([], [END, "<x>"], fast=False), 0
    for question, answer in (("a <x> b ", "yes"), ("q ", f"no {END} <x>"), ("plain ", "text")):
        for parse in (False, True):
            reader = ExampleReader(tokenizer, parse_special=parse)
            of = lambda text, parse=parse: _with_special(text) if parse else list(text.encode())
            wrong += reader(question, answer) != (of(question), [*of(answer), 256])
    return wrong


def _with_special(text: str) -> list[int]:
    tokens = {END: [256], "<x>": [257]}
    return [i for piece in pieces_at(text, (*tokens,)) for i in tokens.get(piece, piece.encode())]


def _ends_inside(folder: Path) -> int:
    """Of each file by itself, though one encoder writes several."""
    encoder, wrong = DocumentEncoder(Tokenizer([], fast=False), str(ord("e"))), 0
    for i, texts in enumerate((["here", "eel"], ["no"], ["e", "tree"])):
        said = write_tokens(folder / f"inside-{i}.npy", texts, encoder)
        wrong += said["document_ends_inside"] != sum(text.count("e") for text in texts)
    return wrong


def _generation(s: Settings, folder: Path, tokenizers: list[Any]) -> int:
    """The tokenizer's own end and those that the data of a run ended with, beside a checkpoint and in an export."""
    wrong, cfg = 0, dataclasses.replace(s.cfg, num_hidden_layers=1, vocab_size=300, model_type="llama")
    weights = random_weights(dataclasses.replace(cfg, sliding_window=None), s.seed, "float32")
    for number, one in enumerate((Tokenizer([], fast=False), *tokenizers)):
        for stops in ((), (7,), (7, 0), (256,)):
            out = folder / f"export-{number}-{len(stops)}-{sum(stops)}"
            export(out, dataclasses.replace(cfg, sliding_window=None), weights, one, stops=stops)
            for content in (companions(one, stops).get(NAMED, b"{}"), (out / NAMED).read_bytes()):
                named = json.loads(content).get("eos_token_id", [])
                wrong += {*(named if isinstance(named, list) else [named])} != {*one.eos_ids, *stops}
    return wrong


def _files(s: Settings) -> int:
    """In order, each as full as the next tensor lets it be."""
    wrong, rng = 0, np.random.default_rng((s.seed, 38))
    for limit in (1, 7, 20, 1000):
        sizes = {f"t{i}": int(x) for i, x in enumerate(rng.integers(1, 12, 25))}
        wrong += list(plan_shards("model.safetensors", sizes, 1, limit).values()) != spec_run.divided(sizes, limit)
    return wrong


def _clock(s: Settings, folder: Path) -> int:
    """Steps of 25 seconds and a checkpoint each minute: after the third, the sixth and the ninth."""
    now, cfg = [0.0], dataclasses.replace(s.cfg, num_hidden_layers=1)
    weights = random_weights(cfg, s.seed, "float32")
    recipe = Recipe(cfg, TrainConfig(seq_len=1), OptimizerConfig(total_steps=10))
    config, saved = RunConfig(save_minutes=1.0, keep_last=0), []
    tell = lambda row: saved.append(row["step"]) if row.get("event") == "save" else None
    run = run_folder.Run(folder / "clock", recipe, _NoBatches(), "jax", config=config, on_event=tell)
    with mock.patch.object(run_folder.time, "monotonic", side_effect=lambda: now[0]), run:
        run.resume()
        for step in range(1, 11):
            now[0] += 25.0
            state = start_state(weights, "float32")
            state.step = state.adam_count = step
            metrics = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "skipped": False}
            run.after_step(step, metrics, lambda state=state: state, lambda evaluation: (0.0, 1))
    return int(saved != [3, 6, 9])


def _flags(folder: Path) -> int:
    """A flag goes before the file, the file before the default."""
    program, wrong = load_script("train"), 0
    (folder / "beside.toml").write_text("seed = 3\n[optimizer]\nlr_max = 0.5\nlr_min = 0.25\n", encoding="utf-8")
    for flags, wanted in (([], (3, 0.5)), (["--seed", "4"], (4, 0.5)), (["--lr-max", "0.75"], (3, 0.75))):
        arguments = [*flags, "--config", str(folder / "beside.toml")]
        for order in (arguments, arguments[len(flags) :] + flags):
            args = program.parse_with_toml(program.make_train_parser(), order)
            wrong += (args.seed, args.lr_max) != wanted or (args.lr_min, args.beta1) != (0.25, 0.9)
    return wrong


def _trained(folder: Path) -> int:
    """What is not among the special tokens is text, white space too."""
    text = f"low lower{END}lowest\n\n   {END}   new  newer " * 6
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    call("train_tokenizer", "--data", folder / "corpus.txt", "--out", folder / "other.json", "--vocab-size", 277,
         "--special-tokens", "<x>", "--processes", 1)  # fmt: skip
    found = Tokenizer.load(folder / "other.json").merges
    return sum(a != b for a, b in itertools.zip_longest(found, bpe_reference.train([text], 20, "<x>")))

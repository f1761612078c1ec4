"""Checks of what the programs make of text: folders of shards, chosen ends of documents, special tokens written out,
stops.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import safetensors.numpy

from llm_common.data import shards
from parity import spec, spec_run
from parity.core.compare import Row, on_both, shared, verdict
from parity.core.workshop import CONFIG, END, FRAMEWORKS, Workshop, call, flat

PROMPT, SEED, NEW = "The low", 11, 20
DRAW = SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=18)


def text_rows(shop: Workshop, train_flags: dict[str, object]) -> Iterator[Row]:
    """All of them. train_flags: of a run in float64, without data."""
    yield _shards_row(shop)
    yield _manifest_row(shop)
    # the id that will end documents is one that a text of the initial weights has
    init = spec.initial_weights(SEED, CONFIG)
    (free,) = spec.generate(init, [shop.ids(PROMPT)], CONFIG, DRAW, NEW)
    end = free[NEW // 2]
    yield from _marked_rows(shop, end)
    yield from _stopped_rows(shop, end, train_flags)


def mismatches(found: list[int], wanted: list[int]) -> int:
    """Ids that differ, place by place, and those that one of the two lacks."""
    return sum(a != b for a, b in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))


class _Killed(BaseException):
    """In the place of a signal that ends the program."""


def _shards_row(shop: Workshop) -> Row:
    """A folder of shards: made after a kill, with some of its parts lost, and read in the order of its manifest."""
    folder = shop.folder / "web"
    arguments = ["--tokenizer", shop.folder / "bpe.json", "--data", shop.folder / "text.txt", "--out", f"{folder}/"]
    arguments += ["--part-size", 300, "--processes", 1]
    with mock.patch.object(shards, "_finish", side_effect=_Killed), contextlib.suppress(_Killed):
        call("prepare_data", *arguments)
    for record in sorted((folder / "parts").glob("0*.json"))[:2]:
        record.unlink()
    call("prepare_data", *arguments)
    manifest = json.loads((folder / "train" / "manifest.json").read_text(encoding="utf-8"))
    found = _shard_ids(folder)
    wanted = [i for text in shop.documents for i in spec_run.document([], shop.ids(text), shop.end)]
    wrong = mismatches(found, wanted) + (len(manifest["shards"]) < 3)
    tokens = shards.ShardedTokens(
        folder / "train" / "manifest.json"
    )  # slices within shards, over the border of two, and over several
    for start, stop in itertools.combinations(range(0, len(wanted) + 1, 37), 2):
        wrong += tokens[start:stop].tolist() != wanted[start:stop]
    return shared("programs", "tokens of shards after a kill", wrong, place="shards.prepare")


def _shard_ids(folder: Path) -> list[int]:
    """All ids of a folder of shards, in the order of its manifest."""
    manifest = json.loads((folder / "train" / "manifest.json").read_text(encoding="utf-8"))
    return [i for shard in manifest["shards"] for i in np.load(_file_of(folder / "train", shard)).tolist()]


def _file_of(folder: Path, shard: dict) -> Path:
    return folder / next(x for x in shard.values() if isinstance(x, str) and x.endswith(".npy"))


def _manifest_row(shop: Workshop) -> Row:
    """What the manifests say of shards, against the shards: documents that are ended by an id that stands within many
    of them.
    """
    ids = [shop.ids(text) for text in shop.documents]
    end, folder = max(ids[0], key=lambda i: sum(x.count(i) for x in ids)), shop.folder / "counted"
    call("prepare_data", "--tokenizer", shop.folder / "bpe.json", "--data", shop.folder / "text.txt",
         "--out", f"{folder}/",
         "--part-size", 300, "--processes", 1, "--validation", 0.3, "--document-end", end)  # fmt: skip
    wrong = 0
    for side in ("train", "validation"):
        held_out = side == "validation"
        mine = [n for n, text in enumerate(shop.documents) if spec_run.is_held_out(text, 0.3) == held_out]
        said = json.loads((folder / side / "manifest.json").read_text(encoding="utf-8"))
        wanted = {
            "tokens": sum(len(ids[n]) + 1 for n in mine),
            "documents": len(mine),
            "bytes": sum(len(shop.documents[n].encode()) for n in mine),
            "document_ends_inside": sum(ids[n].count(end) for n in mine),
        }
        wrong += sum(said[key] != x for key, x in wanted.items())
    return shared("programs", "counts in the manifests of shards", wrong, place="shards._write_shard")


def _marked_ids(shop: Workshop, text: str) -> list[int]:
    """The ids of a text in which a special token that is written out is that token."""
    first, *rest = (shop.ids(piece) for piece in text.split(END))
    return first + [i for ids in rest for i in (shop.end, *ids)]


def _marked_rows(shop: Workshop, end: int) -> Iterator[Row]:
    """Documents that end with an id of the user's choice, and examples; in both a special token is written out."""
    folder, common = shop.folder, ["--tokenizer", shop.folder / "bpe.json", "--special-tokens-in-text"]
    documents = [f"low{END}er 好", "wide", f"{END}newest low", "a low"]
    (folder / "marked.jsonl").write_text("\n".join(json.dumps({"text": x}) for x in documents), encoding="utf-8")
    call(
        "prepare_data",
        *common,
        "--data",
        folder / "marked.jsonl",
        "--out",
        folder / "marked.npy",
        "--document-end",
        end,
    )
    wanted = [i for text in documents for i in spec_run.document([], _marked_ids(shop, text), end)]
    wrong = mismatches(np.load(folder / "marked.npy").tolist(), wanted)
    call("prepare_data", *common, "--data", folder / "marked.jsonl", "--out", f"{folder / 'marked'}/",
         "--document-end", end, "--processes", 1)  # fmt: skip
    wrong += mismatches(_shard_ids(folder / "marked"), wanted)
    yield shared("programs", "special tokens and another end of documents", wrong, place="prepare_data.py")
    pairs = [(f"low {END} ", "lowest"), ("wide ", f"wid{END}est")]
    lines = [json.dumps({"q": q, "a": a}) for q, a in pairs]
    (folder / "pairs-marked.jsonl").write_text("\n".join(lines), encoding="utf-8")
    call("prepare_data", *common, "--data", folder / "pairs-marked.jsonl", "--out", folder / "marked.npz",
         "--prompt-field", "q", "--answer-field", "a", "--turn-end", end)  # fmt: skip
    wanted = [i for q, a in pairs for i in (*_marked_ids(shop, q + a), end)]
    wrong = mismatches(np.load(folder / "marked.npz")["tokens"].tolist(), wanted)
    yield shared("programs", "special tokens and another end of answers", wrong, place="prepare_examples")


def _stopped_rows(shop: Workshop, end: int, train_flags: dict[str, object]) -> Iterator[Row]:
    """Texts that end where the data of the run ended its documents, and where one of several texts of any lengths
    begins.
    """
    folder = shop.folder
    flags = {**train_flags, "--seed": SEED, "--total-steps": 1, "--warmup-steps": 0, "--lr-max": 1e-12,
             "--lr-min": 1e-12,
             "--data": folder / "marked.npy", "--tokenizer": folder / "bpe.json", "--batch-size": 2, "--seq-len": 4,
             "--gradient-accumulation-steps": 1, "--loss-chunks": 1,
             "--model-config": folder / "config.json"}  # fmt: skip
    draw = [
        "--device",
        "cpu",
        "--compute-dtype",
        "float64",
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        NEW,
        "--seed",
        DRAW.seed,
    ]
    on_both(
        FRAMEWORKS, lambda name: call("train", "--framework", name, "--out", folder / f"marked-{name}", *flat(flags))
    )
    weights = [
        safetensors.numpy.load_file(folder / f"marked-{name}" / "step-00000001" / "model.safetensors")
        for name in FRAMEWORKS
    ]
    prompt = shop.ids(PROMPT)
    free = [spec.generate(w, [prompt], CONFIG, DRAW, NEW)[0] for w in weights]
    ended, whole = ([shop.text(x[: x.index(end)]) for x in free], [shop.text(x) for x in free])
    # three tokens of a text; the first is given out before the third is drawn: the host looks at 16 at a time
    stop = shop.text(free[0][15:18])
    assert stop.isascii(), "another seed is needed"
    stops = [stop, "no such text", "~~"]
    cases = [
        ("where documents of its data end", [], ended),
        (
            "at one of several texts",
            ["--ignore-eos", *(x for s in stops for x in ("--stop", s))],
            [x.split(stop)[0] for x in whole],
        ),
    ]
    for what, more, wanted in cases:
        run = lambda name, more=more: call(
            "generate", "--framework", name, "--checkpoint", folder / f"marked-{name}", *draw, *more
        )
        texts = on_both(FRAMEWORKS, run)
        wrong = [
            int(text.rstrip("\n") != f"{PROMPT}{want}".rstrip("\n")) for text, want in zip(texts, wanted, strict=True)
        ]
        side = verdict(wrong[0] > 0, wrong[1] > 0, texts[0] == texts[1])
        note = f"{texts[0]!r} and {texts[1]!r} for {wanted[0]!r}" if side else ""
        place = ("generate.py (stops)" if not more else "TextStream") if side else ""
        yield Row("programs", f"a text ends {what}", "float64", max(wrong), 0, not side, side, note, place)

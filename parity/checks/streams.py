"""Text that comes in pieces: whatever their borders are, documents, ids and texts are those of the whole."""

import gzip
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np

from llm_common.text import bpe_reference
from llm_common.text.corpus import Corpus
from llm_common.text.text_stream import TextStream
from llm_common.text.tokenizer import Tokenizer
from parity.core.compare import Row, shared
from parity.core.workshop import END

# Two that begin alike, one with letters and signs, one of a single sign; END is the longest. A shorter one ends within
# a longer.
SPECIAL = ("<s>", "<|im_start|>", "<|im|>", "§", END)
ADDED = ("<tool>", "==>")  # not special: they are text, and one token each
STOPS = (("abc", "b"), ("bc", "abc"), ("c d", "abc de"), ("é",), ("zz", "d"), ("def", "de", "e"))


def stream_rows(merges: list[tuple[bytes, bytes]]) -> Iterator[Row]:
    """Readers of files, encoders of streams, bytes of tokens, texts that stop."""
    yield shared("tokenizer", "documents of files read in blocks", _files(), place="Corpus")
    yield shared(
        "tokenizer", "ids of streams with special tokens at every border", _streams(merges), place="stream_blocks"
    )
    yield shared("tokenizer", "ids whose bytes are counted wrong", _bytes(merges), place="byte_lengths")
    yield shared("tokenizer", "texts given out in pieces of characters", _pieces(merges), place="TextStream.feed")
    yield shared("tokenizer", "texts that end at another stop string", _stops(merges), place="TextStream")


def _files() -> int:
    """Documents that are wrong, of files read in blocks of every small size, a separator, a character or a quote at
    each border.
    """
    documents, wrong = ["naïve <|end", "o|f>", "你好 \"quoted, 'text'\"\nnew line", "last, one"], 0
    quoted = lambda text: '"' + text.replace('"', '""') + '"'
    contents = {
        "a.txt": END.join(documents),
        "b.jsonl": "\n".join(json.dumps({"text": x}, ensure_ascii=i % 2 == 0) for i, x in enumerate(documents)),
        "c.json": json.dumps([{"text": x} for x in documents], ensure_ascii=False),
        "d.csv": "text\n" + "\n".join(map(quoted, documents)) + "\n",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "one.txt").write_text("x", encoding="utf-8")  # the shortest document that there is
        wrong += list(Corpus([Path(folder) / "one.txt"]).documents()) != ["x"]
        wrong += ["".join(x) for x in Corpus([Path(folder) / "one.txt"]).stretches()] != ["x"]
        for name, content in contents.items():
            (Path(folder) / name).write_text(content, encoding="utf-8", newline="")
            (Path(folder) / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
            for file, size in itertools.product((name, f"{name}.gz"), (*range(1, len(END) + 4), 1 << 20)):
                with mock.patch.object(Corpus._bytes, "__defaults__", (size,)):
                    found = list(Corpus([Path(folder) / file]).documents())
                wrong += sum(a != b for a, b in itertools.zip_longest(found, documents))
    return wrong


def pieces_at(text: str, tokens: Sequence[str]) -> Iterator[str]:
    """A text cut at its tokens; at a place where several begin, the longest counts."""
    at = start = 0
    while at < len(text):
        token = max((x for x in tokens if text.startswith(x, at)), key=len, default="")
        if token:
            yield from (text[start:at], token)
            start = at + len(token)
        at += len(token) or 1
    yield text[start:]


def _ids(text: str, tokenizer: Tokenizer, merges: list[tuple[bytes, bytes]], tokens: Sequence[str]) -> list[int]:
    ids: list[int] = []
    for piece in pieces_at(text, tokens):  # the definition's one special token is none of them
        ids += [tokenizer.added[piece]] if piece in tokens else bpe_reference.encode(piece, merges, "\0")
    return ids


def _streams(merges: list[tuple[bytes, bytes]]) -> int:
    """Texts with other ids: whole, in pieces of every size, in blocks of several; special tokens read, and taken as
    text.
    """
    tokenizer, wrong = Tokenizer(merges, SPECIAL, fast=False, added_tokens=ADDED), 0
    text = (
        f"low<|im_start|>lower <s>new§er==>wide<|im|>st <|im_start <s <tool>{END}newest "
        f"<|im_sta<|im_start|>12{END[:-1]}"
    )
    for block in (1, 2, 3, 4):
        pieces = list(Tokenizer(merges, ["a.b"], fast=False).encode_iterable(["a.b", "xyz"], block))
        wrong += pieces != [256 + len(merges), *bpe_reference.encode("xyz", merges, "\0")]
    every, plain = SPECIAL + ADDED, ADDED
    expected = _ids(text, tokenizer, merges, every)
    wrong += tokenizer.encode(text) != expected
    wrong += tokenizer.encode(text, parse_special=False) != _ids(text, tokenizer, merges, plain)
    for size, block in itertools.product((1, 2, 3, 5, 7, 11, 100), (1, 4, 16)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        wrong += list(tokenizer.encode_iterable(pieces, block)) != expected
    return wrong


def _bytes(merges: list[tuple[bytes, bytes]]) -> int:
    """Ids that count other bytes of text, or its characters: a special token stands for none, another added one for its
    own.
    """
    tokenizer = Tokenizer(merges, SPECIAL, fast=False, added_tokens=ADDED)
    lengths = tokenizer.byte_lengths()
    expected = [1] * 256 + [len(a + b) for a, b in merges] + [0] * len(SPECIAL) + [len(x.encode()) for x in ADDED]
    return int(np.sum(lengths != expected)) if len(lengths) == len(expected) else len(expected)


def _pieces(merges: list[tuple[bytes, bytes]]) -> int:
    """Characters whose bytes are several tokens are given out whole, when the last of them is there; what never becomes
    one, at the end.
    """
    tokenizer, wrong = Tokenizer(merges, fast=False), 0
    for text in ("naïve 你好 low", "😀😀 é", "e\u0301x"):
        ids = tokenizer.encode(text)
        stream, out = TextStream(tokenizer), ""
        for n in range(1, len(ids) + 1):
            out += stream.feed(ids[n - 1 : n])
            complete = b"".join(tokenizer.vocab[i] for i in ids[:n]).decode("utf-8", "ignore")
            wrong += out != complete
        broken = TextStream(tokenizer)
        cut = broken.feed(ids) + broken.feed([0xE4, 0xBD], last=True)
        wrong += cut != text + "\ufffd"
    for prompt, text, n in itertools.product(
        ("", "a", "漢字漢字漢字", "low 漢字漢字x"), ("語語a", "a語", "語"), (1, 2, 20)
    ):
        before, ids = list(prompt.encode()), list(text.encode())
        stream = TextStream(_Fallback(), ("字",), before)
        wrong += "".join(stream.feed(ids[i : i + n], last=i + n >= len(ids)) for i in range(0, len(ids), n)) != text
    return wrong


class _Fallback:
    """Decodes ids that are bytes as tokenizers do that fall back to them: of a row with a broken character none is
    right.
    """

    def decode(self, ids: Sequence[int], /) -> str:
        text = ""
        for high, row in itertools.groupby(ids, key=lambda i: i > 127):
            data = bytes(row)
            try:
                text += data.decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(data) if high else ""
        return text


def _stops(merges: list[tuple[bytes, bytes]]) -> int:
    """Texts given out otherwise than as if their characters came one by one: the stop that is complete first ends a
    text.
    """
    more = [pair for pair in ((b"a", b"b"), (b"c", b" "), (b"d", b"e")) if pair not in merges]
    tokenizer, wrong = Tokenizer([*merges, *more], fast=False), 0
    text = "low xabc def é zz"
    # ids of one, two and more characters, and one that completes several stops at once
    whole = tokenizer.encode(text)
    for stops, feed in itertools.product(STOPS, (1, 2, len(whole))):
        stream = TextStream(tokenizer, stops)
        out = "".join(stream.feed(whole[i : i + feed], last=i + feed >= len(whole)) for i in range(0, len(whole), feed))
        ends = ((n, len(x)) for n in range(1, len(text) + 1) for x in stops if text[:n].endswith(x))
        end, length = min(ends, key=lambda pair: (pair[0], -pair[1]), default=(len(text), 0))
        wrong += (out, stream.stopped) != (text[: end - length], length > 0)
    return wrong

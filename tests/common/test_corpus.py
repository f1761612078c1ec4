"""Reading text: files, folders, JSONL, gzip; documents across the borders of pieces; what is damaged says where."""

import gzip
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_common.corpus import Corpus, _split
from llm_common.errors import UserError
from llm_common.records import lines_of
from llm_common.tokenizer import END_OF_TEXT


def pieces(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@given(
    parts=st.lists(st.sampled_from([END_OF_TEXT, "ab", "<|end", "|>", "\n", "é"]), max_size=20), size=st.integers(1, 9)
)
def test_documents_and_lines_do_not_depend_on_the_pieces(parts, size):
    text = "".join(parts)
    assert list(_split(pieces(text, size))) == text.split(END_OF_TEXT)
    assert list(lines_of(pieces(text, size))) == text.split("\n")


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"one\r\n{END_OF_TEXT}two".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "three\u2028"}\n\n{"text": "four", "n": 1}', encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}\n'))
    (tmp_path / "sub" / "d.md.gz").write_bytes(gzip.compress("sechs é".encode()))
    (tmp_path / "e.py").write_text("not read")
    seen = []
    corpus = Corpus([tmp_path], on_bytes=seen.append)
    expected = ["one\r\n", "two", "three\u2028", "four", "five", "sechs é"]
    assert list(corpus.documents()) == expected
    assert sum(seen) == corpus.size
    assert "".join("".join(x) for x in corpus.stretches()).replace(END_OF_TEXT, "") == "".join(expected)
    assert list(Corpus([tmp_path / "e.py"]).documents()) == ["not read"]
    (tmp_path / "f.jsonl").write_text(json.dumps({"body": "other"}))
    assert list(Corpus([tmp_path / "f.jsonl"], field="body").documents()) == ["other"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x" * 1_500_000 + b"\xff", "not UTF-8 at byte 1500000;"),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xc3x", "not UTF-8 at byte 1048575;"),
        ("a.txt", b"abc\xc3", "not UTF-8 at byte 3;"),
        ("a.txt.gz", gzip.compress(b"abc\xff", mtime=0), "not UTF-8 at byte 3 of its uncompressed content"),
        ("a.txt.gz", gzip.compress(b"abc" * 1000, mtime=0)[:-9], "damaged or cut off"),
        ("a.txt.gz", b"plain", "damaged or cut off"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}', "no text in field 'text' \\(found: body\\); name it with --field"),
        ("a.jsonl", b"[1]", "found: list"),
        ("a.txt", b"", "no text found"),
        ("a.txt", b" \n ", "no text found"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(Corpus([tmp_path / name]).documents())
    if "UTF-8" in message:
        assert "\ufffd" in "".join(Corpus([tmp_path / name], replace_invalid=True).documents())


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is permitted to root")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o000)
    with pytest.raises(UserError, match="closed: no permission"):
        Corpus([tmp_path])

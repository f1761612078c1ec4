"""Reading text: files, folders, JSONL, gzip; documents across the borders of pieces; what is damaged says where."""

import codecs
import gzip
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_common.errors import UserError
from llm_common.text.corpus import Corpus, _split, read_records
from llm_common.text.records import lines_of
from llm_common.text.tokenizer import END_OF_TEXT


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
        ("a.jsonl", b'{"body": "a"}', "no text in field 'text' \\(found: body\\); name it with `field`"),
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


RECORDS = [{"text": "a\u2028b", "n": 1}, {"text": 'c, "d"\ne', "n": 2}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=2)),
        ("a.json", "\n".join(map(json.dumps, RECORDS))),
        ("a.json", " ".join(json.dumps(x, indent=1) for x in RECORDS)),
        ("a.json", json.dumps([x["text"] for x in RECORDS])),
        ("a.JSON", json.dumps(RECORDS)),
        ("a.ndjson", "\n".join(map(json.dumps, RECORDS))),
        ("a.jsonl", "\r\n".join(map(json.dumps, RECORDS))),
        ("a.csv", 'n,text\n1,a\u2028b\n2,"c, ""d""\ne"\n'),
        ("a.csv", 'n;text\n1;a\u2028b\n2;"c, ""d""\ne"\n'),
        ("a.tsv", 'n\ttext\n1\ta\u2028b\n2\t"c, ""d""\ne"\n'),
    ],
)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("packed", [False, True])
def test_records_are_read_from_every_form_they_come_in(name, content, mark, packed, tmp_path):
    content = mark + content.encode()
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    expected = [x["text"] for x in RECORDS]
    assert list(Corpus([path]).documents()) == expected
    assert list(Corpus([tmp_path]).documents()) == expected
    assert ["".join(x) for x in Corpus([path]).stretches()] == expected
    found = [record.get("text") if isinstance(record, dict) else record for _, record in read_records(path, "text")]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}', "cut off: its array does not end"),
        ("a.json", b"[1, 2]", r"record 1: no text in field 'text' \(found: int\)"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"found: data\); name it with `field`"),
        ("a.json", b"[" * 100_000, "record 1: not JSON \\(nested too deeply"),
        ("a.json", b'[{"text": "a"} {]', "record 2: not JSON"),
        ("a.csv", b'text\n"a', "not CSV|no text"),
        ("a.csv", b"body\nx\n", r"found: body\); name it with `field`"),
        ("a.txt", codecs.BOM_UTF16_LE + "a".encode("utf-16-le"), "UTF-16, as its first bytes say"),
        ("a.txt", b"a\0b", "not text: a NUL at byte 1"),
        ("a.txt", b'{"text": "a"}\n{"text": "b"}\n', "holds JSON records, but its name does not end in"),
        ("a", b'[{"text": "a"}]', "holds JSON"),
        ("notes.ipynb", b'{\n "cells": []\n}', "holds JSON"),
        ("a.parquet", b"PAR1", "a table; write its column of text as JSONL"),
        ("a.zip", b"PK", "an archive; unpack it"),
        ("a.jsonl.zst", b"x", "compressed in a way that is not read"),
        ("a.npy", b"x", "tokens or arrays already"),
    ],
)
def test_no_file_is_read_as_what_it_is_not(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(Corpus([tmp_path / name]).documents())


def test_text_that_looks_like_records_can_be_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert list(Corpus([tmp_path / "a.txt"], as_text=True).documents()) == ['{"text": "a"}\n{"text": "b"}\n']
    (tmp_path / "a.txt").write_text("[a link](b) and\n{braces} and [1]\n")  # not JSON
    assert len(list(Corpus([tmp_path / "a.txt"]).documents())) == 1


def test_a_bomb_is_not_unpacked(tmp_path):
    for name in ("a.txt.gz", "a.jsonl.gz", "a.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b" " * (300 << 20), 1))
        with pytest.raises(UserError, match="unpacks to more than 200 times its size|a line of more than"):
            next(Corpus([tmp_path / name]).documents())


def test_a_large_file_of_json_is_read_a_record_at_a_time(tmp_path):
    records = [{"text": "x" * (i % 7) * 40_000 + str(i)} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert list(Corpus([tmp_path / "a.json"]).documents()) == [x["text"] for x in records]


@pytest.mark.parametrize("over", [-5, 0, 40, 4000])
def test_a_file_of_json_ends_anywhere(over, tmp_path):
    """The last piece that is read may be shorter than the record that waits for its end."""
    text = "ab " * ((1 << 20) // 3)
    records = [
        {"text": text[: (1 << 20) - 20 + over]},
        {"text": "c d " * 10},
        {"text": "x" * (3 << 20)},
        {"text": "end"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert list(Corpus([tmp_path / "a.json"]).documents()) == [x["text"] for x in records]


def test_a_table_with_too_many_fields_is_not_cut(tmp_path):
    for content, words in (
        ("id,text\n1,Hello, dear world\n", "line 2: 3 fields, but the first line names 2"),
        ("text,text\na,b\n", "two columns are named 'text'"),
        ("text,label\rfoo,1\r", "not CSV|no text"),
    ):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(UserError, match=words):
            list(Corpus([tmp_path / "a.csv"]).documents())
    (tmp_path / "a.csv").write_text("x" * 200_000 + ",text\nabc,hello\n")
    assert list(Corpus([tmp_path / "a.csv"]).documents()) == ["hello"]


def test_a_folder_is_read_through_links_and_without_our_own_files(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("one")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "texts")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    for name in ("tokens.npy.json", "q.npz.json", "bpe.json", "tokenizer.json", ".hidden.txt"):
        (tmp_path / "data" / name).write_text("{}")
    assert list(Corpus([tmp_path / "data"]).documents()) == ["one"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a pipe or a device, which is not read"):
        Corpus([tmp_path / "pipe"])

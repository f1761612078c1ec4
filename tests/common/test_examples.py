"""Examples for fine-tuning: only answers are counted, each epoch has each example once, and bad lines are named."""

import json

import numpy as np
import pytest

from llm_common.data.answers import ExampleDataset, open_dataset, read_examples, write_examples
from llm_common.data.datasets import TokenDataset
from llm_common.errors import UserError
from llm_common.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer([])
PAIRS = [("ab", "xyz"), ("c", "w"), ("defg", "uv"), ("h", "t"), ("ij", "s")]


@pytest.fixture
def file(tmp_path):
    lines = [json.dumps({"q": q, "a": a, "other": 1}) for q, a in PAIRS]
    (tmp_path / "qa.jsonl").write_text("\n\n".join(lines) + "\n")
    info = write_examples(tmp_path / "qa.npz", read_examples(tmp_path / "qa.jsonl", "q", "a", TOKENIZER), TOKENIZER)
    assert (info["examples"], info["longest"], info["left_out"]) == (5, 7, 0)
    return tmp_path / "qa.npz"


def test_only_answers_are_counted(file):
    data = ExampleDataset(file, 8, 5, 0, 257)
    inputs, targets = data.batch(0)
    assert inputs.shape == targets.shape == (5, 8)
    seen = set()
    for row, target in zip(inputs, targets, strict=True):
        counted = np.flatnonzero(target != -100)
        answer = TOKENIZER.decode(target[counted])
        prompt = TOKENIZER.decode(row[: counted[0] + 1])
        assert answer.endswith("<|endoftext|>")
        assert (counted == np.arange(counted[0], counted[-1] + 1)).all()
        np.testing.assert_array_equal(row[counted[1:]], target[counted[:-1]])  # one to the right
        assert (row[counted[-1] + 1 :] == 0).all()
        seen.add((prompt, answer.removesuffix("<|endoftext|>")))
    assert seen == set(PAIRS)


def test_batches_are_pure_and_shared_by_hosts(file):
    data, again = ExampleDataset(file, 8, 4, 3), ExampleDataset(file, 8, 4, 3)
    for step in (0, 7, 1):
        for a, b in zip(data.batch(step), again.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
        parts = [data.batch(step, host, 2) for host in range(2)]
        for k in (0, 1):
            np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), data.batch(step)[k])
    rows = np.concatenate([data.batch(step)[0] for step in range(5)])  # four epochs
    assert sorted(map(tuple, rows)) == sorted(list(map(tuple, np.unique(rows, axis=0))) * 4)
    assert data.fingerprint() == again.fingerprint()
    assert data.fingerprint() != ExampleDataset(file, 8, 4, 4).fingerprint()


def test_long_examples_are_refused_or_left_out(file, tmp_path):
    with pytest.raises(UserError, match="longest example has 7 tokens, so `seq_len` must be at least 6"):
        ExampleDataset(file, 5, 2, 0)
    pairs = read_examples(tmp_path / "qa.jsonl", "q", "a", TOKENIZER)
    info = write_examples(tmp_path / "short.npz", pairs, TOKENIZER, max_length=6)
    assert (info["examples"], info["left_out"]) == (4, 1)
    with pytest.raises(UserError, match=r"no examples to write \(1 left out"):
        write_examples(tmp_path / "none.npz", [([], [1])], TOKENIZER)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: no text in the field 'q'; it is not an object"),
        ('{"question": "x", "a": "y"}', "line 2: no text in the field 'q'; it has 'question', 'a'"),
        ('{"q": "x", "a": 3}', "line 2: no text in the field 'a'"),
    ],
)
def test_bad_lines_are_named(line, words, tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"q": "x", "a": "y"}\n' + line)
    with pytest.raises(UserError, match=words):
        list(read_examples(tmp_path / "qa.jsonl", "q", "a", TOKENIZER))


def test_files_that_are_no_examples(file, tmp_path):
    for content in (b"", b"PK\x03\x04", b"not an archive"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad.npz: not a file of examples"):
            ExampleDataset(tmp_path / "bad.npz", 8, 2, 0)
    with np.load(file) as content:
        arrays = dict(content)
    np.savez(tmp_path / "bad.npz", **{**arrays, "answers": arrays["answers"] + 5})
    with pytest.raises(UserError, match="damaged"):
        ExampleDataset(tmp_path / "bad.npz", 8, 2, 0)
    np.savez(tmp_path / "bad.npz", **{**arrays, "tokens": np.array([object()] * 3)})
    with pytest.raises(UserError, match="not a file of examples"):  # a pickle inside is not read
        ExampleDataset(tmp_path / "bad.npz", 8, 2, 0)
    with pytest.raises(UserError, match="no such file of examples"):
        open_dataset(tmp_path / "none.npz", 8, 2, 0)
    with pytest.raises(UserError, match="outside the vocabulary"):
        open_dataset(file, 8, 2, 0, vocab_size=100)
    np.save(tmp_path / "t.npy", np.arange(50, dtype=np.uint16))
    assert isinstance(open_dataset(tmp_path / "t.npy", 8, 2, 0), TokenDataset)

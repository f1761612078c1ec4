"""Shards: the same tokens however they are cut and by how many processes, whole or not there, and which one is
damaged.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_common.data.datasets import TokenDataset, check_data, open_tokens, write_tokens
from llm_common.data.shards import MANIFEST, ShardedTokens, is_held_out, prepare
from llm_common.errors import UserError
from llm_common.text.bpe_trainer import train_bpe
from llm_common.text.corpus import python_documentation

DOCUMENTS = [text for _, text in zip(range(60), python_documentation(), strict=False)]
PART = 20_000


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    train_bpe(DOCUMENTS, 400).save(path)
    return path


@pytest.fixture(scope="module")
def shards(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "data"
    prepare(DOCUMENTS, folder, tokenizer_path, validation=0.2, part_size=PART)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_hold_what_one_file_holds(shards, tokenizer_path, tmp_path):
    from llm_common.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_path)
    manifest = json.loads((shards / "train" / MANIFEST).read_text())
    assert len(manifest["shards"]) > 4
    for side, wanted in (("train", False), ("validation", True)):
        texts = [text for text in DOCUMENTS if is_held_out(text, 0.2) is wanted]
        assert len(texts) > 3
        info = write_tokens(tmp_path / f"{side}.npy", texts, tokenizer)
        whole, tokens = np.load(tmp_path / f"{side}.npy"), open_tokens(shards / side)
        assert isinstance(tokens, ShardedTokens)
        np.testing.assert_array_equal(tokens[:], whole)
        assert (len(tokens), tokens.max(), tokens.dtype) == (len(whole), whole.max(), whole.dtype)
        assert {k: tokens.manifest[k] for k in ("tokens", "documents", "bytes")} == {
            k: info[k] for k in ("tokens", "documents", "bytes")
        }
        for start in range(0, len(whole), 997):  # also over the borders of shards
            np.testing.assert_array_equal(tokens[start : start + 1500], whole[start : start + 1500])
    one = TokenDataset(tmp_path / "train.npy", 64, 4, 7)
    many = TokenDataset(shards, 64, 4, 7)
    assert one.fingerprint() == many.fingerprint()
    for step in range(30):
        for a, b in zip(one.batch(step), many.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
    check_data(shards, tokenizer)
    with pytest.raises(UserError, match="another tokenizer"):
        check_data(shards, train_bpe(DOCUMENTS, 300))


def test_any_number_of_processes_writes_the_same(shards, tokenizer_path, tmp_path):
    prepare(DOCUMENTS, tmp_path / "data", tokenizer_path, validation=0.2, processes=3, part_size=PART)
    assert contents(tmp_path / "data") == contents(shards)


def test_a_run_that_was_stopped_goes_on(shards, tokenizer_path, tmp_path):
    folder = tmp_path / "data"

    def stopping():
        yield from DOCUMENTS[:40]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        prepare(stopping(), folder, tokenizer_path, validation=0.2, part_size=PART)
    with pytest.raises(UserError, match=r"no such token file|not finished"):
        open_tokens(folder)
    done = sorted((folder / "train").glob("*.npy"))
    assert done
    (folder / "train" / done[0].name).write_bytes(b"cut off")  # it is written again
    times = {path: path.stat().st_mtime_ns for path in done[1:]}
    with pytest.raises(UserError, match="other settings"):
        prepare(DOCUMENTS, folder, tokenizer_path, validation=0.3, part_size=PART)
    prepare(DOCUMENTS, folder, tokenizer_path, validation=0.2, part_size=PART)
    assert contents(folder) == contents(shards)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(UserError, match="finished data already"):
        prepare(DOCUMENTS, folder, tokenizer_path, validation=0.2, part_size=PART)


@pytest.mark.slow
def test_a_killed_process_goes_on(shards, tokenizer_path, tmp_path):
    script, corpus = Path(__file__).parents[2] / "scripts" / "prepare_data.py", tmp_path / "text.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    flags = ["--data", corpus, "--out", tmp_path / "data", "--tokenizer", tokenizer_path, "--validation", "0.2"]
    command = list(map(str, [sys.executable, script, *flags, "--part-size", PART, "--processes", 1]))
    killed = 0
    for delay in (0.5, 0.8, 1.0, 1.1, 1.2, 1.3, 1.4):
        process = subprocess.Popen(command, start_new_session=True)
        time.sleep(delay)
        killed += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        if process.returncode == 0:
            break
        assert not (tmp_path / "data" / "train" / MANIFEST).is_file()
    assert killed
    if process.returncode:
        subprocess.run(command, check=True)
    assert contents(tmp_path / "data") == contents(shards)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.unlink(), "00001.npy: missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "00001.npy: .* bytes, of"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7] + b"\0" * 7), "00001.npy: another sha256"),
        (lambda path: path.with_name(MANIFEST).write_text("{}"), "not a manifest"),
        (lambda path: path.with_name(MANIFEST).write_text("{"), "cannot be read as JSON"),
        (lambda path: path.with_name(MANIFEST).write_text('{"format": 9}'), "format 9, but this version reads 2"),
    ],
)
def test_what_is_damaged_is_named(tokenizer_path, tmp_path, break_it, message):
    prepare(DOCUMENTS[:30], tmp_path / "data", tokenizer_path, part_size=PART)
    break_it(tmp_path / "data" / "train" / "00001.npy")
    with pytest.raises(UserError, match=message):
        TokenDataset(tmp_path / "data", 8, 2, 0).fingerprint()


def test_what_cannot_be_prepared_is_refused(tokenizer_path, tmp_path):
    with pytest.raises(UserError, match="corpus is empty"):
        prepare([], tmp_path / "a", tokenizer_path)
    with pytest.raises(UserError, match="none is left for validation"):
        prepare(["one document"], tmp_path / "b", tokenizer_path, validation=1e-9)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(DOCUMENTS[:3], tmp_path / "file", tokenizer_path)


def test_a_full_disk_leaves_nothing_that_looks_whole(tokenizer_path, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path; from llm_common.data.shards import prepare\n"
        "prepare(['some words ' * 20_000], Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data"), str(tokenizer_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "cannot be written" in result.stderr
    assert not list((tmp_path / "data").rglob("*.npy"))
    assert not list((tmp_path / "data").rglob(MANIFEST))

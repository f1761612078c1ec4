"""The scripts as a user types them: from text to a generated text."""

import gzip
import json

import numpy as np
import pytest

from llm_common.run.log import read_log
from llm_common.text.corpus import python_documentation


def test_from_text_to_the_same_text_in_both_frameworks(folder, run):
    tokenizer, tokens = folder / "bpe.json", folder / "tokens.npy"
    code, out, _ = run("train_tokenizer", "--data", folder / "text.txt", "--out", tokenizer, "--vocab-size", 300)
    assert (code, "43 merges, 300 ids" in out) == (0, True)
    code, out, _ = run("prepare_data", "--data", folder / "text.txt", "--out", tokens, "--tokenizer", tokenizer)
    assert code == 0
    assert "20 documents" in out
    common = ["--model-config", folder / "config.json", "--data", tokens, "--tokenizer", tokenizer]
    common += [
        "--seq-len",
        32,
        "--batch-size",
        4,
        "--total-steps",
        6,
        "--save-every",
        3,
        "--log-every",
        2,
        "--device",
        "cpu",
    ]
    texts, logs = {}, {}
    for framework in ("jax", "torch"):
        code, out, err = run("train", "--framework", framework, "--out", folder / framework, *common)
        assert code == 0, err
        assert "step 6/6  loss" in out
        assert [p.name for p in sorted((folder / framework).glob("step-*"))] == ["step-00000003", "step-00000006"]
        rows = [json.loads(line) for line in (folder / framework / "log.jsonl").read_text().splitlines()]
        assert rows[0]["framework"] == framework
        logs[framework] = [row["loss"] for row in rows if "event" not in row]
    np.testing.assert_allclose(logs["jax"], logs["torch"], atol=1e-4)
    flags = ["--checkpoint", folder / "jax", "--prompt", "The ", "--seed", 5, "--max-new-tokens", 20, "--texts", 2]
    for framework in ("jax", "torch"):
        code, texts[framework], err = run("generate", "--framework", framework, "--device", "cpu", *flags)
        assert code == 0, err
    assert texts["jax"] == texts["torch"]
    assert texts["jax"].count("The ") == 2
    code, out, err = run("generate", "--framework", "both", "--device", "cpu", *flags)
    assert (code, out.count("tokens in both frameworks]")) == (0, 2), err
    # the same command again has nothing left to do, and other settings are refused
    code, out, _ = run("train", "--framework", "torch", "--out", folder / "jax", *common)
    assert (code, "nothing left to do" in out) == (0, True)
    code, _, err = run("train", "--framework", "jax", "--out", folder / "jax", *common, "--lr-max", "2e-3")
    assert (code, "--lr-max = 0.001 here, 0.002 asked for" in err) == (2, True)


def test_from_text_to_shards_to_training_with_documents_apart(folder, run, tmp_path):
    lines = [json.dumps({"body": text}) for _, text in zip(range(40), python_documentation(), strict=False)]
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    text = ["--data", tmp_path / "text.jsonl.gz", "--field", "body"]
    flags = ["--vocab-size", 300, "--pattern", "llama3", "--special-tokens", "<|endoftext|>", "<|user|>"]
    code, out, _ = run("train_tokenizer", *text, "--out", tmp_path / "tokenizer", *flags)
    assert (code, "42 merges, 300 ids" in out) == (0, True)
    assert (tmp_path / "tokenizer" / "tokenizer_config.json").is_file()
    tokenizer, data = ["--tokenizer", tmp_path / "tokenizer"], ["--data", tmp_path / "data"]
    flags = ["--validation", 0.1, "--part-size", 20_000, "--out", tmp_path / "data"]
    code, out, _ = run("prepare_data", *text, *tokenizer, *flags)
    assert (code, "shards" in out) == (0, True)
    code, out, _ = run("inspect_data", *data, *tokenizer, "--check", "--out", tmp_path / "data.png")
    assert (code, "are as the manifest says" in out, "unigram entropy" in out) == (0, True, True)
    assert (tmp_path / "data.png").stat().st_size > 10_000
    common = ["--model-config", folder / "config.json", *data, *tokenizer, "--device", "cpu", "--log-every", 1]
    common += ["--seq-len", 48, "--batch-size", 4, "--total-steps", 4, "--warmup-steps", 1, "--eval-every", 4]
    rows = {}
    for framework in ("jax", "torch"):
        for mask in ([], ["--document-mask"]):
            out = tmp_path / f"{framework}{len(mask)}"
            code, _, err = run("train", "--framework", framework, "--out", out, *common, *mask)
            assert code == 0, err
            rows[framework, bool(mask)] = [row for row in read_log(out / "log.jsonl") if "loss" in row]
    for mask in (False, True):
        pairs = list(zip(rows["jax", mask], rows["torch", mask], strict=True))
        assert len(pairs) == 5  # four steps and the held-out loss
        for a, b in pairs:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert rows["jax", True][-1]["loss"] != pytest.approx(rows["jax", False][-1]["loss"], abs=1e-5)

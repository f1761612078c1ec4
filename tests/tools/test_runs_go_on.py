"""Runs that change frameworks, are stopped and start from other weights, as a user types them."""

import json

import numpy as np
import pytest

from llm_common.config import preset
from llm_common.text.tokenizer import Tokenizer


def run_until(run, last, *args):
    """Run training and ask it, as Ctrl-C does, to stop after step `last`."""
    from llm_common.run.folder import Run

    after_step = Run.after_step

    def counted(self, step, *rest):
        if step == last < self.recipe.optimizer.total_steps:
            self.stop_signal = 2
        return after_step(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after_step", counted)
        return run(*args)


def test_fine_tuning_from_a_hugging_face_folder(folder, run, tmp_path):
    """Questions and answers in a chat template: begun in one framework, ended in the other, loaded in transformers."""
    transformers = pytest.importorskip("transformers")
    run("train_tokenizer", "--data", folder / "text.txt", "--out", folder / "bpe.json", "--vocab-size", 300)
    import dataclasses

    from llm_common.files.export import export
    from llm_common.run.checkpoint import load_weights
    from parity.core.inputs import families, random_weights

    cfg = dataclasses.replace(families(preset("tiny"))["Qwen3: norms of q and k"], vocab_size=300)
    base = tmp_path / "base"
    export(base, cfg, random_weights(cfg, 0, "float32"), Tokenizer.load(folder / "bpe.json"), "bfloat16", 20_000)
    (base / "bpe.json").unlink()
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    rows = [{"q": f"What is {i} and one?", "a": f"It is {i + 1}."} for i in range(20)]
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    flags = ["--tokenizer", base, "--data", tmp_path / "qa.jsonl", "--out", tmp_path / "qa.npz", "--chat"]
    code, out, err = run("prepare_data", *flags, "--prompt-field", "q", "--answer-field", "a")
    assert (code, "20 examples" in out) == (0, True), err
    common = ["--init-from", base, "--data", tmp_path / "qa.npz", "--out", tmp_path / "tuned", "--device", "cpu"]
    common += ["--seq-len", 63, "--batch-size", 4, "--total-steps", 8, "--lr-max", "3e-3", "--log-every", 1]
    code, out, err = run_until(run, 4, "train", "--framework", "torch", *common)
    assert code == 0, err
    assert "20 examples" in out
    code, out, err = run("train", "--framework", "jax", *common)
    assert (code, "going on from" in out) == (0, True), err
    log = [json.loads(line) for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "event" not in row]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5
    newest = tmp_path / "tuned" / "step-00000008"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(newest, output_loading_info=True)
    assert not report["missing_keys"]
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.eos_token_id == 299
    auto = transformers.AutoTokenizer.from_pretrained(newest)
    assert auto.chat_template == template
    code, out, err = run(
        "generate",
        "--framework",
        "both",
        "--checkpoint",
        tmp_path / "tuned",
        "--chat",
        "--prompt",
        "What is 3 and one?",
        "--max-new-tokens",
        10,
        "--temperature",
        0,
        "--device",
        "cpu",
    )
    assert (code, "tokens in both frameworks]" in out) == (0, True), err
    # other weights to start from are another run
    export(
        tmp_path / "other",
        dataclasses.replace(cfg, num_hidden_layers=1),
        random_weights(dataclasses.replace(cfg, num_hidden_layers=1), 1, "float32"),
        None,
    )
    code, _, err = run("train", "--framework", "jax", *common, "--init-from", tmp_path / "other", "--tokenizer", base)
    assert (code, "another model: num_hidden_layers = 2 here, 1 asked for" in err) == (2, True)
    assert load_weights(newest)[0] == cfg


def test_a_run_changes_frameworks_and_is_looked_at(prepared, folder, run, tmp_path):
    """Stopped in JAX, ended in torch; then evaluated, drawn, exported, and loaded again in transformers."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "mixed"
    for framework, steps in (("jax", 4), ("torch", 8), ("jax", 12)):
        stop = {"until": steps}
        code, out, err = run_until(run, stop["until"], "train", *prepared, "--framework", framework, "--out", path)
        assert code == 0, err
    code, out, err = run("train", *prepared, "--framework", "torch", "--out", tmp_path / "straight")
    assert code == 0, err
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "event" not in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["framework"] for row in steps] == ["jax"] * 4 + ["torch"] * 4 + ["jax"] * 4
    straight = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(
        [row["loss"] for row in steps], [row["loss"] for row in straight if "event" not in row], atol=1e-4
    )
    results = []
    for framework in ("jax", "torch"):
        flags = [
            "--checkpoint",
            path,
            "--data",
            folder / "p-validation.npy",
            "--seq-len",
            32,
            "--json",
            "--device",
            "cpu",
        ]
        code, out, err = run("evaluate", "--framework", framework, *flags)
        assert code == 0, err
        results.append(json.loads(out))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    ends = [row for row in rows if row.get("event") == "evaluation"]
    assert results[0]["loss"] == pytest.approx(ends[-1]["loss"], abs=1e-5)
    assert results[0]["tokens"] == len(np.load(folder / "p-validation.npy")) - 1
    code, out, err = run(
        "evaluate", "--framework", "torch", "--checkpoint", path, "--text", folder / "text.txt", "--seq-len", 64
    )
    assert "bits per byte" in out
    for name in ("curves.png", "page.html"):
        code, out, err = run("plot_runs", path, tmp_path / "straight", "--out", tmp_path / name)
        assert code == 0, err
        assert (tmp_path / name).stat().st_size > 10_000
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64") == 5
    assert 'name="viewport"' in page
    assert "jax → torch after step" in page
    assert "torch → jax after step" in page
    code, out, err = run("export", "--checkpoint", path, "--out", tmp_path / "exported")
    assert code == 0, err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    flags = [
        "--checkpoint",
        tmp_path / "exported",
        "--prompt",
        "The list of",
        "--temperature",
        0,
        "--max-new-tokens",
        12,
    ]
    code, out, err = run("generate", "--framework", "jax", "--device", "cpu", *flags)
    inputs = tokenizer("The list of", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out.rstrip("\n") == tokenizer.decode(expected[0]).removesuffix("<|endoftext|>").rstrip("\n")

"""The scripts as a user types them: from text to a generated text, and one clear line for every bad input."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_common import errors
from llm_common.config import Recipe, TrainConfig, preset
from llm_common.run.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from llm_common.run.log import read_log
from llm_common.tensors import tensor_shapes
from llm_common.text.corpus import python_documentation
from llm_common.text.tokenizer import Tokenizer
from llm_tools import flags
from llm_tools.bench import measure
from llm_tools.frameworks import open_backend

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and the config of a tiny model."""
    path = tmp_path_factory.mktemp("scripts")
    text = "<|endoftext|>".join(t for _, t in zip(range(20), python_documentation(), strict=False))
    (path / "text.txt").write_text(text, encoding="utf-8")
    config = {**preset("tiny").to_hf(), "vocab_size": 300}
    (path / "config.json").write_text(json.dumps(config))
    for name, text in {
        "unknown": "[optimizer]\nlearning_rate = 1.0",
        "wrong": "batch_size = '8'",
        "choice": "framework = 'numpy'",
        "twice": "seed = 1\n[training]\nseed = 2",
        "broken": "seed = ",
    }.items():
        (path / f"{name}.toml").write_text(text)
    return path


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
    assert (code, "optimizer.lr_max = 0.001 here, 0.002 asked for" in err) == (2, True)


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


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("train_tokenizer", ["--data", "{}/nothing"], "no such file or folder"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--vocab-size", 100], "vocab_size = 100 is too small"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--special-tokens", "<a>", "<a>"], "'<a>' is there twice"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--out", "{}/x.bin"], "a .json file, or a folder"),
        ("train_tokenizer", ["--data", "{}/text.txt", "--processes", 0], "--processes 0: at least 1"),
        ("prepare_data", ["--tokenizer", "{}/nothing.json"], "no such tokenizer"),
        ("inspect_data", ["--tokenizer", "{}/nothing.json"], "no such tokenizer"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--preset", "huge"], "unknown preset 'huge'"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--lr-max", "nan"], "lr_max = nan"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--seq-len", "513"], "seq_len needs 513 positions"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--tokenizer", "{}/nothing"], "no such tokenizer"),
        (
            "train",
            ["--framework", "jax", "--out", "{}/x", "--save-every", "0"],
            "RunConfig.save_every = 0: must be an integer of at least 1 or none",
        ),
        ("train", ["--out", "{}/x"], "--framework is missing"),
        ("train", ["--framework", "jax"], "--out is missing"),
        ("train", ["--config", "{}/nothing.toml"], "nothing.toml: no such file"),
        (
            "train_tokenizer",
            ["--data", "{}/text.txt", "--vocab-size", 260, "--out", "{}/text.txt/x"],
            "give another place",
        ),
        (
            "train",
            ["--config", "{}/config.json"],
            "a TOML file is expected; a model's config.json goes to --model-config",
        ),
        ("train", ["--config", "{}/unknown.toml"], "unknown key 'learning_rate'; known keys: attention_backend"),
        ("train", ["--config", "{}/wrong.toml"], "batch_size = '8' is not what --batch-size takes"),
        ("train", ["--config", "{}/choice.toml"], "framework = 'numpy'; known: jax, torch"),
        ("train", ["--config", "{}/twice.toml"], "key 'seed' is there twice"),
        ("train", ["--config", "{}/broken.toml"], "broken.toml: not TOML"),
        ("train", ["--framework", "jax", "--out", "{}/x", "--preset", "tiny", "--init-from", "{}"], "give one of them"),
        (
            "train",
            ["--framework", "jax", "--out", "{}/x", "--gradient-accumulation-steps", "3"],
            "must divide batch_size",
        ),
        (
            "train",
            ["--framework", "jax", "--out", "{}/x", "--remat", "some"],
            "remat = 'some': must be one of none, dots",
        ),
        ("train", ["--framework", "jax", "--out", "{}/x", "--init-from", "{}"], "has a config.json but no weights"),
        (
            "evaluate",
            ["--framework", "jax", "--checkpoint", "{}", "--text", "{}/text.txt"],
            "has a config.json but no weights",
        ),
        ("prepare_data", ["--tokenizer", "{}/nothing", "--validation", "1.5"], "--validation 1.5: must lie in [0, 1)"),
        ("prepare_data", ["--tokenizer", "{}/none.toml/", "--prompt-field", "q"], "no such tokenizer"),
        ("export", ["--checkpoint", "{}", "--out", "{}"], "is there already; nothing is overwritten"),
        ("plot_runs", ["{}"], "has no log.jsonl; is this the folder of a run?"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}"], "has a config.json but no weights"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}/x"], "x: no such folder"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}", "--top-p", "2"], "top_p = 2.0"),
        ("generate", ["--framework", "jax", "--prompt", "a", "--checkpoint", "{}", "--texts", "0"], "--texts 0"),
    ],
)
def test_bad_input_is_one_clear_line(name, flags, words, folder, run):
    code, out, err = run(name, *(str(flag).replace("{}", str(folder)) for flag in flags))
    assert code == 2
    assert err.startswith("error: ")
    assert words.replace("{}", str(folder)) in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in out + err


def test_a_device_that_is_not_there_is_refused_before_training(folder, run):
    run("train_tokenizer", "--data", folder / "text.txt", "--out", folder / "bpe.json", "--vocab-size", 300)
    run(
        "prepare_data",
        "--data",
        folder / "text.txt",
        "--out",
        folder / "tokens.npy",
        "--tokenizer",
        folder / "bpe.json",
    )
    for framework in ("jax", "torch"):
        flags = [
            "--model-config",
            folder / "config.json",
            "--data",
            folder / "tokens.npy",
            "--tokenizer",
            folder / "bpe.json",
        ]
        code, _, err = run(
            "train", "--framework", framework, "--out", folder / "none", "--seq-len", 32, *flags, "--device", "tpu"
        )
        assert code == 2
        assert "tpu" in err
        assert len(err.splitlines()) == 1
        assert not (folder / "none").exists()


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_missing_framework_names_the_command(framework, monkeypatch):
    find = errors.importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name == framework else find(name))
    with pytest.raises(errors.UserError, match=rf"{framework} is not installed; run: pip install '.\[{framework}\]'"):
        open_backend(framework)


@pytest.fixture
def prepared(folder, run):
    """A folder with a tokenizer, tokens, held-out tokens, and the flags of a small run on them."""
    if not (folder / "p-validation.npy").exists():
        flags = ["--data", folder / "text.txt"]
        run("train_tokenizer", *flags, "--out", folder / "bpe.json", "--vocab-size", 300)
        flags += ["--tokenizer", folder / "bpe.json", "--out", folder / "p.npy", "--validation", 0.3]
        assert run("prepare_data", *flags)[0] == 0
    toml = folder / "run.toml"
    toml.write_text(
        f"""
        model_config = "{folder}/config.json"
        data = "{folder}/p.npy"
        tokenizer = "{folder}/bpe.json"
        cache_dir = "{folder}/cache"
        device = "cpu"
        [training]
        seq_len = 32
        batch_size = 4
        [optimizer]
        total_steps = 12
        max_grad_norm = "none"
        [run]
        save_every = 4
        keep_last = 2
        log_every = 4
        """
    )
    return ["--config", toml]


def test_a_toml_file_stands_for_the_flags(prepared, folder, run, tmp_path):
    code, out, err = run("train", *prepared, "--framework", "jax", "--out", tmp_path, "--total-steps", 4)
    assert code == 0, err
    state = json.loads((tmp_path / "step-00000004" / "state.json").read_text())
    assert state["settings"]["train"]["batch_size"] == 4
    assert state["settings"]["optimizer"]["max_grad_norm"] is None
    assert state["settings"]["optimizer"]["total_steps"] == 4  # the flag goes before the file
    assert state["settings"]["evaluation"]["bits_per_byte"] > 1
    assert "held-out loss" in out
    assert "bits per byte" in out


def test_dry_run_says_what_would_be(prepared, run, tmp_path):
    code, out, _ = run("train", *prepared, "--framework", "torch", "--out", tmp_path / "x", "--dry-run")
    assert code == 0
    for words in ("parameters", "FLOPs:", "memory: about", "first batch: 4 x 32, 128 counted targets", "target 0:"):
        assert words in out
    assert not (tmp_path / "x").exists()


def test_the_memory_said_counts_the_scores_that_are_kept(prepared, run, tmp_path):
    """On a CPU torch's fused attention keeps none; JAX's, XLA's own, keeps them as the reference does."""

    def activations(framework: str, backend: str) -> str:
        flags = ("--framework", framework, "--attention-backend", backend, "--out", tmp_path / "x", "--dry-run")
        _, out, _ = run("train", *prepared, *flags, "--seq-len", 32, "--batch-size", 64)
        return out.partition("activations ")[2].partition(")")[0]

    assert activations("jax", "fused") == activations("jax", "reference")
    assert float(activations("torch", "auto")) < float(activations("torch", "reference"))


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
    assert "data:image/png;base64" in (tmp_path / "page.html").read_text()
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
    from llm_common.text.tokenizer import Tokenizer
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


@pytest.mark.parametrize("kind", ["orbax", "dcp"])
def test_a_checkpoint_goes_through_another_format_and_comes_back(kind, tmp_path, run):
    if kind == "orbax":
        pytest.importorskip("orbax.checkpoint")
    cfg = preset("tiny")
    shapes, rng = tensor_shapes(cfg), np.random.default_rng(0)
    parts = [{name: rng.standard_normal(x).astype(np.float32) for name, x in shapes.items()} for _ in range(3)]
    saved = save_checkpoint(tmp_path / "run", cfg, TrainingState(*parts, 7, 6), {"seed": 3}, Tokenizer([]))
    there, back = tmp_path / kind, tmp_path / "again"
    code, _, err = run("convert_checkpoint", "--from", saved, f"--to-{kind}", there)
    assert (code, err) == (0, "")
    code, _, err = run("convert_checkpoint", f"--from-{kind}", there, "--like", saved, "--to", back)
    assert (code, err) == (0, "")
    (folder,) = back.iterdir()
    _, state, settings = load_checkpoint(folder, cfg)
    assert (state.step, state.adam_count, settings) == (7, 6, {"seed": 3})
    for part, expected in zip(("weights", "mu", "nu"), parts, strict=True):
        for name, x in expected.items():
            np.testing.assert_array_equal(getattr(state, part)[name], x)
    code, _, err = run("convert_checkpoint", "--from", saved, f"--to-{kind}", there)
    assert (code, "is there already" in err) == (2, True)
    code, _, err = run("convert_checkpoint", f"--from-{kind}", tmp_path / "nothing", "--like", saved, "--to", back)
    assert (code, "nothing: n" in err) == (2, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train", "--peer", "nobody"], "--peer nobody: unknown; known: transformers"),
        (["train", "--peer", "missing.py"], "no such file"),
        (["decode", "--preset", "tiny", "--new-tokens", "64"], "needs 192 positions but max_position_embeddings = 64"),
        (["train", "--preset", "tiny", "--seq-len", "65"], "needs 65 positions"),
        (["train", "--preset", "huge"], "unknown preset 'huge'"),
        (["train", "--groups", "0"], "--groups 0: at least 1"),
        (["tokenizer", "--groups", "0"], "--groups 0: at least 1"),
        (["train", "--batch", "32"], "train takes --batch-size, not --batch"),
        (["decode", "--batch-size", "4"], "decode takes --batch, the number of texts"),
        (["decode", "--preset", "tiny", "--prompt-length", "4", "--new-tokens", "1"], "--new-tokens of at least 2"),
        (["startup", "--peer", "transformers"], "startup takes no --peer"),
        (["attention", "--profile", "runs/x"], "attention takes no --profile"),
        (["train", "--framework", "none"], "nothing to measure"),
        (["train", "--preset", "tiny", "--seq-len", "9", "--document-separator", "5000"], "the vocabulary has 96 ids"),
        (["train", "--peer", "transformers", "--compute-dtype", "float64"], "not in float64"),
        (["decode", "--peer", "transformers", "--temperature", "0.8"], "peers decode greedily"),
        (["decode", "--peer", str(SCRIPTS.parent / "examples/peer_torchtitan.py")], "has no function 'decode'"),
        (["train", "--out", "."], "is a folder"),
        (["train", "--out", __file__ + "/speed"], "--out"),
        (["train", "--loss-chunks", "3", "--seq-len", "128"], "loss_chunks = 3: must divide seq_len = 128"),
    ],
)
def test_benchmark_refuses_before_it_measures(run, flags, message):
    code, _, err = run("benchmark", *flags, "--device", "cpu")
    assert code == 2
    assert message in err


def test_benchmark_names_what_is_wrong_with_a_peer(run, tmp_path):
    for text, message in (
        ("import not_there", "cannot be imported: ModuleNotFoundError"),
        ("def train(", "cannot be imported: SyntaxError"),
        ("train = 1\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int", "would be called 'torch'"),
    ):
        folder = tmp_path / message[-8:]
        folder.mkdir()
        peer = folder / "torch.py"
        peer.write_text("from __future__ import annotations\n" + text)
        code, _, err = run("benchmark", "train", "--peer", peer, "--device", "cpu")
        assert (code, message in err) == (2, True), err


def test_a_worker_may_print_and_may_die(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    lines = ["{'loss': 1.0}", '{"loss": 1}', '{"seconds": 2}']
    script.write_text("\n".join(f"print({line!r})" for line in lines))
    assert measure.run_worker({"what": "train"}) == {"seconds": 2}
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert measure.run_worker({"what": "train"})["error"] == "killed by signal 9"
    assert measure.versions("importlib") == {"importlib": "of unknown version"}


def benchmark(*flags: str) -> None:
    """In a process of its own, which starts more of them."""
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stdout, result.stdout


@pytest.mark.slow
def test_benchmark_measures_both_frameworks_and_a_peer(tmp_path):
    peer = tmp_path / "mine.py"
    peer.write_text("import time\ndef train(*args):\n    return lambda inputs, targets: time.sleep(0.01) or 1.0\n")
    common = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--seq-len",
        "32",
        "--groups",
        "2",
        "--steps",
        "2",
        "--warm-up",
        "2",
    ]
    out = ["--out", str(tmp_path / "speed")]
    benchmark("train", *common, "--peer", str(peer), *out, "--profile", str(tmp_path / "trace"))
    cases = {case["side"]: case for case in json.loads((tmp_path / "speed.json").read_text())["cases"]}
    assert cases["jax"]["losses"] == pytest.approx(cases["torch"]["losses"], rel=1e-4)
    assert 0.009 < cases[str(peer)]["seconds"][1] < 1
    assert (tmp_path / "speed.png").stat().st_size > 1000
    for what in ("decode", "attention", "input"):
        more = ["--batch", "2", "--prompt-length", "5", "--new-tokens", "20"] if what == "decode" else []
        benchmark(what, *common, *more, "--framework", "torch")


def test_torchs_search_for_kernels_takes_the_median_of_runs_without_a_cache():
    code = """
from llm_tools import flags
flags.prepare_environment(None)
from torch._inductor.runtime.benchmarking import TritonBenchmarker, benchmarker
assert type(benchmarker) is TritonBenchmarker, type(benchmarker)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("device", "seq_len", "kept"), [("cpu", 128, True), ("gpu", 128, False), ("cpu", 512, False), ("auto", 512, False)]
)
def test_freed_memory_is_kept_for_small_steps_on_a_cpu_alone(device, seq_len, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(flags, "keep_freed_memory", lambda: calls.append(True))
    flags.keep_memory_of_a_small_step(device, Recipe(preset("demo"), TrainConfig(seq_len=seq_len)))
    assert bool(calls) == kept

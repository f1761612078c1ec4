"""Wrong command lines: each is one line that names the fix, said before a framework is imported."""

import json
import subprocess
import sys

import pytest

from llm_tools.command import PROGRAMS

# What a newcomer types, and words of the answer. {} is a folder with text, a config, a tokenizer and tokens.
RUN = "train --framework jax --data {}/p.npy --tokenizer {}/bpe.json --model-config {}/config.json --seq-len 32 "
WRONG = [
    ("trian --framework jax", "no such program: did you mean train?"),
    ("--help-me", "no such program"),
    ("train --framwork jax", "there is no flag --framwork: did you mean --framework?"),
    ("train --framework jaxx --out {}/x", "--framework 'jaxx' is not known: did you mean jax?"),
    ("train jax --out {}/x", "nothing takes 'jax'"),
    ("train --framework jax --out {}/x --lr-mx 3e-4", "did you mean --lr-max?"),
    ("train --framework jax --out {}/x --lr 3e-4", "there is no flag --lr"),
    ("train --framework jax --out {}/x --batchsize 8", "did you mean --batch-size?"),
    ("train --framework jax --out {}/x --lr-max fast", "--lr-max fast: a number is expected"),
    ("train --framework jax --out {}/x --lr-max", "--lr-max: expected one argument"),
    ("train --framework jax --out {}/x --total-steps 1e3", "--total-steps 1e3: a whole number is expected"),
    ("train --framework jax --out {}/x --warmup-steps 99 --total-steps 50", "--warmup-steps 99: must be less than"),
    ("train --framework jax --out {}/x --lr-min 1", "--lr-min 1.0: must not exceed --lr-max"),
    ("train --framework jax --out {}/x --beta2 1.0", "--beta2 1.0: must lie in"),
    ("train --framework jax --out {}/x --preset tinny", "unknown preset 'tinny': did you mean tiny?"),
    ("train --framework jax --out {}/x --compute-dtype fp32", "--compute-dtype 'fp32'"),
    ("train --framework jax --out {}/x --mesh fsdb=2", "fsdb"),
    (RUN + "--out {}/x --batch-size 4 --mesh data=3", "data"),
    (RUN + "--out {}/x --mesh data=0", "data"),
    (RUN + "--out {}/text.txt", "a file; --out is a folder"),
    (RUN + "--out {}/x --seq-len 9999", "seq"),
    (RUN + "--out {}/x --data {}/q.npy", "q.npy: no such token file; make one with one-model prepare-data"),
    (RUN + "--out {}/x --data {}/text.txt", "not a token file"),
    (RUN + "--out {}/x --eval-data {}/q.npy", "q.npy"),
    (RUN + "--out {}/x --tokenizer {}/q.json", "make one with one-model train-tokenizer"),
    (RUN + "--out {}/run --lr-max 0.5", "--lr-max = 0.001 here, 0.5 asked for"),
    (RUN + "--out {}/run --total-steps 2", "a run may become longer, not shorter"),
    (RUN + "--out {}/run --seed 4", "seed"),
    ("train --config {}/typo.toml", "unknown key 'learning_rate_max'"),
    ("train --config {}/near.toml", "unknown key 'lr_mx': did you mean lr_max?"),
    ("generate --framework jax --checkpoint {}/run", "no prompt: give --prompt or --prompts-file"),
    ("generate --framework jax --prompt a", "--checkpoint is missing"),
    ("generate --framework jax --checkpoint {}/nope --prompt a", "nope: no such folder"),
    ("generate --framework jax --checkpoint {}/run --prompt a --top-p 2", "--top-p 2.0"),
    ("generate --framework jax --checkpoint {}/run --prompt a --temperature -1", "--temperature -1.0"),
    ("generate --framework jax --checkpoint {}/run --prompt a --max-new-tokens 9999", "9999"),
    ("evaluate --framework jax --checkpoint {}/run", "--text or --data is missing"),
    ("evaluate --framework jax --checkpoint {}/run --text a --data b", "give one of them"),
    ("evaluate --framework jax --checkpoint {}/run --text {}/nope.txt", "nope.txt"),
    ("evaluate --framework jax --checkpoint {}/run --data {}/q.npy", "q.npy"),
    ("export --checkpoint {}/run", "--out is missing"),
    ("export --checkpoint {}/run --out {}", "is there already"),
    ("export --checkpoint {}/run --out {}/y --dtype int4", "--dtype 'int4' is not known"),
    ("prepare-data --validation half", "--validation half: a number is expected"),
    ("prepare-data --tokenizer {}/bpe.json --data {}/nothing", "no such file or folder"),
    ("train-tokenizer --vocabsize 300", "did you mean --vocab-size?"),
    ("inspect-data --data {}/q.npy --tokenizer {}/bpe.json", "q.npy"),
    ("plot-runs", "runs is missing"),
    ("plot-runs {}/nope", "nope"),
    ("plot-runs {}/run --out {}/x.bmp", "must end in .png"),
    ("convert-checkpoint --from {}/nope --to-dcp {}/z", "nope"),
    ("benchmark", "what is missing: one of train"),
    (RUN + "--out {}/run --data {}/other.npy", "--data has other tokens"),
    (RUN + "--out {}/x --document-mask --document-separator 5", "documents in the data end with token"),
    (RUN + "--out {}/x --document-separator 5000", "the vocabulary has"),
    (RUN + "--out {}/x --cache-dir {}/text.txt", "is a file; a folder is needed"),
    (RUN + "--out {}/x --join-timeout -1", "--join-timeout -1: a positive number is expected"),
    (RUN + "--out {}/x --device cuda", "--device cuda"),
    (RUN + "--out {}/x --remat some", "--remat 'some' is not known"),
    (RUN + "--out {}/x --lr 1", "there is no flag --lr: did you mean --lr-max?"),
    (RUN + "--out {}/x --epochs 3", "there is no flag --epochs ("),
    (RUN + "--out {}/x --preset EMPTY", "--preset is empty"),
    (RUN + "--out EMPTY", "--out is empty"),
    (RUN + "--out {}/x --mesh=", "--mesh is empty"),
    ("train --config {}/table.toml", "unknown table [optimiser]: did you mean optimizer?"),
    ("train --config {}/list.toml", "batch_size = [8] is not what --batch-size takes"),
    ("train --config {}/empty.toml", "preset is empty"),
    ("train --config {}", "a folder; a file is needed"),
    ("generate --framework jax --checkpoint {} --prompt a", "holds runs; give one of them"),
    ("generate --framework jax --checkpoint {}/run --prompts-file {} --max-new-tokens 2", "a folder; a file is needed"),
    ("generate --framework jax --checkpoint {}/run --prompts-file {}/nothing.txt", "has no line with a prompt"),
    ("generate --framework jax --checkpoint {}/run --tokenizer {}/other.json --prompt a", "has other ids than the"),
    ("evaluate --framework jax --checkpoint {}/run --tokenizer {}/other.json --text {}/text.txt", "has other ids than"),
    ("evaluate --framework jax --checkpoint {}/run --data {}/p.npy --field words", "are for --text, not for --data"),
    ("export --checkpoint {}/run --out {}/m.bin", "a folder is written; or one file, whose name ends in .gguf"),
    ("export --checkpoint {}/run --out {}/m.GGUF --shard-gib 1", "--shard-gib: a GGUF file is one file"),
    (
        "prepare-data --tokenizer {}/bpe.json --data {}/text.txt --out {}/y.npy --processes 2",
        "--processes: is for shards",
    ),
    ("train-tokenizer --data {}/text.txt --out {}/new.json --processes 100000", "--processes 100000: at most 512"),
    ("benchmark trian", "'trian' is not known: did you mean train?"),
]

# Every command in one process, which so shows that none of them has imported a framework.
CALL = """
import contextlib, io, json, sys
from llm_common.errors import run_main
from llm_tools.command import main
answers = []
for words in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(lambda: main(words))
        except SystemExit as end:
            code = end.code
    imported = sorted({"jax", "torch", "flax", "optax", "transformers"} & set(sys.modules))
    answers.append([code, out.getvalue(), err.getvalue(), imported])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with what a run needs, and the run of a few steps."""
    from parity.core.workshop import Workshop, call

    folder = tmp_path_factory.mktemp("wrong")
    Workshop(folder)
    (folder / "typo.toml").write_text("learning_rate_max = 1.0")
    (folder / "near.toml").write_text("lr_mx = 1.0")
    (folder / "table.toml").write_text("[optimiser]\nlr_max = 1.0")
    (folder / "list.toml").write_text("batch_size = [8]")
    (folder / "empty.toml").write_text("preset = ''")
    (folder / "nothing.txt").write_text("\n\n")
    call("train_tokenizer", "--data", folder / "text.txt", "--out", folder / "other.json", "--vocab-size", 258)
    text = (folder / "text.txt").read_text()
    (folder / "half.txt").write_text(text[: len(text) // 2])
    for name, out in (("text.txt", "p.npy"), ("half.txt", "other.npy")):
        call("prepare_data", "--tokenizer", folder / "bpe.json", "--data", folder / name, "--out", folder / out)
    flags = RUN.format(*[folder] * 3).split()[1:]
    call("train", *flags, "--out", folder / "run", "--total-steps", 3, "--device", "cpu", "--batch-size", 2)
    return folder


def test_every_wrong_command_is_one_line_with_the_fix_before_a_framework_is_imported(shop):
    given = [words.replace("{}", str(shop)).split() for words, _ in WRONG]
    asked = [["" if word == "EMPTY" else word for word in words] for words in given]
    of_run = lambda words: words[0] == "train" and str(shop / "run") in words
    asked = [[*words, "--batch-size", "2"] if of_run(words) else words for words in asked]
    ended = subprocess.run(
        [sys.executable, "-c", CALL], input=json.dumps(asked), capture_output=True, text=True, timeout=300, check=True
    )
    for (command, words), (code, out, err, imported) in zip(WRONG, json.loads(ended.stdout), strict=True):
        assert code == 2, (command, out, err)
        assert err.startswith("error: "), (command, err)
        assert len(err.splitlines()) == 1, (command, err)
        assert len(err) < 900, (command, err)
        assert words in err, (command, err)
        assert not imported, (command, err, imported)


def test_the_page_of_programs_names_all_and_each_has_its_help(capsys):
    import importlib

    from llm_tools.command import main

    assert main([]) == 0
    page = capsys.readouterr().out
    for name in PROGRAMS:
        assert f"one-model {name} " in page
        module = importlib.import_module(f"llm_tools.programs.{name.replace('-', '_')}")
        with pytest.raises(SystemExit) as end:
            module.main(["--help"])
        assert end.value.code == 0
        assert f"one-model {name}" in capsys.readouterr().out


def test_the_names_of_checks_on_the_command_line_are_those_of_the_ladder():
    from parity.checks.ladder import CHECKS
    from parity.commands.cli import CHECK_NAMES

    assert tuple(CHECKS) == CHECK_NAMES

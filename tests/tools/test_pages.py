"""The commands of the pages: every one has flags that exist, and those of a page in a row do what the page says."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import llm_tools.command
import parity.commands.cli
from llm_common.command_line import CommandParser
from llm_common.config import preset
from llm_common.files.export import export
from llm_common.text.tokenizer import Tokenizer
from parity.core.inputs import random_weights

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = ("gates", "mutants", "tolerances", "tpu_compiled", "scaling")  # by programs
ENTRIES = {"one-model": llm_tools.command.main, "parity": parity.commands.cli.main}
SMALL = ["--preset", "tiny", "--seq-len", "64", "--batch-size", "2", "--device", "cpu"]


def commands(page: Path) -> list[list[str]]:
    """Name and arguments of each command of this project in the blocks of a page, in order."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if kind in ("", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                found += of_line(shlex.split(line, comments=True))
    return found


def of_line(words: list[str]) -> list[list[str]]:
    """Also inside of a quoted command, which `ssh` and others take."""
    inner = [found for word in words if " " in word and "one-model" in word for found in of_line(shlex.split(word))]
    starts = [i for i, word in enumerate(words) if Path(word).name in ENTRIES]
    if not starts or (starts[0] > 0 and words[starts[0] - 1] in ("--spec", "pip")):
        return inner
    end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";") and i > starts[0]), len(words))
    return [[Path(words[starts[0]]).name, *(word for word in words[starts[0] + 1 : end] if word != "...")], *inner]


class ParsedError(Exception):
    pass


@pytest.mark.parametrize("page", [x for x in PAGES if x.stem not in WRITTEN], ids=lambda x: x.stem)
def test_every_flag_exists(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plain = CommandParser.parse_args

    def parse(self, *args):
        plain(self, *args)
        raise ParsedError

    monkeypatch.setattr(CommandParser, "parse_args", parse)
    for name, *argv in commands(page):
        if argv and not {"--config", "--help"} & {*argv}:
            with pytest.raises(ParsedError):
                ENTRIES[name](argv)


def test_commands_are_found():
    """So that the test above does not pass on nothing."""
    found = {page.stem: commands(page) for page in PAGES[1:]}
    assert len(commands(PAGES[0])) > 10
    assert {"start", "training", "gpu", "fine_tuning", "devices", "parity"} <= {x for x in found if found[x]}
    assert sum(map(len, found.values())) > 50
    assert sum(argv[:1] == ["parity"] and "--fuzz" in argv for argv in found["parity"]) == 1
    assert any("--mesh" in argv and "splash" in argv for argv in found["devices"])  # inside of a quoted command


def play(page: str, text: Path, more: list[str]) -> list[list[str]]:
    """Run the commands of a page in this folder, with a small text and few steps; returns them. more: for `train`."""
    steps: dict[str, int] = {}
    played = []
    for name, *argv in commands(ROOT / "docs" / f"{page}.md"):
        if name == "parity" or not argv:
            continue
        program = argv[0]
        if program in ("train-tokenizer", "prepare-data") and "--data" not in argv:
            argv += ["--data", str(text)]
        if program == "train-tokenizer":
            argv += ["--vocab-size", "300"]
        if program == "train":
            out = argv[argv.index("--out") + 1]
            steps[out] = steps.get(out, 0) + 3 * ("--dry-run" not in argv)
            argv += [*more, "--total-steps", str(max(steps[out], 1))]
        if program == "generate":
            argv += ["--max-new-tokens", "4", *more[more.index("--device") :][:2]]
        assert not llm_tools.command.main(argv), argv
        played.append(argv)
    return played


@pytest.fixture
def text(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(f"Text {i} says that {i} is less. " * 9 for i in range(60)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "text.txt"


def test_from_pip_install_to_a_model(text):
    assert len(play("start", text, SMALL)) >= 9
    assert {x.name for x in text.parent.glob("my_model*")} >= {"my_model"}


def test_on_a_gpu_as_far_as_a_cpu_can_tell(text, capsys):
    assert len(play("gpu", text, [*SMALL, "--compute-dtype", "bfloat16"])) == 7
    assert "going on from runs/gpu/step-00000003" in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu(text):
    assert len(play("gpu", text, ["--batch-size", "8", "--device", "gpu"])) == 7


def test_a_model_is_fine_tuned(text, capsys):
    cfg = dataclasses.replace(preset("tiny"), vocab_size=300, max_position_embeddings=256)
    folder = text.parent / "models" / "smollm2"
    export(folder, cfg, random_weights(cfg, 0, "float32"), Tokenizer([], special_tokens=["<|endoftext|>"]))
    (folder / "bpe.json").unlink()  # which knows no template
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}")
    (text.parent / "data").mkdir()
    (text.parent / "data" / "questions.jsonl").write_text('{"question": "Who?", "answer": "A model."}\n')
    played = play("fine_tuning", text, ["--device", "cpu"])
    assert [argv[0] for argv in played] == ["generate", "prepare-data", "inspect-data", "train", "generate", "export"]
    assert (text.parent / "models" / "tuned" / "config.json").is_file()

"""The recipes of docs/recipes.md, each run as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"## (\d+\. .*?)\n+```python\n(.*?)```", PAGE, re.DOTALL)

# All in one process, which imports the frameworks once; each has names of its own.
RUN = """
import json, sys
for title, code in json.loads(sys.stdin.read()):
    print("==", title, flush=True)
    exec(compile(code, title, "exec"), {"__name__": "__main__"})
"""


def test_there_are_ten():
    assert len(RECIPES) == 10


@pytest.fixture(scope="module")
def printed():
    import json

    ended = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(RECIPES), capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    return dict(part.split("\n", 1) for part in ended.stdout.split("== ")[1:])


@pytest.mark.parametrize("title", [title for title, _ in RECIPES])
def test_a_recipe_runs_and_prints_what_it_found(printed, title):
    assert printed[title].strip()


def test_what_they_print_is_right(printed):
    said = {title.split(".")[0]: text.strip() for title, text in printed.items()}
    assert float(said["1"].splitlines()[0]) < 1e-5
    assert said["2"] == "torch.Size([2, 6, 32])"
    assert said["5"] == "(4, 16) 984"
    assert said["6"] == said["7"] == "12"
    assert 3.0 < float(said["8"]) < 4.1  # log 50 is 3.9, and three steps are made
    first, second = said["10"].split("] [")
    assert first.strip("[]") == second.strip("[]")

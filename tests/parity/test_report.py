"""The page: complete, without network or script, and drawn by a real browser if there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from parity.checks.noise import with_noise
from parity.core.compare import Row
from parity.report.charts import Scale
from parity.report.page import render
from parity.report.report import status, write_comparison, write_html_of, write_json, write_markdown
from parity.sides.settings import Settings

ROWS = [
    Row("logits", "as given", "float64", 1e-15, 1e-12, True, noise=5e-16),
    Row(
        "logits",
        "tied <head>",
        "float64",
        3e-3,
        1e-12,
        False,
        "torch",
        "torch differs first at lm_head",
        "lm_head",
        5e-16,
    ),
    Row("init", "elements that differ", "float32", 0, 0, True),
    Row("tokens", "raised an error", "", float("nan"), 0, False, "JAX", "ValueError: no"),
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from parity.checks.figures import figures

    out = tmp_path_factory.mktemp("report")
    drawn = figures(Settings(steps=20))
    write_json(out / "report.json", ROWS, seconds=1.0, settings={"seed": 0}, figures=drawn)
    outcome = {"area": "RoPE", "name": "sign", "equivalent": False, "ok": True, "found": ["logits", "JAX", "x"]}
    score = dict.fromkeys(
        ["bugs", "caught", "right side", "with a place", "localised", "without a bug", "false alarms"], 1
    )
    mutants = {"score": score | {"shared or in both sides": 1}, "smallest effects": {"logits float64": [30.0, "sign"]}}
    (out / "mutants.json").write_text(json.dumps(mutants | {"outcomes": [outcome]}))
    write_html_of(out)
    return out


def test_the_page_tells_the_whole_story_and_asks_nobody(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    for heading in ("The ladder", "The error through the layers", "The gradient of each tensor", "steps of training"):
        assert heading in page
    for heading in ("Sampled tokens", "Does the suite see bugs?", "Environment, versions, flags"):
        assert heading in page
    assert "2 of 4 checks fail. First at logits" in page
    assert "tied &lt;head&gt;" in page, "what comes from outside is escaped"
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert "nan" not in re.sub(r"<summary.*?</summary>", "", page.split("<svg", 1)[1].split("</svg>")[0])


def test_a_failing_check_is_open_and_a_good_one_closed(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<details open>") == 1


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)])
def test_a_real_browser_draws_it(folder, width, height):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no browser here")
    page = (folder / "report.html").resolve().as_uri()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"]
    dom = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=120).stdout
    assert 'id="verdict"' in dom
    assert dom.count("<svg") >= 4
    picture = folder / f"page-{width}.png"
    subprocess.run([*command, f"--screenshot={picture}", page], capture_output=True, timeout=120, check=True)
    assert picture.stat().st_size > 20_000


def test_a_page_of_nothing_is_still_a_page():
    assert "No ladder was run" in render(None)


def test_how_a_figure_stands_to_the_noise():
    assert status(ROWS[0]) == "ok, above the noise"
    assert status(Row("a", "b", "float64", 1e-16, 1e-12, True, noise=5e-16)) == "noise"
    assert status(ROWS[2]) == "equal"
    noise = Row("noise", "JAX, logits: uncompiled against jit", "float64", 7e-16, 2e-12, True)
    found = with_noise(
        [Row("cache", "x", "float64", 1e-15, 1e-12, True), noise, Row("cache", "y", "float32", 1.0, 2.0, True)]
    )
    assert [row.noise for row in found] == [7e-16, None, None]


def test_a_logarithmic_axis_holds_everything():
    scale = Scale([1e-15, 3.0])
    assert (scale(1e-15), scale(0.0), scale(float("inf"))) == (0.0, 0.0, 100.0)
    assert 0 < scale(1e-8) < scale(1.0) < 100


def test_markdown_for_a_pull_request(tmp_path):
    write_markdown(tmp_path / "r.md", ROWS, ["text"], "cpu")
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "| logits | as given | float64 | 5.0e-16 | 1.0e-15 | 1.0e-12 | ok, above the noise |" in text
    assert "**torch** torch differs first at lm_head" in text


def test_a_pair_has_a_page_too(tmp_path):
    import runpy

    pair = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "mlp.py"))["mlp"]
    write_comparison(pair.compare(["float64"]), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Which tensor is which" in page
    assert "fc1.kernel, transposed" in page

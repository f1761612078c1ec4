"""Curves of runs, as a picture and as a page."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.errors import UserError
from llm_common.run.folder import LOG_FILE
from llm_common.run.log import read_log

COLORS = ("#2a78d6", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#0e7490", "#be185d", "#4b5563")
STYLE = """body{font:15px system-ui,sans-serif;margin:1.5rem auto;max-width:1200px;padding:0 1rem;color:#111827}
table{border-collapse:collapse}td,th{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #e5e7eb}
td:first-child,th:first-child{text-align:left}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:1rem;margin-top:1.5rem}
.panels img{width:100%}
@media(max-width:700px){thead{display:none}tr{display:block;padding:.5rem 0;border-bottom:2px solid #e5e7eb}
td,td:first-child{display:flex;justify-content:space-between;gap:1rem;text-align:right;border:0;padding:.15rem 0}
td::before{content:attr(data-name);color:#6b7280}}"""


def read_run(path: Path) -> dict[str, Any]:
    log = path / LOG_FILE if path.is_dir() else path
    if not log.is_file():
        raise UserError(f"{path}: has no {LOG_FILE}; is this the folder of a run?")
    rows = read_log(log)
    steps = [row for row in rows if "event" not in row and "loss" in row]
    if not steps:
        raise UserError(f"{log}: no step was logged")
    column = lambda key: np.array([np.nan if row.get(key) is None else row[key] for row in steps], float)
    evaluations = [(row["step"], row["loss"]) for row in rows if row.get("event") == "evaluation"]
    frameworks = [row.get("framework", "") for row in steps]
    pairs = zip(steps, frameworks, frameworks[1:], strict=False)
    changes = [(row["step"], f"{before} → {after}") for row, before, after in pairs if before != after]
    return {
        "name": f"{path.name if path.is_dir() else path.stem} ({' and '.join(dict.fromkeys(frameworks))})",
        "evaluations": evaluations,
        "changes": changes,
        **{key: column(key) for key in ("step", "loss", "lr", "grad_norm", "tokens_per_second")},
    }


def draw(runs: list[dict[str, Any]], smooth: int):
    """All panels as one figure of matplotlib."""
    plt = _pyplot()
    titles = _titles(runs)
    figure, axes = plt.subplots(-(-len(titles) // 2), 2, figsize=(12, 3.4 * -(-len(titles) // 2)), layout="constrained")
    for axis, key in zip(axes.flat, titles, strict=False):
        _draw_panel(axis, key, titles[key], runs, smooth)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    return figure


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _titles(runs: list[dict[str, Any]]) -> dict[str, str]:
    """What is drawn, and the words above it."""
    titles = {
        "loss": "loss (nats per token)",
        "lr": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "tokens_per_second": "tokens per second",
    }
    return titles | ({"difference": f"difference of the loss from {runs[0]['name']}"} if len(runs) > 1 else {})


def _draw_panel(axis, key: str, title: str, runs: list[dict[str, Any]], smooth: int) -> None:
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        if key != "difference":
            wide = i == 0 and len(runs) > 1  # the first run lies under the others, which may be the same to the eye
            style = {"color": color, "linewidth": 3.5 if wide else 1.2, "alpha": 0.45 if wide else 1.0}
            axis.plot(run["step"], running_mean(run[key], smooth), label=run["name"], **style)
            for step, change in run["changes"]:
                axis.axvline(step, color=color, linewidth=0.8, linestyle=":")
                if key == "loss":
                    words = {"rotation": 90, "fontsize": 8, "va": "top", "ha": "right"}
                    axis.text(step, 0.98, change, color=color, transform=axis.get_xaxis_transform(), **words)
            if key == "loss" and run["evaluations"]:
                label = f"{run['name']}, held out"
                axis.plot(*zip(*run["evaluations"], strict=True), "o", color=color, markersize=4, label=label)
        elif i > 0:
            common, mine, first = np.intersect1d(run["step"], runs[0]["step"], return_indices=True)
            difference = np.abs(run["loss"][mine] - runs[0]["loss"][first])
            # what is equal is drawn at the spacing of float32 numbers there
            floor = np.spacing(np.float32(np.nanmax(runs[0]["loss"])))
            shown = np.maximum(running_mean(difference, smooth), floor)
            axis.semilogy(common, shown, color=color, linewidth=1.0, label=run["name"])
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step")
    if key == "tokens_per_second":
        axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    if key in ("loss", "difference"):
        axis.legend(frameon=False, fontsize=8)


def running_mean(x: np.ndarray, n: int) -> np.ndarray:
    """The mean of each value and up to n - 1 before it."""
    if n == 1:
        return x
    sums = np.cumsum(np.concatenate([[0.0], x]))
    starts = np.maximum(np.arange(len(x)) - n + 1, 0)
    return (sums[1:] - sums[starts]) / (np.arange(len(x)) + 1 - starts)


def page(runs: list[dict[str, Any]], smooth: int) -> str:
    """The panels as pictures of their own, which lie beside each other where there is room, and below on a phone."""
    plt = _pyplot()
    pictures = []
    for key, title in _titles(runs).items():
        figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
        _draw_panel(axis, key, title, runs, smooth)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200)
        plt.close(figure)
        picture = base64.b64encode(buffer.getvalue()).decode()
        pictures.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{picture}">')
    rows = []
    for run in runs:
        cells = (
            html.escape(run["name"]),
            f"{int(run['step'][-1]):,}",
            f"{run['loss'][-1]:.4f}",
            f"{run['evaluations'][-1][1]:.4f}" if run["evaluations"] else "–",
            f"{np.nanmedian(run['tokens_per_second']):,.0f}",
            "; ".join(f"{change} after step {step}" for step, change in run["changes"]) or "–",
        )
        heads = ("run", "last step", "loss", "held-out loss", "tokens/s (median)", "change of framework")
        named = zip(heads, cells, strict=True)
        rows.append("<tr>" + "".join(f'<td data-name="{head}">{cell}</td>' for head, cell in named) + "</tr>")
    names = "".join(f"<th>{head}</th>" for head in heads)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Runs</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><h1>Runs</h1>
<table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table>
<div class="panels">{"".join(pictures)}</div></body></html>
"""

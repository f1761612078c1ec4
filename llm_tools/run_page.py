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
    changes = [steps[i]["step"] for i in range(1, len(steps)) if frameworks[i] != frameworks[i - 1]]
    return {
        "name": f"{path.name if path.is_dir() else path.stem} ({' and '.join(dict.fromkeys(frameworks))})",
        "evaluations": evaluations,
        "changes": changes,
        **{key: column(key) for key in ("step", "loss", "lr", "grad_norm", "tokens_per_second")},
    }


def draw(runs: list[dict[str, Any]], smooth: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = ["loss", "lr", "grad_norm", "tokens_per_second"] + (["difference"] if len(runs) > 1 else [])
    titles = {
        "loss": "loss (nats per token)",
        "lr": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "tokens_per_second": "tokens per second",
        "difference": f"difference of the loss from {runs[0]['name']}",
    }
    figure, axes = plt.subplots(
        3 if len(panels) > 4 else 2, 2, figsize=(12, 10 if len(panels) > 4 else 7), layout="constrained"
    )
    flat = list(axes.flat)
    for axis, key in zip(flat, panels, strict=False):
        for i, run in enumerate(runs):
            color = COLORS[i % len(COLORS)]
            wide = i == 0 and len(runs) > 1  # the first run lies under the others, which may be the same to the eye
            style = {"color": color, "linewidth": 3.5 if wide else 1.2, "alpha": 0.45 if wide else 1.0}
            if key != "difference":
                axis.plot(run["step"], running_mean(run[key], smooth), label=run["name"], **style)
                for step in run["changes"]:
                    axis.axvline(step, color=color, linewidth=0.6, linestyle=":")
                if key == "loss" and run["evaluations"]:
                    axis.plot(
                        *zip(*run["evaluations"], strict=True),
                        "o",
                        color=color,
                        markersize=4,
                        label=f"{run['name']}, held out",
                    )
            elif i > 0:
                common, mine, first = np.intersect1d(run["step"], runs[0]["step"], return_indices=True)
                difference = np.abs(run["loss"][mine] - runs[0]["loss"][first])
                # what is equal is drawn at the spacing of float32 numbers there
                floor = np.spacing(np.float32(np.nanmax(runs[0]["loss"])))
                axis.semilogy(
                    common,
                    np.maximum(running_mean(difference, smooth), floor),
                    color=color,
                    linewidth=1.0,
                    label=run["name"],
                )
        axis.set_title(titles[key], fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    if len(panels) > 4:
        flat[4].legend(frameon=False, fontsize=8)
    for axis in flat[len(panels) :]:
        axis.set_visible(False)
    flat[0].legend(frameon=False, fontsize=8)
    return figure


def running_mean(x: np.ndarray, n: int) -> np.ndarray:
    """The mean of each value and up to n - 1 before it."""
    if n == 1:
        return x
    sums = np.cumsum(np.concatenate([[0.0], x]))
    starts = np.maximum(np.arange(len(x)) - n + 1, 0)
    return (sums[1:] - sums[starts]) / (np.arange(len(x)) + 1 - starts)


def page(figure, runs: list[dict[str, Any]]) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    picture = base64.b64encode(buffer.getvalue()).decode()
    rows = []
    for run in runs:
        held_out = f"{run['evaluations'][-1][1]:.4f}" if run["evaluations"] else "–"
        cells = (
            html.escape(run["name"]),
            f"{int(run['step'][-1]):,}",
            f"{run['loss'][-1]:.6f}",
            held_out,
            f"{np.nanmedian(run['tokens_per_second']):,.0f}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Runs</title>
<style>body{{font:15px system-ui,sans-serif;margin:2rem auto;max-width:1200px;color:#111827}}img{{max-width:100%}}
table{{border-collapse:collapse}}td,th{{padding:.3rem .9rem;text-align:right;border-bottom:1px solid #e5e7eb}}td:first-child,
th:first-child{{text-align:left}}</style></head><body><h1>Runs</h1>
<table><tr><th>run</th><th>steps</th><th>last loss</th><th>held-out loss</th><th>tokens/s (median)</th></tr>{"".join(rows)}</table>
<p><img alt="curves of the runs" src="data:image/png;base64,{picture}"></p></body></html>
"""

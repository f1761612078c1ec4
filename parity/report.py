"""What a person and a machine read of a run: the table, a JSON file, a Markdown page and the picture of the curves."""

import json
import math
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm_common.run_log import environment
from parity.compare import Row


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough for the table when the output goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=150)


def verdict_line(rows: list[Row]) -> str:
    """One sentence: do they agree, and if not, which side differs first."""
    failed = [row for row in rows if not row.ok]
    if not failed:
        return f"All {len(rows)} checks hold: JAX, PyTorch and the specification agree."
    first = failed[0]
    return (
        f"{len(failed)} of {len(rows)} checks fail. First at {first.check} ({first.item}): {number(first.measured)}, "
        f"allowed {number(first.allowed)}. Side: {first.side}."
    )


def number(x: float) -> str:
    if not math.isfinite(x):
        return "-" if math.isinf(x) else "nan"
    return str(int(x)) if x == int(x) and abs(x) < 1e6 else f"{x:.1e}" if abs(x) < 1e-2 or abs(x) > 1e3 else f"{x:.2f}"


def standing(row: Row) -> str:
    """How a row that holds stands to the frameworks' own noise."""
    if row.measured == 0:
        return "equal"
    if row.noise is None:
        return "ok"
    return "noise" if row.measured <= row.noise else "ok, above the noise"


def grouped(rows: list[Row]) -> list[Row]:
    """Rows of one check together, in the order in which the checks first appear."""
    order = list(dict.fromkeys(row.check for row in rows))
    return sorted(rows, key=lambda row: order.index(row.check))


def print_table(console: Console, rows: list[Row]) -> None:
    table = Table(
        title="measured error against what is allowed, and each framework's own noise",
        title_justify="left",
        pad_edge=False,
    )
    for column, justify in (
        ("check", "left"),
        ("what", "left"),
        ("dtype", "left"),
        ("noise", "right"),
        ("measured", "right"),
        ("allowed", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=column != "what")  # type: ignore[arg-type]
    table.add_column("verdict")
    last = ""
    for row in grouped(rows):
        if last and row.check != last:
            table.add_section()
        last = row.check
        verdict = f"[green]{standing(row)}[/green]" if row.ok else f"[bold red]{row.side}[/bold red] {escape(row.note)}"
        noise = "-" if row.noise is None else number(row.noise)
        table.add_row(row.check, row.item, row.dtype, noise, number(row.measured), number(row.allowed), verdict)
    console.print(table)


def write_json(path: Path, rows: list[Row], **content: Any) -> None:
    """The rows, the environment and whatever else describes the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "verdict": verdict_line(rows),
        "ok": all(row.ok for row in rows),
        "environment": environment(),
        **content,
        "rows": [{key: _json_value(value) for key, value in asdict(row).items()} for row in rows],
    }
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _json_value(x: Any) -> Any:
    if isinstance(x, np.generic):
        x = x.item()
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x  # JSON has no infinity


def write_markdown(path: Path, rows: list[Row], paragraphs: list[str], device: str) -> None:
    """A page to send to a colleague or to paste into a pull request."""
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items() if version)
    lines = ["# Parity report", "", f"**{verdict_line(rows)}**", "", *paragraphs]
    lines += ["", "| check | what | dtype | noise | measured | allowed | verdict |", "|---|---|---|---|---|---|---|"]
    for row in grouped(rows):
        verdict = standing(row) if row.ok else f"**{row.side}** {row.note}"
        noise = "" if row.noise is None else number(row.noise)
        cells = (row.check, row.item, row.dtype, noise, number(row.measured), number(row.allowed), verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        f"{date.today().isoformat()}, {device}, Python {environment()['python']}, {environment()['system']}; {versions}",
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def print_progress(console: Console, name: str, rows: list[Row], seconds: float) -> None:
    """One line for a finished check."""
    bad = [row for row in rows if not row.ok]
    mark = "[green]ok  [/green]" if not bad else "[bold red]FAIL[/bold red]"
    text = f"{len(rows)} figures" if not bad else escape(f"{bad[0].item}: side {bad[0].side}")
    console.print(f"  {mark} {name:11} {text}  ({seconds:.0f} s)")


def conclude(
    console: Console, out: Path, rows: list[Row], paragraphs: list[str], device: str, *, seconds: float, **content: Any
) -> bool:
    """Print the table and the verdict, write report.json and report.md to `out`. Returns whether every check holds."""
    print_table(console, rows)
    write_json(out / "report.json", rows, seconds=seconds, **content)
    write_markdown(out / "report.md", rows, paragraphs, device)
    ok = all(row.ok for row in rows)
    console.print(f"[bold {'green' if ok else 'red'}]{escape(verdict_line(rows))}[/]")
    console.print(f"{seconds:.0f} s; report: {out / 'report.md'}, {out / 'report.json'}")
    return ok


def draw_curves(path: Path, curves: dict[str, list[float]], unigram: float, title: str) -> None:
    """Both loss curves; below them, on a log axis, their difference and what one ulp in every tenth weight does
    within JAX.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    jax, torch, control = (np.array(curves[name]) for name in ("jax", "torch", "control"))
    steps = range(1, len(jax) + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.5, 6), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    top.plot(steps, jax, color="#2a78d6", linewidth=4, alpha=0.45, label="JAX")
    top.plot(steps, torch, color="#c2410c", linewidth=1.2, label="PyTorch")
    top.axhline(unigram, color="#6b7280", linewidth=1, linestyle="--", label="entropy of the token frequencies")
    top.set_ylabel("loss (nats per token)")
    top.set_title(title, fontsize=11, loc="left")
    top.legend(frameon=False)
    spacing = 2.0**-23 * 4  # of float32 at these losses: what is equal is drawn there
    for other, color, label in (
        (control, "#9ca3af", "JAX and JAX moved by one ulp"),
        (torch, "#111827", "JAX and PyTorch"),
    ):
        bottom.semilogy(steps, np.maximum(np.abs(jax - other), spacing), color=color, linewidth=1, label=label)
    bottom.legend(loc="lower right", edgecolor="none", fontsize=9)
    bottom.set_ylabel("difference of the loss")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)

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

from llm_common.errors import counted
from llm_common.run.log import environment
from parity.core.compare import Row


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough for the table when the output goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=150)


def verdict_line(rows: list[Row]) -> str:
    """One sentence: do they agree, and if not, which side differs first."""
    failed = [row for row in rows if not row.ok]
    if not failed:
        hold = "The one check holds" if len(rows) == 1 else f"All {len(rows)} checks hold"
        return f"{hold}: JAX, PyTorch and the specification agree."
    first = failed[0]
    return (
        f"{len(failed)} of {len(rows)} checks fail. First at {first.check} ({first.item}): {number(first.measured)}, "
        f"allowed {number(first.allowed)}. Side: {first.side}."
    )


def number(x: float) -> str:
    if not math.isfinite(x):
        return "-" if math.isinf(x) else "nan"
    return str(int(x)) if x == int(x) and abs(x) < 1e6 else f"{x:.1e}" if abs(x) < 1e-2 or abs(x) > 1e3 else f"{x:.2f}"


def status(row: Row) -> str:
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
        verdict = f"[green]{status(row)}[/green]" if row.ok else f"[bold red]{row.side}[/bold red] {escape(row.note)}"
        noise = "-" if row.noise is None else number(row.noise)
        table.add_row(row.check, row.item, row.dtype, noise, number(row.measured), number(row.allowed), verdict)
    console.print(table)


def write_json(path: Path, rows: list[Row], verdict: str | None = None, **content: Any) -> None:
    """The rows, the environment and whatever else describes the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "verdict": verdict or verdict_line(rows),
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


def write_markdown(path: Path, rows: list[Row], paragraphs: list[str], device: str, verdict: str | None = None) -> None:
    """A page to send to a colleague or to paste into a pull request."""
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items() if version)
    lines = ["# Parity report", "", f"**{verdict or verdict_line(rows)}**", "", *paragraphs]
    lines += ["", "| check | what | dtype | noise | measured | allowed | verdict |", "|---|---|---|---|---|---|---|"]
    for row in grouped(rows):
        result = status(row) if row.ok else f"**{row.side}** {row.note}"
        noise = "" if row.noise is None else number(row.noise)
        cells = (row.check, row.item, row.dtype, noise, number(row.measured), number(row.allowed), result)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        f"{date.today().isoformat()}, {device}, Python {environment()['python']}, {environment()['system']}; "
        f"{versions}",
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def print_progress(console: Console, name: str, rows: list[Row], seconds: float) -> None:
    """One line for a finished check; none for one that has no part in these settings."""
    if not rows:
        return
    bad = [row for row in rows if not row.ok]
    mark = "[green]ok  [/green]" if not bad else "[bold red]FAIL[/bold red]"
    text = f"{counted(len(rows), 'figure')}" if not bad else escape(f"{bad[0].item}: side {bad[0].side}")
    console.print(f"  {mark} {name:11} {text}  ({seconds:.0f} s)")


def print_and_write(
    console: Console, out: Path, rows: list[Row], paragraphs: list[str], device: str, *, seconds: float, **content: Any
) -> bool:
    """Print the table and the verdict, write report.json and report.md to `out`. Returns whether every check holds."""
    print_table(console, rows)
    write_json(out / "report.json", rows, seconds=seconds, **content)
    write_markdown(out / "report.md", rows, paragraphs, device)
    page = write_html_of(out)
    ok = all(row.ok for row in rows)
    console.print(f"[bold {'green' if ok else 'red'}]{escape(verdict_line(rows))}[/]")
    console.print(f"{seconds:.0f} s; report: {page}, {out / 'report.md'}, {out / 'report.json'}")
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


# --- pairs and traces


def print_comparison(comparison: Any) -> None:
    """Which tensor is which, the table and the verdict of a pair."""
    console = make_console()
    m = comparison.matching
    table = Table(title=f"{comparison.name}: which tensor is which", title_justify="left", pad_edge=False)
    table.add_column("torch")
    table.add_column("JAX")
    for name, how in m.how.items():
        table.add_row(escape(name), escape(how))
    for name, why in m.missing.items():
        table.add_row(f"[bold red]{escape(name)}[/]", escape(why))
    for leaf in m.unused:
        table.add_row("[bold red]none[/]", f"{escape(leaf)}: no tensor uses it")
    console.print(table)
    print_table(console, comparison.rows)
    console.print(f"[bold {'green' if comparison.ok else 'red'}]{escape(comparison.verdict())}[/]", soft_wrap=True)


def print_trace(console: Console, found: Any) -> None:
    """Every point with its errors: running free, and given identical inputs and gradients."""
    title = f"errors of {found.dtype} against the specification; allowed at one module: {found.allowed:.0e}"
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("point")
    for side in ("JAX", "torch"):
        for column in ("free", "output", "gradient"):
            table.add_column(f"{side}\n{column}", justify="right")
    jax, torch = found.sides
    for a, b in zip(jax.points, torch.points, strict=False):
        cells = []
        for p in (a, b):
            gradient = max((x for x in (p.arriving, p.leaving) if not math.isnan(x)), default=math.nan)
            output = max(x for x in (p.received, p.output) if not math.isnan(x))
            cells.append(number(p.free))
            cells += [f"[bold red]{number(x)}[/]" if x > found.allowed else number(x) for x in (output, gradient)]
        table.add_row(a.name, *cells)
    console.print(table)
    ok = found.faults() == (None, None)
    console.print(f"[bold {'green' if ok else 'red'}]{escape(found.sentence())}[/]", soft_wrap=True)


def trace_json(found: Any) -> dict[str, Any]:
    """A trace as JSON: the verdict, and the errors of every point on both sides."""
    jax, torch = found.sides
    points = []
    for a, b in zip(jax.points, torch.points, strict=False):
        sides = {
            side: {k: _json_value(v) for k, v in asdict(p).items() if k != "name"}
            for side, p in (("JAX", a), ("torch", b))
        }
        points.append({"name": a.name, **sides})
    gradients = {name: [_json_value(s.free_grads.get(name, math.inf)) for s in found.sides] for name in jax.free_grads}
    optimizers = [
        {k: max(v.values()) if isinstance(v, dict) else v for k, v in asdict(o).items()} for o in found.optimizers
    ]
    return {
        "verdict": found.sentence(),
        "ok": found.faults() == (None, None),
        "dtype": found.dtype,
        "allowed": found.allowed,
        "points": points,
        "gradients": gradients,
        "optimizer": [{k: _json_value(v) for k, v in o.items()} for o in optimizers],
    }


def write_trace(path: Path, found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace_json(found), indent=1) + "\n", encoding="utf-8")


def write_html_of(folder: Path) -> Path:
    """report.html from what report.json, trace.json and mutants.json of a folder hold."""
    from parity.report.page import render

    read = lambda name: json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else None
    page = folder / "report.html"
    page.write_text(render(read("report.json"), read("trace.json"), read("mutants.json")), encoding="utf-8")
    return page


def write_comparison(comparison: Any, folder: Path | str) -> None:
    """report.json, report.md and report.html of a pair."""
    folder, m = Path(folder), comparison.matching
    lines = ["| torch | JAX |", "|---|---|", *(f"| {name} | {how} |" for name, how in m.how.items())]
    lines += [f"| **{name}** | {why} |" for name, why in m.missing.items()] + [f"| **none** | {x} |" for x in m.unused]
    content = {
        "title": comparison.name,
        "seconds": 0.0,
        "matching": {"how": m.how, "missing": m.missing, "unused": m.unused},
        "figures": {"gradients": {name: [_json_value(e)] for name, e in comparison.gradients.items()}},
    }
    write_json(folder / "report.json", comparison.rows, **content, verdict=comparison.verdict())
    write_markdown(folder / "report.md", comparison.rows, lines, "cpu", verdict=comparison.verdict())
    write_html_of(folder)

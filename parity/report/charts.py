"""The parts of a page: text, numbers, rows on a logarithmic axis and line charts, as HTML and SVG."""

import html
import math
from collections.abc import Sequence
from typing import Any

SIDES = (("JAX", "var(--jax)"), ("torch", "var(--torch)"))


CONTROL = "var(--noise)"


def escaped(x: Any) -> str:
    return html.escape(str(x))


def number(x: Any) -> str:
    x = float(x)
    if math.isnan(x):
        return "nan"
    if math.isinf(x):
        return "none"
    return "0" if x == 0 else str(int(x)) if x == int(x) and abs(x) < 1e4 else f"{x:.1e}"


class Scale:
    """A logarithmic axis, in percent of its width; 0 lies at its left end."""

    def __init__(self, values: Sequence[float]) -> None:
        finite = [math.log10(v) for v in values if v > 0 and math.isfinite(v)]
        self.low = math.floor(min(finite, default=-16.0))
        self.high = max(math.ceil(max(finite, default=0.0)), self.low + 1)

    def __call__(self, x: float) -> float:
        if not x > 0:
            return 0.0
        if not math.isfinite(x):
            return 100.0
        return min(100.0, max(0.0, 100 * (math.log10(x) - self.low) / (self.high - self.low)))

    def axis(self) -> str:
        step = max(1, (self.high - self.low) // 6)
        ticks = range(self.low, self.high + 1, step)
        labels = "".join(f'<span style="left:{self(10.0**t):.1f}%">1e{t}</span>' for t in ticks)
        return f'<div class="axis"><div></div><div class="track">{labels}</div><div></div></div>'


def key(*items: tuple[str, str]) -> str:
    return (
        '<p class="key soft">'
        + "".join(f'<span><i style="background:{c}"></i>{escaped(n)}</span>' for n, c in items)
        + "</p>"
    )


def chart(caption: str, series: Sequence[tuple[str, str, Sequence[float]]], xs: Sequence[Any], log: bool = True) -> str:
    """A line chart; xs are numbers, or names that stand below."""
    width, height, left, right, top, bottom = 380, 230, 46, 8, 10, 26
    values = [v for _, _, ys in series for v in ys if math.isfinite(v) and (v > 0 or not log)]
    if not values:
        return ""
    place = (lambda v: math.log10(v) if v > 0 else low) if log else (lambda v: v)
    low = math.log10(min(values)) if log else min(values)
    high = place(max(values))
    if log:
        low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    high = high if high > low else low + 1
    x = lambda i: left + (width - left - right) * (i / max(len(xs) - 1, 1))
    y = lambda v: top + (height - top - bottom) * (1 - (place(v) - low) / (high - low))
    out = []
    ticks = (
        range(int(low), int(high) + 1, max(1, int(high - low) // 4))
        if log
        else [low + (high - low) * k / 4 for k in range(5)]
    )
    for t in ticks:
        at = y(10.0**t if log else t)
        label = f"1e{t}" if log else f"{t:.2f}"
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>')
        out.append(f'<text x="{left - 5}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    shown = range(len(xs)) if len(xs) <= 6 else (0, len(xs) // 2, len(xs) - 1)
    for i in shown:
        anchor = "start" if i == 0 else "end" if i == len(xs) - 1 else "middle"
        out.append(f'<text x="{x(i):.1f}" y="{height - 6}" text-anchor="{anchor}">{escaped(xs[i])}</text>')
    for name, color, ys in series:
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(ys) if math.isfinite(v))
        under = (
            ' stroke-width="6" opacity=".4"' if name == "JAX" else ' stroke-width="2"'
        )  # seen beside what lies on it
        out.append(f'<polyline points="{points}" fill="none" stroke="{color}" {under}/>')
    key = " ".join(f'<span><i style="background:{c}"></i>{escaped(n)}</span>' for n, c, _ in series)
    picture = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(caption)}">{"".join(out)}</svg>'
    return f'<figure><figcaption>{escaped(caption)}<br><span class="key">{key}</span></figcaption>{picture}</figure>'

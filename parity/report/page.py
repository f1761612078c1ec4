"""The report as one HTML file: no script, no network, light and dark, readable on a phone.

`render` takes what report.json, trace.json and mutants.json hold; each part is drawn if its numbers are there.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

from parity.report.charts import CONTROL, SIDES, Scale, chart, escaped, key, number

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d8dde4; --page: #fbfbfa; --card: #ffffff;
  --jax: #2a6fdb; --torch: #c2410c; --good: #15803d; --bad: #b91c1c; --band: #dfe7f1; --noise: #9aa5b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #333b47; --page: #14181e;
  --card: #1b2028; --jax: #6aa6ff; --torch: #fb923c; --good: #4ade80; --bad: #f87171; --band: #2a3441; --noise: #7b8694; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.15rem; font-weight: 600; margin: 0 0 4px; color: var(--soft); }
h2 { font-size: 1.1rem; margin: 36px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; } .soft { color: var(--soft); } code { font-size: .92em; overflow-wrap: anywhere; }
.verdict { font-size: 1.45rem; line-height: 1.3; font-weight: 650; margin: 6px 0 10px; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 14px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 1.3rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { font-size: .88rem; color: var(--soft); margin-bottom: 4px; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.key span { margin-right: 14px; white-space: nowrap; } .key i { display: inline-block; width: 10px; height: 10px;
  border-radius: 5px; margin-right: 5px; }
.axis, .row { display: grid; grid-template-columns: minmax(0, 300px) minmax(0, 1fr) 150px; gap: 10px; align-items: center; }
.row { padding: 2px 0; border-top: 1px solid var(--line); font-size: .86rem; } .row > :first-child { overflow-wrap: anywhere; }
.track { position: relative; height: 18px; } .track i { position: absolute; display: block; }
.band { top: 5px; height: 8px; background: var(--band); border-radius: 2px; }
.tick { top: 1px; width: 2px; height: 16px; } .dot { top: 4px; width: 10px; height: 10px; margin-left: -5px; border-radius: 5px; }
.axis .track { height: 20px; font-size: .72rem; color: var(--soft); } .axis .track span { position: absolute;
  transform: translateX(-50%); white-space: nowrap; } .axis .track span:first-child { transform: none; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 720px) { .axis, .row { grid-template-columns: minmax(0, 1fr) auto; } .axis > :first-child { display: none; }
  .row .track, .axis .track { grid-column: 1 / -1; grid-row: 2; } .axis .track { grid-row: 1; } }
table { border-collapse: collapse; width: 100%; font-size: .86rem; } td, th { text-align: left; padding: 3px 8px 3px 0;
  border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 500; }
td.num, th.num { overflow-wrap: normal; } .scroll { overflow-x: auto; } summary { cursor: pointer; } summary.more { color: var(--soft); margin: 8px 0; }
#ladder summary { list-style: none; } #ladder summary .row b::after { content: " ▸"; color: var(--soft); }
#ladder details[open] > summary .row b::after { content: " ▾"; } #ladder details > .row { padding-left: 14px; }
.tokens { display: flex; flex-wrap: wrap; gap: 4px; } .tokens span { border: 1px solid var(--line); border-radius: 4px;
  padding: 1px 6px; font-size: .82rem; text-align: center; background: var(--card); } .tokens small { display: block; color: var(--soft); }
"""


def render(report: dict | None, trace: dict | None = None, mutants: dict | None = None) -> str:
    """The whole page. Numbers that are not there leave their part out."""
    report = report or {"verdict": "No ladder was run.", "ok": False, "rows": []}
    figures = report.get("figures", {})
    parts = [_head(report, trace, mutants)]
    if report["rows"]:
        parts.append(_ladder(report["rows"]))
    if "matching" in report:
        parts.append(_matching(report["matching"]))
    if figures.get("layers"):
        parts += [_layers(figures["layers"]), _gradients(figures["layers"])]
    elif figures.get("gradients"):
        parts.append(_own_gradients(figures["gradients"]))
    if "losses" in report:
        parts.append(_training(report))
    if figures.get("trajectory"):
        parts.append(_trajectory(figures["trajectory"]))
    if figures.get("tokens"):
        parts.append(_tokens(figures["tokens"]))
    if trace is not None:
        parts.append(_trace(trace))
    if mutants is not None:
        parts.append(_mutants(mutants))
    parts.append(_environment(report))
    title = html.escape(report.get("title", "Parity report"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _head(report: dict, trace: dict | None, mutants: dict | None) -> str:
    rows, tone = report["rows"], "good" if report["ok"] else "bad"
    held = sum(row["ok"] for row in rows)
    tiles = [(f"{held} of {len(rows)}", "figures within what is allowed")]
    below = sum(row["noise"] is not None and float(row["measured"]) <= float(row["noise"]) for row in rows)
    equal = sum(float(row["measured"]) == 0 for row in rows)
    tiles.append((f"{equal} + {below}", "equal to the bit, and below a framework's own noise"))
    if mutants is not None:
        s = mutants["score"]
        tiles.append(
            (f"{s['caught']} of {s['bugs']}", f"planted bugs caught, {s['localised']} of {s['with a place']} placed")
        )
    if trace is not None:
        tiles.append(
            ("agree" if trace["ok"] else "differ", f"all {len(trace['points'])} modules, given identical inputs")
        )
    boxes = "".join(
        f'<div class="tile"><b>{escaped(a)}</b><span class="soft">{escaped(b)}</span></div>' for a, b in tiles
    )
    return (
        f"<h1>{escaped(report.get('title', 'Parity report: one language model, written twice'))}</h1>"
        f'<div class="verdict {tone}" id="verdict">{escaped(report["verdict"])}</div>'
        f'<p class="soft">{_stamp(report)}</p><div class="tiles">{boxes}</div>'
    )


def _stamp(report: dict) -> str:
    environment = report.get("environment", {})
    versions = ", ".join(f"{name} {v}" for name, v in environment.get("versions", {}).items() if v)
    return escaped(" · ".join(x for x in (environment.get("date", ""), environment.get("system", ""), versions) if x))


# --- rows on a log axis


def _ladder(rows: list[dict]) -> str:
    values = [float(row[k]) for row in rows for k in ("measured", "allowed", "noise") if row[k] is not None]
    scale = Scale([v for v in values if v < 1e3])
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["check"], []).append(row)
    lines = []
    for check, found in groups.items():
        nearest = max(found, key=lambda r: (not r["ok"], float(r["measured"]) / max(float(r["allowed"]), 1e-300)))
        inside = "".join(_ladder_row(r, scale) for r in found)
        if len(found) == 1:
            lines.append(inside)
            continue
        opened = "" if all(r["ok"] for r in found) else " open"
        lines.append(
            f"<details{opened}><summary>{_ladder_row(nearest, scale, f'{check}: {len(found)} figures')}</summary>{inside}</details>"
        )
    return (
        "<h2>The ladder</h2><p>Each error on a logarithmic axis, between the frameworks' own noise (compiled or not, "
        "sequences "
        "together or alone, fused attention or not) and what is allowed. What is 0 lies at the left end. A check "
        "stands for the one of its figures that is "
        "nearest to its limit; open it for all. At the right: measured / allowed.</p>"
        + key(("holds", "var(--good)"), ("fails", "var(--bad)"), ("noise", "var(--noise)"), ("allowed", "var(--soft)"))
        + scale.axis()
        + f'<div id="ladder">{"".join(lines)}</div>'
    )


def _ladder_row(row: dict, scale: Scale, title: str = "") -> str:
    measured, allowed = float(row["measured"]), float(row["allowed"])
    noise = None if row["noise"] is None else float(row["noise"])
    color, track = "var(--good)" if row["ok"] else "var(--bad)", ""
    if allowed > 0 and math.isfinite(allowed):
        start, end = scale(noise or 0.0), scale(allowed)
        track += f'<i class="band" style="left:{start:.1f}%;width:{max(end - start, 0.3):.1f}%"></i>'
        track += f'<i class="tick" style="left:{end:.1f}%;background:var(--soft)"></i>'
    if noise:
        track += f'<i class="tick" style="left:{scale(noise):.1f}%;background:var(--noise)"></i>'
    track += f'<i class="dot" style="left:{scale(measured):.1f}%;background:{color}"></i>'
    place = escaped(row.get("place") or row["note"])
    side = "" if row["ok"] else f'<br><span class="bad">{escaped(row["side"])}: {place}</span>'
    name = f"<b>{escaped(title)}</b>" if title else f"{escaped(row['check'])} · {escaped(row['item'])}"
    return (
        f'<div class="row"><div>{name} <span class="soft">{row["dtype"]}</span>{side}</div><div '
        f'class="track">{track}</div>'
        f'<div class="num">{number(measured)} / {number(allowed)}</div></div>'
    )


def _dots(title: str, text: str, values: dict[str, list[float]], names: Sequence[tuple[str, str]]) -> str:
    scale = Scale([float(x) for pair in values.values() for x in pair])
    lines = []
    for name, pair in values.items():
        dots = "".join(
            f'<i class="dot" style="left:{scale(float(x)):.1f}%;background:{color};opacity:.85"></i>'
            for x, (_, color) in zip(pair, names, strict=False)
        )
        figure = " / ".join(number(x) for x in pair)
        lines.append(
            f'<div class="row"><code>{escaped(name)}</code><div class="track">{dots}</div><div '
            f'class="num">{figure}</div></div>'
        )
    return f"<h2>{title}</h2><p>{text}</p>{key(*names)}{scale.axis()}{''.join(lines)}"


def _gradients(layers: dict) -> str:
    dtype = "float32" if "float32" in layers else next(iter(layers))
    text = f"Error of each gradient against the specification in {dtype}, running free, backwards through the model."
    return _dots("The gradient of each tensor", text, layers[dtype]["gradients"], SIDES)


def _own_gradients(gradients: dict) -> str:
    text = "Difference between JAX and torch, by torch's names."
    return _dots("The gradient of each tensor", text, gradients, (("difference", "var(--jax)"),))


def _matching(matching: dict) -> str:
    rows = [(n, h, "") for n, h in matching["how"].items()] + [(n, w, "bad") for n, w in matching["missing"].items()]
    rows += [("none", f"{leaf}: no tensor uses it", "bad") for leaf in matching["unused"]]
    cells = "".join(
        f'<tr class="{c}"><td><code>{escaped(a)}</code></td><td><code>{escaped(b)}</code></td></tr>' for a, b, c in rows
    )
    return (
        "<h2>Which tensor is which</h2><div "
        f"class='scroll'><table><tr><th>torch</th><th>JAX</th></tr>{cells}</table></div>"
    )


# --- lines


def _layers(layers: dict) -> str:
    charts = []
    for dtype, found in layers.items():
        short = [
            {"embed_tokens": "embed", "lm_head": "head"}.get(n.rsplit(".", 1)[-1], n.rsplit(".", 1)[-1])
            for n in found["points"]
        ]
        for way, caption in (("forward", "activations"), ("backward", "gradients flowing back")):
            series = [(n, c, ys) for (n, c), ys in zip(SIDES, found[way], strict=True)]
            charts.append(chart(f"{dtype}: {caption}, error against the specification", series, short))
    return (
        "<h2>The error through the layers</h2><p>Running free: what one layer rounds, the next inherits.</p>"
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [abs(p - q) for p, q in zip(a, b, strict=False)]


def _trajectory(found: dict) -> str:
    spec, charts = found["specification"], []
    steps = list(range(1, len(spec) + 1))
    first = next(d for d in ("float32", "float64") if d in found)
    losses = found[first]["losses"]
    series = [(n, c, losses[n]) for n, c in SIDES]
    charts.append(chart(f"loss, nats per token ({first})", series, steps, log=False))
    for dtype in [d for d in ("float64", "float32") if d in found]:
        losses, drift = found[dtype]["losses"], found[dtype]["drift"]
        pairs = [
            ("JAX against torch", "var(--ink)", _difference(losses["JAX"], losses["torch"])),
            ("JAX moved by one ulp", CONTROL, _difference(losses["JAX"], losses["control"])),
        ]
        charts.append(chart(f"{dtype}: difference of the losses", pairs, steps))
        lines = [(n, c, drift[n]) for n, c in SIDES] + [("JAX moved by one ulp", CONTROL, drift["control"])]
        charts.append(chart(f"{dtype}: furthest weight from the specification's", lines, found["drift steps"]))
    return (
        f"<h2>{len(spec)} steps of training</h2><p>From the same start on the same batches. Optimizer drift is the "
        "largest difference of any "
        "weight; grey is what rounding alone does: JAX against JAX with every tenth weight moved by one ulp.</p>"
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _training(report: dict) -> str:
    losses = report["losses"]
    steps = list(range(1, len(losses["jax"]) + 1))
    curves = chart(
        "loss, nats per token",
        [("JAX", SIDES[0][1], losses["jax"]), ("torch", SIDES[1][1], losses["torch"])],
        steps,
        log=False,
    )
    pairs = [
        ("JAX against torch", "var(--ink)", _difference(losses["jax"], losses["torch"])),
        ("JAX moved by one ulp", CONTROL, _difference(losses["jax"], losses["control"])),
    ]
    texts = "".join(f"<p><code>{escaped(line)}</code></p>" for line in report.get("texts", []))
    return (
        f"<h2>One model, trained twice</h2><p>{len(steps)} steps on real text. Unigram entropy "
        f"{report.get('unigram_entropy', math.nan):.3f} nats: "
        "what a model has that learned nothing but how frequent tokens are.</p>"
        f'<div class="charts">{curves}{chart("difference of the losses", pairs, steps)}</div>{texts}'
    )


def _tokens(found: dict) -> str:
    boxes = []
    for i, (a, margin) in enumerate(zip(found["JAX"], found["margins"], strict=False)):
        b = found["torch"][i] if i < len(found["torch"]) else None
        label = str(a) if a == b else f"{a} | {b}"
        boxes.append(f'<span class="{"" if a == b else "bad"}">{label}<small>{margin:.1e}</small></span>')
    n, equal = len(found["JAX"]), found["equal"]
    flip = (
        f"All {n} tokens are the same."
        if equal == n == len(found["torch"])
        else f"The first flip is at token {equal + 1}; the margin there was {found['margins'][min(equal, n - 1)]:.1e}."
    )
    smallest = min(found["margins"], default=math.nan)
    return (
        f"<h2>Sampled tokens</h2><p>The same seed in float32 on both sides. {flip} Below each token its margin: by "
        "how much the logits would have "
        f"to move to change the draw (smallest {smallest:.1e}).</p><div class='tokens'>{''.join(boxes)}</div>"
    )


# --- trace and mutants


def _trace(trace: dict) -> str:
    tone = "good" if trace["ok"] else "bad"
    rows = []
    for p in trace["points"]:
        cells = ""
        for side in ("JAX", "torch"):
            e = p[side]
            numbers = [float(e[k]) for k in ("received", "output", "arriving", "leaving")]
            worst = max((x for x in numbers if not math.isnan(x)), default=0.0)
            bad = ' class="num bad"' if worst > trace["allowed"] else ' class="num"'
            cells += f'<td class="num">{number(e["free"])}</td><td{bad}>{number(worst)}</td>'
        rows.append(f"<tr><td><code>{escaped(p['name'])}</code></td>{cells}</tr>")
    head = "<tr><th>point</th>" + "".join(
        f'<th class="num">{s}, free</th><th class="num">{s}, alone</th>' for s in ("JAX", "torch")
    )
    return (
        f'<h2>Module by module</h2><p class="{tone}">{escaped(trace["verdict"])}</p><details><summary '
        f"class=more>{len(trace['points'])} points in {trace['dtype']}: "
        "the error running free, and alone, with the specification's values and gradients at its inputs</summary>"
        f'<div class="scroll"><table>{head}</tr>{"".join(rows)}</table></div></details>'
    )


def _mutants(mutants: dict) -> str:
    s, areas = mutants["score"], {}
    for o in mutants["outcomes"]:
        if not o["equivalent"]:
            areas.setdefault(o["area"], []).append(o)
    rows = "".join(
        f"<tr><td>{escaped(area)}</td><td class='num'>{sum(bool(o['ok']) for o in found)} of {len(found)}</td></tr>"
        for area, found in areas.items()
    )
    levels = "".join(
        f"<tr><td>{escaped(level)}</td><td "
        f"class='num'>{effect if effect == 'exact' else number(effect)}</td><td>{escaped(name)}</td></tr>"
        for level, (effect, name) in mutants["smallest effects"].items()
    )
    wrong = "".join(
        f"<li>{escaped(o['area'])}: {escaped(o['name'])}: found {escaped(' / '.join(o['found']) or 'nothing')}</li>"
        for o in mutants["outcomes"]
        if not o["ok"]
    )
    return (
        f"<h2>Does the suite see bugs?</h2><p>{s['caught']} of {s['bugs']} planted bugs are caught, "
        f"{s['shared or in both sides']} of them in shared code or in "
        f"both sides at once; {s['right side']} with the right side, {s['localised']} of {s['with a place']} at the "
        f"right place. {s['false alarms']} false alarms in "
        f"{s['without a bug']} runs without a bug.</p>{'<ul class=bad>' + wrong + '</ul>' if wrong else ''}<div "
        "class='charts'>"
        f"<div><table><tr><th>area</th><th class='num'>as expected</th></tr>{rows}</table></div>"
        "<div><table><tr><th>level</th><th class='num'>smallest effect / "
        f"allowed</th><th>bug</th></tr>{levels}</table></div></div>"
    )


def _environment(report: dict) -> str:
    flat: list[tuple[str, Any]] = []

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        elif value is not None:
            flat.append((prefix, value))

    add("", report.get("environment", {}))
    add("", {k: report[k] for k in ("settings", "seconds") if k in report})
    rows = "".join(f"<tr><td>{escaped(k)}</td><td><code>{escaped(v)}</code></td></tr>" for k, v in flat)
    return (
        f"<h2>Environment, versions, flags</h2><details><summary class=more>{len(flat)} "
        f"entries</summary><table>{rows}</table></details>"
    )

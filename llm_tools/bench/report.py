"""What one-model benchmark measures, checked beforehand, and what it writes."""

import argparse
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

from llm_common.config import ModelConfig, SamplingConfig, TrainConfig, check_length
from llm_common.errors import UserError
from llm_common.run.estimates import GIB
from llm_tools.bench.cases import model_config, recipe_of
from llm_tools.bench.peers import find_peer
from llm_tools.flags import at_least_one, from_flags
from llm_tools.frameworks import FRAMEWORKS, open_backend

PEERS_RECIPE = "A peer trains by its own recipe: of the flags it takes the batch, the length and the dtype."


HEADERS = {
    "train": "| | ms a step | tokens/s | TFLOP/s | of the ceiling | GiB | s from start to first step | loss |",
    "decode": "| | texts | ms a token | tokens/s | of the memory bound | ms to the first token | GiB | s to compile |",
    "startup": "| | cache of programs | s from start to first step |",
    "attention": "| | backend | ms forward and backward | TFLOP/s | of the ceiling |",
    "input": "| | ms a batch | tokens/s |",
}


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything is, and fill in what no flag says: what pays on the device."""
    first = next(iter(frameworks(args)), "torch")
    if open_backend(first).device_kind(args.device).lower() == "cpu":
        args.compute_dtype = args.compute_dtype or "float32"
    else:
        args.compute_dtype = args.compute_dtype or "bfloat16"
        args.compile = "on" if args.what == "decode" and args.compile == "auto" else args.compile
    cfg, train = model_config(args), from_flags(TrainConfig, args)
    for name in ("peer", "profile"):
        if getattr(args, name) and args.what not in ("train", "decode"):
            raise UserError(f"{args.what} takes no --{name}")
    check_peers(args, cfg)
    if isinstance(train.document_separator, tuple):
        raise UserError("--document-separator: one id is enough to measure with")
    if (train.document_separator or 0) >= cfg.vocab_size:
        raise UserError(f"--document-separator {train.document_separator}: the vocabulary has {cfg.vocab_size} ids")
    at_least_one(args, "groups", "steps", "warm_up", "prompt_length", "new_tokens")
    if args.profile is not None and args.profile.exists() and not args.profile.is_dir():
        raise UserError(f"--profile {args.profile}: is a file; name a folder")
    if not list_cases(args):
        raise UserError("nothing to measure: --framework none needs a --peer")
    if args.what in ("train", "attention", "startup", "input"):
        recipe = recipe_of(args)  # do its settings fit together?
        for side in frameworks(args):
            open_backend(side).plan_run(recipe, args.device)
    if args.what == "decode":
        check_length(cfg, args.prompt_length + args.new_tokens, "--prompt-length + --new-tokens")
        SamplingConfig(args.temperature)
        if args.new_tokens < 2 or min(args.batch or [1]) < 1:
            raise UserError(
                "decode needs --new-tokens of at least 2, as the first is timed apart, and --batch of at least 1"
            )
    # is the device there?
    kinds = {side: open_backend(side).device_kind(args.device) for side in {*frameworks(args), "torch"}}
    if len({kind.lower() == "cpu" for kind in kinds.values()}) > 1:
        raise UserError(f"{kinds}: install torch for this device too, as the ceilings are measured with it")


def check_peers(args: argparse.Namespace, cfg: ModelConfig) -> None:
    """Refuse a peer that cannot be measured in this way."""
    names = [Path(name).stem for name in [*frameworks(args), *args.peer]]
    for name in args.peer:
        peer = find_peer(name)
        if not hasattr(peer, args.what):
            raise UserError(f"--peer {name} has no function {args.what!r}")
        if cfg.model_type not in getattr(peer, "model_types", (cfg.model_type,)):
            raise UserError(f"--peer {name} takes models of type {', '.join(peer.model_types)}, not {cfg.model_type}")
        if names.count(Path(name).stem) > 1:
            raise UserError(f"--peer {name}: two rows would be called {Path(name).stem!r}; give the file another name")
    if args.peer and args.compute_dtype == "float64":
        raise UserError("--peer: peers compute in float32 or bfloat16, not in float64")
    if args.peer and args.what == "decode" and args.temperature:
        raise UserError("--peer: peers decode greedily; leave --temperature at 0")


def check_prefix(prefix: Path) -> None:
    """Make the folder that --out writes into, and refuse one that cannot be written to."""
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {prefix}: {error.strerror}: {error.filename}") from None
    if prefix.is_dir() or not prefix.name:
        raise UserError(f"--out {prefix}: is a folder; name the start of the files' names in it")
    if not os.access(prefix.parent, os.W_OK):
        raise UserError(f"--out {prefix}: {prefix.parent} cannot be written to")


def frameworks(args: argparse.Namespace) -> list[str]:
    return {"both": list(FRAMEWORKS), "none": []}.get(args.framework, [args.framework])


def list_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    sides = frameworks(args)
    if args.what == "decode":
        return [{"what": "decode", "side": x, "batch": b} for x in sides + args.peer for b in args.batch or [1, 32]]
    if args.what == "startup":
        return [{"what": "startup", "side": side, "cache": cache} for side in sides for cache in ("empty", "warm")]
    if args.what == "attention":
        cudnn = ["cudnn"] if args.compute_dtype == "bfloat16" else []  # it takes nothing wider
        fused = {"jax": ["xla", *cudnn], "torch": ["sdpa"]}
        return [
            {"what": "attention", "side": side, "backend": x} for side in sides for x in ["reference", *fused[side]]
        ]
    return [{"what": args.what, "side": side} for side in (["both"] if args.what == "input" else sides + args.peer)]


def describe(r: dict[str, Any], ceiling: dict[str, float]) -> str:
    """A row of the table."""
    if "error" in r:
        return f"| {r.get('side')} | failed: {r['error']} |"
    low, median, high = (1e3 * x for x in r["seconds"])
    spread = f"{median:.2f} ({low:.2f} to {high:.2f})" if median < 20 else f"{median:.1f} ({low:.1f} to {high:.1f})"
    share = lambda name: f"{1e3 * r[name] / median / ceiling[name]:.3f}"
    cells = {
        "train": lambda: [
            spread,
            f"{1e3 * r['tokens'] / median:,.0f}",
            f"{1e-9 * r['flops'] / median:.3g}",
            share("flops"),
            f"{r['memory'] / GIB:.1f}",
            f"{r['first_step']:.0f}",
            f"{r['losses'][0]:.4f} to {r['losses'][1]:.4f}",
        ],
        "decode": lambda: [
            r["batch"],
            spread,
            f"{1e3 * r['batch'] / median:,.0f}",
            share("bytes"),
            f"{1e3 * r['prefill']:.1f}",
            f"{r['memory'] / GIB:.1f}",
            f"{r['compile']:.0f}",
        ],
        "startup": lambda: [r["cache"], f"{r['first_step']:.1f}"],
        "attention": lambda: [r["backend"], spread, f"{1e-9 * r['flops'] / median:.3g}", share("flops")],
        "input": lambda: [spread, f"{1e3 * r['tokens'] / median:,.0f}"],
    }
    return "| " + " | ".join(str(x) for x in [Path(r["side"]).stem, *cells[r["what"]]()]) + " |"


def rates(ceilings: dict[str, Any]) -> str:
    if "error" in ceilings:
        return f"not measured ({ceilings['error']})"
    return f"{ceilings['flops'] / 1e12:.3g} TFLOP/s, {ceilings['bytes'] / 1e12:.3g} TB/s"


def summary(args: argparse.Namespace, before: dict, after: dict, results: list[dict[str, Any]]) -> str:
    header = HEADERS[args.what]
    good = [r for r in results if "error" not in r]
    installed = {name: x for r in good for name, x in r["versions"].items()}
    lines = [
        f"{args.model_config or args.preset}, {args.compute_dtype}, {before.get('device')}, {date.today()}; "
        + ", ".join(f"{name} {x}" for name, x in sorted(installed.items())),
        "",
        "Ceilings before and after: " + "; ".join(map(rates, (before, after))) + ". Shares are of the first.",
        "",
        *([PEERS_RECIPE, ""] if args.peer and args.what == "train" else []),
        header,
        "|" + "---|" * (header.count("|") - 1),
        *[describe(r, before) for r in results],
    ]
    for r in good:
        if r.get("kernels"):
            lines += ["", f"Kernels of {r['side']}, milliseconds and calls a step:", ""]
            lines += [
                f"{k['ms']:9.3f} {k['calls']:7.1f} {100 * k['share']:5.1f} %  {k['name'][:110]}" for k in r["kernels"]
            ]
    return "\n".join(lines)


def write(prefix: Path, report: str, content: dict[str, Any]) -> None:
    file = lambda ending: prefix.with_name(prefix.name + ending)  # a dot in the prefix is no ending
    file(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    file(".md").write_text(report + "\n", encoding="utf-8")
    draw(file(".png"), content)


def draw(path: Path, content: dict[str, Any]) -> None:
    """Bars: each case's share of what the device reached itself. Nothing without matplotlib, or if no case has
    a share.
    """
    name = {"train": "flops", "attention": "flops", "decode": "bytes"}.get(content["cases"][0]["what"])
    good = [r for r in content["cases"] if "error" not in r]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if name is None or not good:
        return
    shares = [r[name] / r["seconds"][1] / content["ceilings"][0][name] for r in good]
    parts = lambda r: [Path(r["side"]).stem, *(str(r[key]) for key in ("backend", "batch") if key in r)]
    labels = [" ".join(parts(r)) for r in good]
    figure = Figure(figsize=(7, 0.8 + 0.45 * len(good)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(
        range(len(good)), shares, color=["#4477aa" if r["side"] in FRAMEWORKS else "#bbbbbb" for r in good]
    )
    axes.bar_label(bars, [f"{x:.2f}" for x in shares], padding=3)
    axes.set(yticks=range(len(good)), yticklabels=labels, xlim=(0, max(1.0, 1.1 * max(shares))))
    axes.set_xlabel("of the matrix product's rate" if name == "flops" else "of the copy's rate")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)

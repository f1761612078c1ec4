"""What a person reads of a campaign: of N mutants, how many each kind of check kills, by room, file and operator."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from llm_common.run.log import environment
from parity.mutants.generated.campaign import Outcome, sources_hash

EQUIVALENT = Path(__file__).with_name("equivalent.jsonl")


@functools.cache
def reasons(gpu: bool = False) -> dict[str, str]:
    """Name of a mutant -> why it changes nothing, written by who read it; gpu: or what it changes, on a GPU alone."""
    lines = EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.is_file() else []
    return {row["name"]: row["reason"] for row in map(json.loads, lines) if row.get("gpu", False) is gpu}


def room(file: str) -> str:
    parts = file.split("/")
    return (
        "/".join(parts[:2]) if len(parts) > 2 else f"{parts[0]} (files of the lesson)" if "_llm" in file else parts[0]
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    known, elsewhere = reasons(), reasons(gpu=True)
    real = [o for o in outcomes if o.how != "survived" or o.name not in known | elsewhere]
    named = [o for o in real if o.how in ("row", "error")]
    return {
        "drawn": len(outcomes),
        "equivalent": sum(o.how == "survived" and o.name in known for o in outcomes),
        "gpu": sum(o.how == "survived" and o.name in elsewhere for o in outcomes),
        "judged": len(real),
        "parity": sum(o.by_parity for o in real),
        "named": len(named),  # those of which a row of the ladder says who and where
        "right side": sum(o.right_side for o in named),
        "right place": sum(o.right_place for o in named),
        "tests alone": sum(o.how == "tests" for o in real),
        "survived": sum(o.how == "survived" for o in real),
    }


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def sentence(outcomes: Sequence[Outcome]) -> str:
    s = summary(outcomes)
    of = lambda key, whole: share(s[key], s[whole])
    return (
        f"Of {s['judged']} generated mutants parity kills {of('parity', 'judged')}, unit tests alone "
        f"{of('tests alone', 'judged')}, {of('survived', 'judged')} survive; {s['equivalent']} more change nothing, "
        f"and {s['gpu']} nothing but on a GPU. Of the {s['named']} that the ladder names, the side is right in "
        f"{of('right side', 'named')} and the place in {of('right place', 'named')}."
    )


def markdown(outcomes: Sequence[Outcome], seed: int, seconds: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items() if version)
    lines = [
        "# Generated mutants",
        "",
        f"**{sentence(outcomes)}**",
        "",
        f"{date.today().isoformat()}, seed {seed}, sources {sources_hash()}, {seconds / 3600:.1f} hours; "
        f"Python {environment()['python']}, {versions}. Made by `parity mutants --generated {len(outcomes)} "
        f"--seed {seed}`; one of them again: `parity mutants --generated --name NAME`.",
        "",
        "A mutant is one small edit at a place that nobody chose, drawn from all that the operators of "
        "`parity/mutants/generated/operators.py` make of the files in `scope.py`, each as likely as any other. "
        "*Row*: a figure of the ladder is red. *Error*: a check, or the import of our code, raises. *Late*: a check "
        "takes more than four times as long as it does without a mutant. *Tests*: `parity run` is green, a unit test "
        "fails.",
    ]
    for title, key in (
        ("Room", lambda o: room(o.file)),
        ("Operator", lambda o: o.operator),
        ("File", lambda o: o.file),
    ):
        lines += ["", *_table(title, outcomes, key)]
    survivors = [o for o in outcomes if o.how == "survived"]
    known = reasons() | {name: f"on a GPU alone: {what}" for name, what in reasons(gpu=True).items()}
    if survivors:
        lines += ["", "## What survived", "", "| mutant | place | edit | why |", "|---|---|---|---|"]
        for o in survivors:
            cell = lambda text: (
                "`" + " ".join(text.split()).replace("|", "\\|")[:70] + "`" if text.strip() else "nothing"
            )
            why = known.get(o.name, "not read yet")
            lines.append(f"| {o.name} | {o.file}:{o.line} {o.function} | {cell(o.old)} -> {cell(o.new)} | {why} |")
    return "\n".join(lines) + "\n"


def _table(title: str, outcomes: Sequence[Outcome], key: Callable[[Outcome], str]) -> list[str]:
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(key(o), []).append(o)
    lines = [
        f"| {title} | judged | row | error | late | tests | survived | killed by parity | side | place | equivalent |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in sorted(groups.items()):
        s, how = summary(group), Counter("error" if o.how == "import" else o.how for o in group)
        lines.append(
            f"| {name} | {s['judged']} | {how['row']} | {how['error']} | {how['late']} | {s['tests alone']} | "
            f"{s['survived']} | {share(s['parity'], s['judged'])} | {share(s['right side'], s['named'])} | "
            f"{share(s['right place'], s['named'])} | {s['equivalent']} |"
        )
    return lines

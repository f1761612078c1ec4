"""What the judge found: figures, what was not covered, how tensors were matched, and one word for all of it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from llm_common.errors import counted, json_bytes, write_whole
from parity.judge.matching import Matching

SCHEMA = 1
SAME, DIFFERENT, NOT_JUDGED = "same", "different", "not_judged"
EXIT = {SAME: 0, DIFFERENT: 1, NOT_JUDGED: 3}  # 2 is wrong usage


@dataclasses.dataclass(frozen=True)
class Figure:
    """One comparison: what was measured, what is allowed, and of what that is a multiple."""

    check: str  # "run", "parameters", "outputs", "gradients", "state", "optimizer"
    tensor: str  # of the candidate: an output's path, a parameter's or a buffer's name
    measured: float
    allowed: float
    dtype: str = ""
    draw: str = ""  # which weights and inputs: as given, or drawn anew
    mode: str = ""
    noise: float = 0.0  # what rounding does to the reference
    side: str = "either"  # "candidate" and "reference" where something tells
    hint: str = ""

    @property
    def ok(self) -> bool:
        return self.measured <= self.allowed

    def __str__(self) -> str:
        where = ", ".join(x for x in (self.dtype, self.mode, self.draw) if x)
        figures = "" if math.isinf(self.measured) else f": {self.measured:.1e}, allowed {self.allowed:.1e}"
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.check}: {self.tensor}{f' ({where})' if where else ''}{figures}{hint}"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where two sides part. kind: "module", "tensor", "output", or "" where nothing tells."""

    name: str = ""
    kind: str = ""
    what: str = ""

    def __str__(self) -> str:
        return f"{self.name}{f': {self.what}' if self.what else ''}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judge's answer. `bool(verdict)` is whether the two are the same."""

    name: str
    figures: list[Figure]
    not_covered: list[str]
    matching: Matching
    state_matching: Matching
    place: Place = dataclasses.field(default_factory=Place)
    notes: list[str] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0
    seconds: float = 0.0

    @property
    def findings(self) -> list[Figure]:
        return [figure for figure in self.figures if not figure.ok]

    @property
    def word(self) -> str:
        """`same`, `different` or `not_judged`: nothing that counts could be compared."""
        if self.findings:
            return DIFFERENT
        return SAME if any(figure.check == "outputs" for figure in self.figures) else NOT_JUDGED

    @property
    def exit_code(self) -> int:
        return EXIT[self.word]

    def __bool__(self) -> bool:
        return self.word == SAME

    def text(self) -> str:
        """The verdict in a few lines: the word, what it covers and what not, the place, the first findings."""
        lines = [f"{self.name}: {self._headline()}"]
        lines += [f"  not covered: {x}" for x in self.not_covered]
        if self.findings and self.place.kind:
            lines.append(f"  they part at {self.place.kind} {self.place}")
        lines += [f"  {figure}" for figure in self.findings[:12]]
        if len(self.findings) > 12:
            lines.append(f"  and {counted(len(self.findings) - 12, 'more figure')}")
        if self.findings and self.matching.guesses:
            guesses = {name: str(self.matching.maps[name]) for name in self.matching.guesses[:8]}
            lines.append(f"  guessed, say otherwise with names=: {guesses}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _headline(self) -> str:
        if self.word == SAME:
            kinds: dict[str, set[str]] = {}
            for figure in self.figures:
                kinds.setdefault(figure.check, set()).add(figure.tensor)
            kinds.pop("parameters", None)
            matched = counted(len(self.matching.maps), "parameter")
            what = ", ".join([matched, *(counted(len(x), check.rstrip("s")) for check, x in kinds.items())])
            dtypes, modes = (
                {getattr(x, key): None for x in self.figures if getattr(x, key)} for key in ("dtype", "mode")
            )
            return f"same in {' and '.join(dtypes)}, {' and '.join(modes)} mode ({what})"
        if self.word == DIFFERENT:
            return f"different, {counted(len(self.findings), 'figure')} of {len(self.figures)}"
        return "not judged"

    def to_json(self) -> dict[str, Any]:
        """The verdict for programs; the schema's version is in it."""
        finite = lambda x: x if math.isfinite(x) else None
        figure = lambda x: {
            **dataclasses.asdict(x),
            "measured": finite(x.measured),
            "allowed": finite(x.allowed),
            "noise": finite(x.noise),
            "noise_of": "reference",
            "place": self.place.name,
            "place_kind": self.place.kind,
        }
        pairs = [
            {
                "candidate": name,
                "map": str(made),
                "how": m.how[name],
                "guess": name in m.guesses,
                "state": m is self.state_matching,
            }
            for m in (self.matching, self.state_matching)
            for name, made in m.maps.items()
        ]
        return {
            "schema": SCHEMA,
            "verdict": self.word,
            "name": self.name,
            "findings": [figure(x) for x in self.findings],
            "figures": len(self.figures),
            "accepted": [],
            "not_covered": self.not_covered,
            "place": dataclasses.asdict(self.place),
            "matching": pairs,
            "notes": self.notes,
            "versions": self.versions,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
        }

    def write(self, path: Path | str) -> None:
        """Write the verdict as JSON, whole or not at all."""
        write_whole(Path(path), json_bytes(self.to_json()))

    def json(self) -> str:
        return json.dumps(self.to_json(), indent=1)

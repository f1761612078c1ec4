"""What a compiled XLA program does besides arithmetic, read from its text: collectives, loops and custom calls.

The text is that of `compiled.as_text()`: computations, each with instructions; a `while` names its body, and says in
its backend_config how often it runs, where the compiler knows.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "f64": 8,
}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
CALLED = re.compile(
    r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclass(frozen=True)
class Collective:
    """A collective of a program: what it gives, in bytes on each device, within how many loops, and how often
    in all.
    """

    kind: str
    size: int
    depth: int
    times: int
    shape: str
    source: str  # the operation of the model that it belongs to


def sizes_of(shape: str) -> list[int]:
    """Bytes of every array in the text of a shape."""
    return [
        BYTES[kind] * math.prod(int(x) for x in axes.split(",") if x)
        for kind, axes in SHAPE.findall(shape)
        if kind in BYTES
    ]


class Program:
    """The computations of a compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[str]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if (match := COMPUTATION.match(line)) and not line.startswith((" ", "HloModule")):
                current = match[2]
                self.computations[current] = []
                if match[1]:
                    self.entry = current
            elif current is not None and line.startswith("  "):
                self.computations[current].append(line)

    def walk(self, name: str | None = None, depth: int = 0, times: int = 1) -> Iterator[tuple[str, str, str, int, int]]:
        """(opcode, shape, line, depth, times) of every instruction that runs, `depth` loops deep."""
        for line in self.computations.get(self.entry if name is None else name, []):
            match = INSTRUCTION.match(line)
            if not match:
                continue
            _, shape, opcode = match.groups()
            yield opcode, shape, line, depth, times
            deeper = opcode == "while"
            trips = self.trips(line) if deeper else 1
            for single, several in CALLED.findall(line):
                for called in [single] if single else re.findall(r"%?([\w.\-]+)", several):
                    if opcode in ("while", "call", "conditional", "fusion", "async-start", "custom-call"):
                        yield from self.walk(called, depth + deeper, times * trips)

    def trips(self, loop: str) -> int:
        """How often a while runs: as its backend_config says, or what its condition compares a counter with; else 1."""
        if found := TRIPS.search(loop):
            return int(found[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop)
        lines = self.computations.get(condition[1], []) if condition else []
        limits = [int(found[1]) for line in lines if (found := re.search(r" = s32\[\]\S* constant\((\d+)\)", line))]
        return limits[0] if len(limits) == 1 and any("direction=LT" in line for line in lines) else 1

    def collectives(self) -> list[Collective]:
        """The largest first. One that the compiler spreads over several fusions has one channel, and counts once."""
        found: dict[tuple, int] = {}
        channels: set[str] = set()
        for opcode, shape, line, depth, times in self.walk():
            kind = opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if channel := re.search(r"channel_id=(\d+)", line):
                if channel[1] in channels:
                    continue
                channels.add(channel[1])
            sizes = sizes_of(shape)
            size = max(sizes, default=0) if opcode.endswith("-start") else sum(sizes)
            name = re.search(r'op_name="([^"]*)"', line)
            source = re.sub(r"\bjit\(\w+\)/", "", name[1])[-70:] if name else ""
            key = (kind, size, depth, re.sub(r"\{[^}]*\}", "", shape)[:60], source)
            found[key] = found.get(key, 0) + times
        rows = [
            Collective(kind, size, depth, times, shape, source)
            for (kind, size, depth, shape, source), times in found.items()
        ]
        return sorted(rows, key=lambda c: -c.size * c.times)

    def custom_calls(self) -> dict[str, int]:
        """Target -> how many there are in the text."""
        counts: dict[str, int] = {}
        for lines in self.computations.values():
            for line in lines:
                if " custom-call(" in line and (match := TARGET.search(line)):
                    counts[match[1]] = counts.get(match[1], 0) + 1
        return counts

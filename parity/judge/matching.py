"""Which tensor of the candidate is made of which of the reference, found by value, by name and by shape.

By value where both already hold the same weights (constants tell nothing), else by the roles, words and numbers of the
names and the order of tensors of one size, as one assignment over all of them. Stacks of layers, joined projections and
gates are recognised. What is left over is said by name; what was likely but not sure is a guess, and says so.
"""

import difflib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llm_common.errors import UserError
from parity.judge.maps import Arrays, Given, Map, Part

ROLES = {
    "weight": "kernel weight w scale gamma g embedding embeddings",
    "bias": "bias b beta offset",
    "mean": "mean average",
    "var": "var variance",
}
ROLE_OF: dict[str, str] = {word: role for role, found in ROLES.items() for word in found.split()}
SYNONYMS: dict[str, str] = {
    "norm": "norm", "layernorm": "norm", "ln": "norm", "rmsnorm": "norm", "batchnorm": "norm", "bn": "norm",
    "groupnorm": "norm", "linear": "linear", "dense": "linear", "fc": "linear", "lin": "linear", "proj": "proj",
    "projection": "proj", "attention": "attn", "attn": "attn", "query": "q", "key": "k", "value": "v", "wq": "q",
    "wk": "k", "wv": "v", "wo": "out", "output": "out", "o": "out", "embedding": "embed", "embeddings": "embed",
    "emb": "embed", "wte": "token", "tok": "token", "wpe": "position", "pos": "position", "positional": "position",
    "encoder": "encoder", "enc": "encoder", "decoder": "decoder", "dec": "decoder", "blocks": "layer", "block": "layer",
    "layers": "layer", "h": "layer", "conv": "conv", "hidden": "hidden", "mlp": "mlp", "ffn": "mlp", "ff": "mlp",
    "head": "head", "self": "", "params": "", "model": "", "module": "", "batch": "", "stats": "", "running": "",
    "moving": "", "up": "up", "gate": "gate", "down": "down", "norm1": "norm", "norm2": "norm",
}  # fmt: skip
# Groups of tensors that another framework keeps in one, in its order.
GROUPS = (
    ("q", "k", "v"), ("k", "v"), ("gate", "up"), ("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho"),
    ("ir", "iz", "in"), ("hr", "hz", "hn"), ("i", "f", "g", "o"), ("r", "z", "n"),
)  # fmt: skip
STACKED = {"layer", "stack", "scan", "vmap", "stage"}
SURE = 0.15  # by how much a partner must be likelier than the next


@dataclass
class Matching:
    """candidate's name -> its map; how it was found; which of them are guesses; and what has no partner."""

    maps: dict[str, Map | Given] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    guesses: list[str] = field(default_factory=list)  # which tensor it is
    unoriented: list[str] = field(default_factory=list)  # square matrices that may be turned
    missing: dict[str, str] = field(default_factory=dict)  # candidate's name -> why
    unused: list[str] = field(default_factory=list)  # the reference's leaves that no tensor is made of

    @property
    def complete(self) -> bool:
        return not self.missing and not self.unused

    def take(self, name: str, made: Map | Given, how: str, guess: bool = False) -> None:
        self.maps[name], self.how[name] = made, how
        self.guesses += [name] if guess else []


@dataclass(frozen=True)
class Name:
    """What a name says."""

    role: str
    words: tuple[str, ...]
    numbers: tuple[int, ...]
    raw: tuple[str, ...]  # every word as it stands, in lower case
    ranks: tuple[int, ...] = ()  # of the numbers, among the tensors of the side that differ in them alone


def match(candidate: Arrays, reference: Arrays, names: Mapping[str, Any] | None = None) -> Matching:
    """The map of every tensor of the candidate. names: those already known: candidate's name -> path of a leaf, a
    `Map`, or a function of the leaves by path. Raises UserError for a name that does not exist or does not fit.
    """
    result, used = Matching(), set()
    for name, given in (names or {}).items():
        used |= _take_given(result, name, given, candidate, reference)
    todo = {name: x for name, x in candidate.items() if name not in result.maps}
    if _by_value(result, todo, reference, used):
        todo = {name: x for name, x in todo.items() if name not in result.maps}
    free = {name: x for name, x in reference.items() if name not in used}
    parts, read = _layers(todo, free)
    arrays = {key: part(reference) for key, part in parts.items()}
    read = _ranked(read, arrays) | _ranked({name: read_name(name, x.ndim) for name, x in todo.items()}, todo)
    turned = _usually_turned(todo, arrays, read)
    work = _Work(result, todo, parts, arrays, read, turned, reference)
    _exact(work)
    _groups(work)
    _stacks(work)
    _assign(work)
    _second_bias(work)
    _explain(work, used)
    return result


@dataclass
class _Work:
    """What is left to match: tensors of the candidate, and parts of the reference by their name (of a layer, with its
    number).
    """

    result: Matching
    todo: Arrays
    parts: dict[str, Part]
    arrays: Arrays
    read: dict[str, Name]
    turned: Callable[[Name | None], bool | None]
    reference: Arrays

    def ways(self, key: str, shape: tuple[int, ...], part: Part | None = None) -> list[Part]:
        return _ways(part or self.parts[key], self.reference, shape, self.read[key], self.turned)

    def take(self, name: str, made: Map, how: str, keys: Sequence[str], guess: bool = False) -> None:
        self.result.take(name, made, how, guess)
        del self.todo[name]
        for key in keys:
            self.parts.pop(key, None)
            self.arrays.pop(key, None)


def read_name(name: str, ndim: int = 1) -> Name:
    """ndim: of the tensor; a matrix that is called b is no bias."""
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    tokens = re.findall(r"[a-zA-Z]+|\d+", split)
    raw = tuple(token.lower() for token in tokens)
    # the last words may be the place of a gate, as in bias_ih_l0
    role = next((ROLE_OF[word] for word in reversed(raw) if word in ROLE_OF), "")
    words = [SYNONYMS.get(str(word), str(word)) for word in raw if not word.isdigit()]
    if raw[-1:] == ("b",) and ndim > 1:
        return Name("weight", tuple(words), _numbers(raw), raw)
    kept = [word for i, word in enumerate(words) if word and not (word in ROLE_OF and i == len(words) - 1)]
    return Name(role, tuple(kept), _numbers(raw), raw)


def _numbers(raw: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(word) for word in raw if word.isdigit())


def likeness(a: Name, b: Name) -> float:
    """How alike two names are, about -2 to 3."""
    score = 0.0
    if a.role and b.role:
        score += 1.0 if a.role == b.role else -2.0
    score += difflib.SequenceMatcher(None, a.words, b.words, autojunk=False).ratio()
    mine, theirs = a.numbers, b.numbers
    if mine and theirs:
        n = min(len(mine), len(theirs))
        if a.ranks and a.ranks == b.ranks:
            score += 0.5
        elif mine == theirs:
            score += 0.3
        else:
            score += 0.2 if mine[-n:] == theirs[-n:] or mine[:n] == theirs[:n] else -0.3
    return score


def _ranked(read: dict[str, Name], tensors: Mapping[str, np.ndarray]) -> dict[str, Name]:
    """Names with the ranks of their numbers: Dense_0, Dense_1 and fc1, fc2 and 0, 2 of a Sequential all count 0, 1."""
    kinds: dict[Any, set[tuple[int, ...]]] = defaultdict(set)
    kind = lambda name: (tuple(w for w in read[name].raw if not w.isdigit()), tensors[name].size, read[name].role)
    for name, found in read.items():
        kinds[kind(name)].add(found.numbers)
    ranked = {}
    for name, found in read.items():
        of_kind = kinds[kind(name)]
        places = [sorted({x[i] for x in of_kind if len(x) > i}) for i in range(len(found.numbers))]
        varying = [(i, n) for i, n in enumerate(found.numbers) if len(places[i]) > 1]
        ranked[name] = replace(found, ranks=tuple(places[i].index(n) for i, n in varying) or (0,))
    return ranked


# --- what is given


def _take_given(result: Matching, name: str, given: Any, candidate: Arrays, reference: Arrays) -> set[str]:
    if name not in candidate:
        raise UserError(f"names: the candidate has no tensor {name!r}; it has {', '.join(candidate)}")
    shape = candidate[name].shape
    if isinstance(given, str):
        found = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", given.replace("/", "."))
        assert found is not None
        path = next((x for x in (found[1], f"params.{found[1]}") if x in reference), None)
        if path is None:
            raise UserError(f"names: {name!r}: the reference has no leaf {given!r}; it has {', '.join(reference)}")
        part = Part(path)
        if found[2] is not None:
            part = _layer(part, reference[path], int(found[2]))
        turned = _usually_turned({name: candidate[name]}, {path: reference[path]}, {})
        ways = _ways(part, reference, shape, read_name(path), turned)
        ways.sort(key=lambda way: not _equal(way(reference), candidate[name]))
        if not ways:
            raise UserError(f"names: {name!r} {shape} cannot be made of {given!r} {reference[path].shape}")
        given = Map((ways[0],))
    elif not isinstance(given, Map):
        given = Given(given)
    try:
        made = given(reference)
    except KeyError as error:
        raise UserError(f"names: {name!r} asks for the leaf {error}; there are {', '.join(reference)}") from None
    if made.shape != shape:
        raise UserError(f"names: {name!r} has shape {shape}, what is given for it makes {made.shape}")
    result.take(name, given, f"{given} (given)")
    return given.leaves()


# --- by value


def _by_value(result: Matching, todo: Arrays, reference: Arrays, used: set[str]) -> bool:
    """Match what holds the same numbers, if most tensors that are no constants do."""
    telling = {name: x for name, x in todo.items() if _tells(x)}
    by_size = defaultdict(list)
    for leaf, x in reference.items():
        if leaf not in used and _tells(x):
            by_size[x.size].append((leaf, _signature(x)))
    found: dict[str, tuple[str, Part]] = {}
    for name, x in telling.items():
        mine = _signature(x)
        for leaf, theirs in by_size[x.size]:
            if leaf not in {other for other, _ in found.values()} and np.allclose(mine, theirs, rtol=1e-4, atol=1e-6):
                ways = [way for way in _ways(Part(leaf), reference, x.shape, None, None) if _equal(way(reference), x)]
                if ways:
                    found[name] = leaf, ways[0]
                    break
    if len(found) * 2 <= len(telling) or not found:
        return False
    for name, (leaf, part) in found.items():
        result.take(name, Map((part,)), f"{part} (by value)")
        used.add(leaf)
    return True


def _tells(x: np.ndarray) -> bool:
    """Whether the numbers of a tensor are its own: many zeros and ones are not."""
    return x.size > 1 and bool(np.any(x != x.reshape(-1)[0]))


def _signature(x: np.ndarray) -> np.ndarray:
    """What no rearrangement changes."""
    return np.array([x.sum(), np.abs(x).sum(), (x * x).sum(), x.min(), x.max()]) / max(1.0, math.sqrt(x.size))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-7 * max(1.0, float(np.abs(b).max(initial=0))))


# --- stacks of layers in the reference


def _layers(todo: Arrays, free: Arrays) -> tuple[dict[str, Part], dict[str, Name]]:
    """The parts of the reference: its leaves, and those of leaves that hold several layers, one by one.

    Leaves with a common first part of their path are a stack of n layers if they agree in the length n of an axis, and
    the candidate has n modules with numbers, each as large as one layer.
    """
    parts, read = {}, {}
    left = dict(free)
    sizes = _numbered_sizes(todo)
    for prefix in sorted({leaf.rsplit(".", i)[0] for leaf in free for i in range(1, leaf.count(".") + 1)}, key=len):
        group = [leaf for leaf in left if leaf.startswith(f"{prefix}.")]
        axes = _stack_axes({leaf: free[leaf] for leaf in group}, sizes)
        if not group or not axes:
            continue
        before = len(read_name(prefix).numbers)
        for leaf in group:
            x = left.pop(leaf)
            base, rest = read_name(leaf, x.ndim - len(axes)), tuple(n for a, n in enumerate(x.shape) if a not in axes)
            for at in itertools.product(*(range(x.shape[a]) for a in axes)):
                key, part = f"{leaf}[{', '.join(map(str, at))}]", Part(leaf)
                for a, i in zip(axes, at, strict=True):
                    part = part.sliced(a, i, i + 1)
                parts[key] = part.then(("reshape", rest))
                read[key] = replace(base, numbers=(*base.numbers[:before], *at, *base.numbers[before:]))
    # leaves at the top of a nest that hold layers, beside others that do not
    for count in sorted({x.shape[0] for x in left.values() if x.ndim > 1}):
        group = [leaf for leaf, x in left.items() if x.ndim > 1 and x.shape[0] == count]
        if sum(left[leaf].size for leaf in group) // count in sizes.get((count,), ()):
            for leaf in group:
                x = left.pop(leaf)
                for i in range(count):
                    key, base = f"{leaf}[{i}]", read_name(leaf, x.ndim - 1)
                    parts[key] = _layer(Part(leaf), x, i)
                    read[key] = replace(base, numbers=(i, *base.numbers))
    for leaf, x in left.items():
        parts[leaf], read[leaf] = Part(leaf), read_name(leaf, x.ndim)
    return parts, read


def _numbered_sizes(todo: Arrays) -> dict[tuple[int, ...], set[int]]:
    """How many numbers in all the modules with a number hold, by how many of them there are: those of one number, and
    those of two numbers one in the other.
    """
    modules: dict[tuple[str, ...], dict[tuple[int, ...], int]] = defaultdict(lambda: defaultdict(int))
    for name, x in todo.items():
        tokens = name.split(".")
        places = [i for i, token in enumerate(tokens) if token.isdigit() or re.fullmatch(r".*_\d+", token)]
        for n in (1, 2):
            for chosen in itertools.combinations(places, n):
                at = tuple(int(re.findall(r"\d+", tokens[i])[-1]) for i in chosen)
                pattern = [re.sub(r"\d+", "*", t) if i in chosen else t for i, t in enumerate(tokens[: chosen[-1] + 1])]
                modules[tuple(pattern)][at] += x.size
    found: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for numbered in modules.values():
        depth = len(next(iter(numbered)))
        counts = tuple(max(at[i] for at in numbered) + 1 for i in range(depth))
        if len(numbered) == math.prod(counts) and len(set(numbered.values())) == 1:
            found[counts].add(next(iter(numbered.values())))
    return found


def _stack_axes(group: Arrays, sizes: Mapping[tuple[int, ...], set[int]]) -> tuple[int, ...]:
    """The axes along which the leaves of a group hold layers, if they do."""
    for axes in ((0, 1), (0,), (1,)):
        if any(x.ndim < len(axes) + (axes != (0,)) for x in group.values()) or not group:
            continue
        counts = {tuple(x.shape[a] for a in axes) for x in group.values() if x.ndim > max(axes)}
        if len(counts) != 1 or any(x.ndim <= max(axes) for x in group.values()):
            continue
        (count,) = counts
        if sum(x.size for x in group.values()) // max(1, math.prod(count)) in sizes.get(count, ()):
            return axes
    return ()


# --- groups that one side keeps in one tensor


def _exact(work: _Work) -> None:
    """What has the same name and the same shape on both sides."""
    for name in list(work.todo):
        if name in work.arrays and work.arrays[name].shape == work.todo[name].shape:
            part = work.parts[name]
            work.take(name, Map((part,)), f"{part} (the same name)", [name])


def _groups(work: _Work) -> None:
    """Joined projections and gates, on either side; not where both have them apart."""
    ours, theirs = _families(work.parts, work.read), _families(work.todo, work.read)
    for members, families in ours.items():
        for family in families if members not in theirs else ():
            _join(work, members, family)
    for members, families in theirs.items():
        for family in families if members not in ours else ():
            if None not in family:
                _split(work, members, family)  # type: ignore[arg-type]


def _families(tensors: Mapping[str, Any], read: dict[str, Name]) -> dict[tuple[str, ...], list[list[str | None]]]:
    """Of each group of GROUPS: the lists of tensors that differ in its words alone. Of biases some may be missing."""
    found: dict[tuple[str, ...], list[list[str | None]]] = {}
    for members in GROUPS:
        families: dict[Any, dict[str, str]] = defaultdict(dict)
        for name in tensors:
            words = [SYNONYMS.get(word, word) or word for word in read[name].raw]
            for i, word in enumerate(words):
                if word in members:
                    families[i, (*words[:i], "*", *words[i + 1 :]), read[name].numbers].setdefault(word, name)
        whole = [
            [family.get(member) for member in members]
            for family in families.values()
            if set(family) >= set(members)
            or (len(members[0]) == 2 and read[next(iter(family.values()))].role == "bias")
        ]
        if whole:
            found[members] = whole
    return found


def _join(work: _Work, members: tuple[str, ...], family: list[str | None]) -> None:
    """Tensors of the reference that the candidate keeps in one."""
    keys = [key for key in family if key is not None]
    if not keys or any(key not in work.parts for key in keys):
        return
    one = work.arrays[keys[0]].size
    size = one * len(family) if len(keys) < len(family) else sum(work.arrays[key].size for key in keys)
    sizes = {x.size for x in work.todo.values()}
    if one in sizes and size not in sizes:
        return
    first = work.read[keys[0]]
    options = [name for name, x in work.todo.items() if x.size == size and work.read[name].role in (first.role, "")]
    options = [name for name in options if not _names_one(work.read[name], members)]
    scores = {name: _joined_likeness(work.read[name], first, members) for name in options}
    options.sort(key=lambda name: -scores[name])
    for name in options:
        made = _joined(work, members, family, work.todo[name].shape)
        if made is not None:
            guess = len(options) > 1 and scores[options[0]] - scores[options[1]] < SURE
            work.take(name, made, f"{made} (joined)", keys, guess)
            return


def _names_one(name: Name, members: tuple[str, ...]) -> bool:
    """Whether a name is that of one member, as q_proj is: no joined tensor has such a name."""
    words = [SYNONYMS.get(word, word) for word in name.raw]
    return sum(word in members for word in words) == 1 and len(members[0]) == 1 and members[0] in "qkv"


def _joined_likeness(a: Name, b: Name, members: tuple[str, ...]) -> float:
    kind = {"i": "ih", "h": "hh"}.get(members[0][0]) if len(members[0]) == 2 else None
    bonus = 0.0 if kind is None else 1.0 if kind in a.raw else -1.0
    return likeness(a, replace(b, words=tuple(word for word in b.words if word not in members))) + bonus


def _joined(work: _Work, members: tuple[str, ...], family: list[str | None], shape: tuple[int, ...]) -> Map | None:
    """The members one after the other along the axis where they fit; zeros where one is missing."""
    for axis in range(len(shape)):
        there = [key for key in family if key is not None]
        rows = [_rows(work.arrays[there[0] if key is None else key].size, shape, axis) for key in family]
        if sum(rows) != shape[axis]:
            continue
        parts: list[Part] = []
        for member, key, n in zip(members, family, rows, strict=True):
            wanted = (*shape[:axis], n, *shape[axis + 1 :])
            if key is None:  # its numbers stand in the bias of the inputs, if there is one
                own = members[family.index(there[0])]
                leaf = re.sub(rf"(?<![a-zA-Z]){own}(?![a-zA-Z])", f"i{member[1:]}", work.parts[there[0]].leaf)
                known = leaf in work.reference and member[0] == "h"
                like = _ways(Part(leaf) if known else work.parts[there[0]], work.reference, wanted, None, None)[:1]
                parts += [replace(x, beside=True) if known else x.then(("zeros", ())) for x in like]
            else:
                parts += work.ways(key, wanted)[:1]
        if len(parts) == len(family):
            return Map(tuple(parts), axis)
    return None


def _rows(size: int, shape: tuple[int, ...], axis: int) -> int:
    return size // max(1, math.prod(shape) // shape[axis])


def _split(work: _Work, members: tuple[str, ...], family: list[str]) -> None:
    """Tensors of the candidate that the reference keeps in one."""
    if any(name not in work.todo for name in family):
        return
    size = sum(work.todo[name].size for name in family)
    sizes = {x.size for x in work.arrays.values()}
    if work.todo[family[0]].size in sizes and size not in sizes:
        return
    first = work.read[family[0]]
    options = [key for key, x in work.arrays.items() if x.size == size and work.read[key].role in (first.role, "")]
    options = [key for key in options if not _names_one(work.read[key], members)]
    options.sort(key=lambda key: -_joined_likeness(work.read[key], first, members))
    for key in options:
        parts = _slices(work, family, key)
        if parts is not None:
            for name, part in zip(family, parts, strict=True):
                work.take(name, Map((part,)), f"{part} (split)", [key])
            return


def _slices(work: _Work, family: list[str], key: str) -> list[Part] | None:
    x, whole_part = work.arrays[key], work.parts[key]
    if whole_part.steps and x.shape != Part(whole_part.leaf, whole_part.take)(work.reference).shape[-x.ndim :]:
        return None
    # the axis of the outputs: the last of a kernel, the first of a weight; both are tried where it fits
    order = range(x.ndim) if not work.turned(work.read[key]) else reversed(range(x.ndim))
    for axis in order:
        n = [_rows(work.todo[name].size, x.shape, axis) for name in family]
        if sum(n) != x.shape[axis]:
            continue
        parts, start = [], 0
        for name, rows in zip(family, n, strict=True):
            # of a layer of a stack the axes of the layer come first
            deep = Part(whole_part.leaf, whole_part.take)(work.reference).ndim - x.ndim
            part = Part(whole_part.leaf, whole_part.take).sliced(axis + deep, start, start + rows)
            shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
            parts += work.ways(key, work.todo[name].shape, part.then(("reshape", shape)) if deep else part)[:1]
            start += rows
        if len(parts) == len(family):
            return parts
    return None


# --- stacks of layers in the candidate


def _stacks(work: _Work) -> None:
    for name in list(work.todo):
        x = work.todo[name]
        same = [key for key, y in work.arrays.items() if x.ndim > 1 and y.size * x.shape[0] == x.size]
        if x.ndim < 2 or any(y.size == x.size for y in work.arrays.values()) or len(same) < x.shape[0]:
            continue
        groups = defaultdict(list)
        for key in same:
            groups[work.read[key].words, work.read[key].role].append(key)
        fits = [found for found in groups.values() if len(found) == x.shape[0]]
        fits.sort(key=lambda found: -likeness(work.read[name], replace(work.read[found[0]], numbers=())))
        for found in fits:
            ordered = sorted(found, key=lambda key: work.read[key].numbers)
            ways = [work.ways(key, x.shape[1:])[:1] for key in ordered]
            if all(ways):
                made = Map(tuple(way[0].then(("reshape", (1, *x.shape[1:]))) for way in ways), 0)
                work.take(name, made, f"{made} (stacked)", ordered)
                break


# --- one to one


def _assign(work: _Work) -> None:
    """The assignment of tensors to parts of equal size whose names are likest in all."""
    from scipy.optimize import linear_sum_assignment

    buckets: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name, x in work.todo.items():
        buckets[x.size][0].append(name)
    for key, x in work.arrays.items():
        buckets[x.size][1].append(key)
    partners: dict[str, str] = {}  # modules, by the larger tensors that belong together
    module = lambda name: name.rpartition(".")[0]
    for _, (names, keys) in sorted(buckets.items(), key=lambda item: -item[0]):
        if not names or not keys:
            continue
        scores = np.full((len(names), len(keys)), -50.0)
        ranks = _ranks(names, work.read), _ranks(keys, work.read)
        cache: dict[tuple[Any, Any], bool] = {}
        for (i, name), (j, key) in itertools.product(enumerate(names), enumerate(keys)):
            shapes = work.arrays[key].shape, work.todo[name].shape
            if shapes not in cache:
                cache[shapes] = bool(work.ways(key, work.todo[name].shape))
            if cache[shapes]:
                apart = abs(ranks[0][i] - ranks[1][j])
                scores[i, j] = likeness(work.read[name], work.read[key]) - 0.4 * apart + 0.05 * (shapes[0] == shapes[1])
                partner = partners.get(module(name))
                scores[i, j] += 0.0 if partner is None else 0.8 if partner == module(work.parts[key].leaf) else -0.4
        for i, j in zip(*linear_sum_assignment(-scores), strict=True):
            if scores[i, j] < -1.5:  # another role
                continue
            name, key = names[i], keys[j]
            others = [x for k, x in enumerate(scores[i]) if k != j] + [x for k, x in enumerate(scores[:, j]) if k != i]
            sure = not others or scores[i, j] - max(others) > SURE
            part, square = work.ways(key, work.todo[name].shape)[0], _is_square(work.arrays[key])
            unoriented = square and work.turned(work.read[key]) is None
            guess = ", a guess" if not sure or unoriented else ""
            work.result.unoriented += [name] if unoriented else []
            partners.setdefault(module(name), module(part.leaf))
            work.take(name, Map((part,)), f"{part} (by name and shape{guess})", [key], not sure)


def _ranks(names: list[str], read: dict[str, Name]) -> list[float]:
    """The place of each name among those of its role, 0 to 1, in the order of the side."""
    by_role: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        by_role[read[name].role].append(i)
    place = {}
    for found in by_role.values():
        for at, i in enumerate(found):
            place[i] = at / max(1, len(found) - 1)
    return [place[i] for i in range(len(names))]


def _second_bias(work: _Work) -> None:
    """torch's recurrent cells have a bias for the inputs and one for the state, which are added."""
    for name in list(work.todo):
        for this, other in (("hh", "ih"), ("ih", "hh")):
            partner = re.sub(rf"(?<![a-z]){this}(?![a-z])", other, name)
            made = work.result.maps.get(partner)
            if partner != name and work.read[name].role == "bias" and isinstance(made, Map) and name in work.todo:
                beside = replace(made, parts=tuple(replace(part, beside=True) for part in made.parts))
                work.take(name, beside, f"{beside} (the second of two biases)", [])


# --- one tensor of one leaf


def _usually_turned(todo: Arrays, free: Arrays, read: dict[str, Name]) -> Callable[[Name | None], bool | None]:
    """Whether a leaf's matrices are (in, out) where the candidate has (out, in), as the other matrices of its kind
    tell; None: nothing tells.
    """
    votes: dict[str, int] = defaultdict(int)
    shapes = {x.shape for x in todo.values() if x.ndim == 2}
    for leaf, x in free.items():
        if x.ndim == 2 and x.shape[0] != x.shape[1]:
            kind = (read.get(leaf) or read_name(leaf)).raw[-1:]
            votes["".join(kind)] += (x.shape[::-1] in shapes) - (x.shape in shapes)

    def turned(name: Name | None) -> bool | None:
        if name is None:
            return None
        last = "".join(name.raw[-1:])
        if last in ("embedding", "embeddings"):
            return False
        if votes.get(last):
            return votes[last] > 0
        return True if last == "kernel" else None

    return turned


def _is_square(x: np.ndarray) -> bool:
    return x.ndim == 2 and x.shape[0] == x.shape[1] > 1


def _layer(part: Part, x: np.ndarray, i: int) -> Part:
    return part.sliced(0, i, i + 1).then(("reshape", x.shape[1:]))


def _ways(
    part: Part, leaves: Mapping[str, np.ndarray], shape: tuple[int, ...], name: Name | None, turned
) -> list[Part]:
    """How a part becomes a tensor of a shape: as it is, with axes moved, heads joined or apart; the likeliest first."""
    x = part(leaves)
    if x.size != math.prod(shape):
        return []
    found: list[Part] = []
    moved = lambda axes: part.then(("transpose", axes))
    usual = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}.get(x.ndim)
    is_turned = turned(name) if turned is not None else None
    kernel = name is not None and name.raw[-1:] == ("kernel",)
    if x.ndim == len(shape):
        same = [part] if x.shape == shape else []
        perms = (
            [axes for axes in itertools.permutations(range(x.ndim)) if axes != tuple(range(x.ndim))]
            if x.ndim < 6
            else []
        )
        fits = [axes for axes in perms if tuple(x.shape[a] for a in axes) == shape]
        fits.sort(key=lambda axes: axes != usual)
        others = [moved(axes) for axes in fits]
        first = is_turned if x.ndim == 2 else kernel or (is_turned and x.ndim > 2)
        found = [*others, *same] if first else [*same, *others]
    elif x.ndim == 3 and len(shape) == 2:
        if (x.shape[1] * x.shape[2], x.shape[0]) == shape:
            found.append(part.then(("transpose", (1, 2, 0)), ("reshape", shape)))
        if (x.shape[2], x.shape[0] * x.shape[1]) == shape:
            found.append(part.then(("transpose", (2, 0, 1)), ("reshape", shape)))
        if (x.shape[0] * x.shape[2], x.shape[1]) == shape:
            found.append(part.then(("transpose", (0, 2, 1)), ("reshape", shape)))
    elif x.ndim == 2 and len(shape) == 3:
        if (x.shape[1], x.shape[0]) == (shape[0], shape[1] * shape[2]):
            found.append(part.then(("transpose", (1, 0)), ("reshape", shape)))
        if (x.shape[1], x.shape[0]) == (shape[0] * shape[1], shape[2]):
            found.append(part.then(("transpose", (1, 0)), ("reshape", shape)))
    plain = tuple(d for d in x.shape if d != 1), tuple(d for d in shape if d != 1)
    if not found and (plain[0] == plain[1] or len(shape) == 1 or x.ndim == 1):
        found.append(part.then(("reshape", shape)))
    return found


def _explain(work: _Work, used: set[str]) -> None:
    shapes = sorted({str(x.shape) for x in work.arrays.values()})
    rest = f"; left over are {', '.join(shapes[:8])}" if shapes else ""
    for name, x in work.todo.items():
        work.result.missing[name] = f"no leaf of the reference is left for {x.shape}{rest}"
    if not any(isinstance(made, Given) for made in work.result.maps.values()):
        work.result.unused = [key for key in work.parts if key not in used]

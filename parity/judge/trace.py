"""At which module do two sides part?

The reference runs with taps at the borders of those modules that both have. Then the candidate runs with the
reference's values put in at each, forward and on the way back, so that every module is judged alone. A module whose
border cannot be seen (inside of a compiled loop, or run several times) is no place.
"""

from typing import Any

import numpy as np

from parity.judge.allowance import EPS, FLOOR, error
from parity.judge.maps import Map
from parity.judge.sides import Call
from parity.judge.taps import Taps, Values
from parity.judge.verdict import Place

LOCAL_ULPS = 256.0  # of one module given identical inputs: some roundings, and those of its sums


def module_names(matching: Any) -> dict[str, str]:
    """candidate's module -> the reference's, from the tensors that belong together and the modules that hold them."""
    found: dict[str, set[str]] = {}
    for name, made in matching.maps.items():
        if not isinstance(made, Map) or any(part.take for part in made.parts):
            continue
        modules = {part.leaf.rpartition(".")[0] for part in made.parts if not part.beside}
        a, b = name.rpartition(".")[0], _common(modules)
        if len(modules) > 1 and len(made.parts) > 1:
            found.setdefault(a, set()).add(b)
        while a and b:
            found.setdefault(a, set()).add(b)
            a, b = a.rpartition(".")[0], b.rpartition(".")[0]
    names = {a: next(iter(b)) for a, b in found.items() if len(b) == 1 and a}
    return {a: b for a, b in names.items() if b and list(names.values()).count(b) == 1}


def _common(modules: set[str]) -> str:
    parts = [module.split(".") for module in modules]
    same = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        same.append(words[0])
    return ".".join(same)


def trace(setup: Any, mode: str, dtype: str) -> Place:
    """The first module that differs, or a place of no kind that says why there is none."""
    names = module_names(setup.matching)
    if not names or not hasattr(setup.reference, "tapped") or not hasattr(setup.candidate, "tapped"):
        return Place(what="not traced: no module of the two belongs together")
    filled = next((x for x in setup.figures if not x.ok and x.check in ("outputs", "gradients", "state")), None)
    parameters, state, args, kwargs = setup.cases.get(
        filled.draw if filled else "", (setup.parameters, setup.state, setup.args, setup.kwargs)
    )
    theirs_args, theirs_kwargs = setup.layout.inputs(args, kwargs)
    ours_call = Call(args, kwargs, dtype, mode, setup.cotangents["reference"])
    theirs_call = Call(theirs_args, theirs_kwargs, dtype, mode, setup.cotangents["candidate"], setup.layout)
    try:
        ours = Taps()
        setup.reference.tapped(parameters, state, ours_call, ours, {b: a for a, b in names.items()})
        theirs = Taps(ours.forward, ours.backward, setup.layout)
        setup.candidate.tapped(
            setup.mapped(parameters), setup.mapped_state(state), theirs_call, theirs, {a: a for a in names}
        )
    except Exception as raised:  # a module inside of a compiled loop has no values to look at
        return Place(what=f"not traced: {type(raised).__name__}: {str(raised).splitlines()[0][:160]}")
    allowed = LOCAL_ULPS * EPS[setup.precision]
    return _first_fault(setup, names, ours, theirs, allowed)


def _first_fault(setup: Any, names: dict[str, str], ours: Taps, theirs: Taps, allowed: float) -> Place:
    back = [x for (_, which), x in ours.backward.items() if which == "out"]
    floor = FLOOR * max((float(np.linalg.norm(x)) for x in back), default=0.0)
    seen = [name for name in theirs.order if ours.calls[name] == 1 and theirs.calls[name] == 1]

    def off(kind: str, name: str, which: str) -> float:
        """The error at a border, 0 where it is not seen on both sides."""
        a: Values = getattr(theirs, kind)
        b: Values = getattr(ours, kind)
        if (name, which) not in a or (name, which) not in b:
            return 0.0
        x, y = a[name, which], b[name, which]
        x = setup.layout.output(x, y.shape, back=True)
        return error(x, y, floor if kind == "backward" else 0.0) if x.shape == y.shape else 0.0

    def around(name: str) -> str:
        parent = name.rpartition(".")[0]
        return parent or "the model"

    for name in seen:
        if off("forward", name, "in") > allowed:
            return Place(around(name), "module", f"what reaches {name}: {off('forward', name, 'in'):.1e}")
        if off("forward", name, "out") > allowed:
            return Place(
                name, "module", f"{off('forward', name, 'out'):.1e} given identical inputs{_partner(names, name)}"
            )
    for name in reversed(seen):
        if off("backward", name, "out") > allowed:
            return Place(
                around(name), "module", f"the gradient that flows back to {name}: {off('backward', name, 'out'):.1e}"
            )
        if off("backward", name, "in") > allowed:
            return Place(
                name,
                "module",
                f"the gradient that it hands back: {off('backward', name, 'in'):.1e}{_partner(names, name)}",
            )
    unseen = sorted(set(names) - set(seen))
    if seen and not unseen:
        return Place("the model", "module", "outside of the modules that both have, which agree given identical inputs")
    hidden = f", and {len(unseen)} that could not be seen ({', '.join(unseen[:3])})" if unseen else ""
    return Place(what=f"traced: {len(seen)} modules agree given identical inputs{hidden}")


def _partner(names: dict[str, str], name: str) -> str:
    return "" if names[name] == name else f" ({names[name]} in the reference)"

"""Module by module for a pair that is not ours: which JAX module a torch module is, and which is the first to differ.

torch runs free under taps. Then JAX runs with torch's inputs, outputs and gradients put in at every module that both
have, so each is judged alone. Linen modules are seen by `flax.linen.intercept_methods`; of NNX, Equinox and other
modules the class's `__call__` is wrapped while the trace runs. A plain function has no modules, and then the trace has
no points.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import torch
from flax import nnx

from llm_common.errors import UserError
from parity.core.compare import FLOOR, tensor_errors
from parity.sides.taps import JaxRecorder, TorchRecorder, Values
from parity.trace.trace import Fault, PointErrors, SideTrace, fault, local_allowed, relative


def functional(model: Any, params: Any) -> tuple[Callable[..., Any], Any, Any]:
    """A function (params, *inputs), its params, and the module behind it if there is one."""
    if isinstance(model, nn.Module):
        if params is None:
            raise UserError("a Linen module does not hold its parameters: give params=module.init(key, x)['params']")
        variables = params if isinstance(params, Mapping) and "params" in params else {"params": params}
        return (lambda p, *inputs: model.apply(p, *inputs)), variables, model
    if isinstance(model, nnx.Module):
        graph, state, rest = nnx.split(model, nnx.Param, ...)
        return (lambda p, *inputs: nnx.merge(graph, p, rest)(*inputs)), state if params is None else params, model
    if params is not None:
        return model, params, None
    if jax.tree.leaves(model) and callable(model):  # an Equinox module, or any pytree that can be called
        return (lambda p, *inputs: p(*inputs)), model, model
    raise UserError("jax= is a plain function: give its parameters with params=")


@dataclasses.dataclass(frozen=True)
class PairTrace:
    """JAX judged against torch, module by module."""

    side: SideTrace
    allowed: float
    modules: dict[str, str]  # torch module -> JAX module
    why_not: str = ""  # why nothing could be traced

    @property
    def fault(self) -> Fault | None:
        return None if self.why_not else fault(self.side, self.allowed)

    @property
    def agrees(self) -> bool:
        return self.fault is None

    def sentence(self) -> str:
        if self.why_not:
            return f"Not traced: {self.why_not}."
        found = self.fault
        if found is None:
            return f"At {len(self.side.points)} modules no difference, given identical inputs."
        partner = self.modules.get(found.place)
        name = f"{found.place} ({partner} in JAX)" if partner and partner != found.place else found.place
        return f"They differ first at {name}: {found.error:.1e} {found.what}."


def module_names(pair: Any) -> dict[str, str]:
    """torch module -> JAX module, from the parameters that belong together, and from those modules that hold them."""
    found: dict[str, set[str]] = {}
    for name, source in pair.matching.sources.items():
        leaf = getattr(source, "leaf", None)
        if leaf is None:
            continue
        a, b = name.rpartition(".")[0], leaf.removeprefix("params.").rpartition(".")[0]
        if source.index is not None:  # a stack: the layer's number stands where torch has it
            stack = re.search(rf"(\w+)\.{source.index}(?:\.|$)", a)
            if stack is None or not re.search(rf"(^|\.){stack[1]}(\.|$)", b):
                continue
            b = re.sub(rf"((?:^|\.){stack[1]})(?=\.|$)", rf"\1.{source.index}", b, count=1)
        while a and b:
            found.setdefault(a, set()).add(b)
            a, b = a.rpartition(".")[0], b.rpartition(".")[0]
    names = {a: next(iter(b)) for a, b in found.items() if len(b) == 1}
    twice = {b for b in names.values() if list(names.values()).count(b) > 1}
    return {a: b for a, b in names.items() if b not in twice} | pair.modules


def numbered(name: str) -> str:
    """A module's name with its number as a part of its own: Dense_0 and Dense.0 are the same."""
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", name)


class PairTorchRecorder(TorchRecorder):
    def __init__(self, *values: Values) -> None:
        super().__init__(*values)
        self.order: list[str] = []

    @contextlib.contextmanager
    def attached_to(self, model: torch.nn.Module, names: Mapping[str, str]) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            if name in names:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, a, k, name=name: ((*self.enter(name, a[:1]), *a[1:]), k), with_kwargs=True
                    )
                )
                handles.append(module.register_forward_hook(lambda m, a, o, name=name: self._end(name, o)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _end(self, name: str, output: Any) -> Any:
        if name not in self.order:
            self.order.append(name)
        return self.leave(name, output)


class PairJaxRecorder(JaxRecorder):
    """Points are named as torch names them."""

    def __init__(self, names: Mapping[str, str], *values: Values) -> None:
        super().__init__(*values)
        self.torch_name = {numbered(jax_name): torch_name for torch_name, jax_name in names.items()}

    @contextlib.contextmanager
    def attached_to(self, model: Any) -> Iterator[None]:
        """The Linen modules that run, and the classes of any other module that `model` is made of."""

        def intercept(next_fun, args, kwargs, context):
            if context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            self.path.append(numbered(context.module.name or ""))
            try:
                return self._run(self.name(), next_fun, args, kwargs)
            finally:
                self.path.pop()

        with contextlib.ExitStack() as stack:
            stack.enter_context(nn.intercept_methods(intercept))
            if model is not None and not isinstance(model, nn.Module):
                names = _paths(model)
                for cls in {type(x) for _, x in names.values()}:
                    stack.enter_context(mock.patch.object(cls, "__call__", self._wrapped(cls.__call__, {})))
            yield

    def _wrapped(self, call: Callable, table: dict[int, tuple[str, Any]]) -> Callable:
        def wrapped(module, *args, **kwargs):
            if id(module) not in self.table:  # an outermost call: its parts get their paths
                self.table |= _paths(module)
            name, _ = self.table[id(module)]
            return self._run(numbered(name), lambda *a, **k: call(module, *a, **k), args, kwargs)

        self.table = table
        return wrapped

    def _run(self, name: str, f: Callable, args: tuple, kwargs: dict) -> Any:
        point = self.torch_name.get(name)
        if point is None or not args:
            return f(*args, **kwargs)
        return self.leave(point, f(*self.enter(point, args[:1]), *args[1:], **kwargs))


def _paths(root: Any, prefix: str = "", found: dict[int, tuple[str, Any]] | None = None) -> dict[int, tuple[str, Any]]:
    """id -> (path, module) of a module and the modules in its attributes, lists and dicts."""
    found = {} if found is None else found
    if isinstance(root, (list, tuple, nnx.List)):
        items = enumerate(root)
    elif isinstance(root, Mapping):
        items = root.items()
    elif hasattr(root, "__dict__") and callable(root) and not isinstance(root, (type, np.ndarray, jax.Array)):
        if not type(root).__module__.startswith(("builtins", "jax", "numpy")) and not isinstance(root, nnx.Variable):
            if id(root) in found:
                return found
            found[id(root)] = (prefix, root)
        items = vars(root).items()
    else:
        return found
    for key, value in items:
        if not str(key).startswith("_"):
            _paths(value, f"{prefix}.{key}" if prefix else str(key), found)
    return found


def trace_pair(pair: Any, dtype: str) -> PairTrace:
    """torch free, then JAX with torch's values at every module."""
    names = module_names(pair)
    nothing = SideTrace("JAX", [], {}, {}, math.nan)
    if not names:
        return PairTrace(nothing, 0.0, names, "no module of the two could be paired; name some with modules=")
    module = pair.torch_module(dtype)
    theirs = PairTorchRecorder()
    with theirs.attached_to(module, names):
        _, their_grads = pair.run_torch(dtype, module)
    points = [name for name in theirs.order if (name, "out") in theirs.forward]
    if not points:
        return PairTrace(nothing, 0.0, names, f"torch runs none of {', '.join(names)} as modules of their own")
    runs = []
    try:
        for values in ((theirs.forward, theirs.backward), ({}, {})):
            recorder = PairJaxRecorder(names, *values)
            with recorder.attached_to(pair.module):
                _, grads = pair.run_jax(dtype, pair.leaves, pair.inputs)
            runs.append((recorder, grads))
    except Exception as error:  # a module inside vmap or scan has no values of its own to look at
        return PairTrace(nothing, 0.0, names, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    (alone, own), (free, free_grads) = runs
    floor = FLOOR * max((float(np.linalg.norm(x)) for (n, w), x in theirs.backward.items() if w == "out"), default=0.0)
    errors = []
    for name in points:
        get = lambda kind, which, recorder=alone, name=name: getattr(recorder, kind).get((name, which))
        has_input, back = (name, "in0") in theirs.forward, theirs.backward
        errors.append(
            PointErrors(
                name,
                relative(get("forward", "in0"), theirs.forward[name, "in0"]) if has_input else math.nan,
                relative(get("forward", "out"), theirs.forward[name, "out"]),
                relative(get("backward", "out"), back[name, "out"], floor) if (name, "out") in back else math.nan,
                relative(get("backward", "in0"), back[name, "in0"], floor) if (name, "in0") in back else math.nan,
                relative(get("forward", "out", free), theirs.forward[name, "out"]),
                relative(get("backward", "out", free), back[name, "out"], floor) if (name, "out") in back else math.nan,
                "x",
                alone.calls[name],
                (name, "in0") in alone.detached,
            )
        )
    side = SideTrace("JAX", errors, tensor_errors(own, their_grads), tensor_errors(free_grads, their_grads), math.nan)
    return PairTrace(side, local_allowed(dtype), names)

"""Taps on a running model: what goes in and out of every named module, forward and backward, without touching its code.

A tap is the identity on an activation, and of its gradient on the way back; it writes both down. A tap that is given
other values hands those on instead: with the specification's values at every input and output, and its gradients on the
way back, each module is judged alone, however wrong the others are. JAX modules are tapped by
`flax.linen.intercept_methods`, torch modules by hooks, and the functions between the modules by standing in for them in
the module that calls them.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer

import jax_llm.attention
import jax_llm.model
import torch_llm.attention
import torch_llm.layers
import torch_llm.model
from parity.core.ops import FUNCTIONS, KERNELS, Op

Key = tuple[str, str]  # a point, and which of its tensors: "in0", "in1", ..., "out"
Values = dict[Key, np.ndarray]


class Recorder:
    """What passed the taps of one run. `forward` and `backward` hold float64 copies.

    given: values to hand on forward; given_back: gradients to hand on backward; a point that is in neither is observed
    only.
    """

    def __init__(self, given: Values | None = None, given_back: Values | None = None) -> None:
        self.given, self.given_back = given or {}, given_back or {}
        self.forward: Values = {}
        self.backward: Values = {}
        self.calls: Counter[str] = Counter()  # how often a point was run; its first run alone is tapped
        self.detached: set[Key] = set()  # what arrived without a way back for its gradient
        self.dtypes: dict[Key, str] = {}  # of what passed, forward
        self.back_dtypes: dict[Key, str] = {}  # of the gradients on the way back
        self.path: list[str] = []

    # what a framework must know: how to put a tap on a tensor
    def tap(self, x: Any, key: Key) -> Any:
        raise NotImplementedError

    def name(self, *last: str) -> str:
        return ".".join(part for part in (*self.path, *last) if part)

    def enter(self, point: str, inputs: Sequence[Any]) -> list[Any]:
        """The inputs of a point, tapped."""
        self.calls[point] += 1
        if self.calls[point] > 1:
            return list(inputs)
        return [self.tap(x, (point, f"in{i}")) for i, x in enumerate(inputs)]

    def leave(self, point: str, output: Any) -> Any:
        """The output of a point, tapped; of a tuple, its first part."""
        if self.calls[point] > 1:
            return output
        if isinstance(output, tuple):
            return (self.tap(output[0], (point, "out")), *output[1:])
        return self.tap(output, (point, "out"))

    def tapped(self, f: Callable, op: Op) -> Callable:
        """A function under taps on its inputs and its result."""
        n = len(op.inputs)

        def under_taps(*args, **kwargs):
            points = [self.name(name) for name in op.calls]
            point = next((p for p in points if not self.calls[p]), points[-1])
            return self.leave(point, f(*self.enter(point, args[:n]), *args[n:], **kwargs))

        return under_taps

    def stand_in(self, package: Any, op: Op):
        """A patch: the function that a file of a package calls, under its taps."""
        module = getattr(package, op.caller)
        return mock.patch.object(module, op.function, self.tapped(getattr(module, op.function), op))

    def kernels(self, kernels: Any) -> Any:
        """A model's kernels under their taps."""
        tapped = {op.kernel: self.tapped(getattr(kernels, op.kernel), op) for op in KERNELS}
        return dataclasses.replace(kernels, **tapped)

    def store(self, kind: Values, key: Key, x: np.ndarray) -> None:
        if key not in kind:  # the first micro-batch, the first call
            kind[key] = np.array(x, np.float64)

    def hands_on(self, x: Any, key: Key) -> np.ndarray | None:
        """What is handed on in x's place; nothing, if the shapes show that x means something else."""
        value = self.given.get(key)
        return value if value is not None and value.shape == tuple(x.shape) else None


class JaxRecorder(Recorder):
    def tap(self, x, key):
        if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        value, back = self.hands_on(x, key), self.given_back.get(key)
        self.dtypes.setdefault(key, str(x.dtype))
        if not isinstance(x, Tracer):
            self.detached.add(key)

        @jax.custom_vjp
        def tapped(x):
            self.store(self.forward, key, np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
            return x if value is None else jnp.array(value, x.dtype)

        def backward(_, arriving):
            self.back_dtypes.setdefault(key, str(arriving.dtype))
            self.store(self.backward, key, np.asarray(arriving.astype(jnp.promote_types(x.dtype, jnp.float32))))
            fits = back is not None and back.shape == arriving.shape
            return (jnp.array(back, arriving.dtype) if fits else arriving,)

        tapped.defvjp(lambda x: (tapped(x), None), backward)
        return tapped(x)

    def of(self, model: Any) -> Any:
        """The model with its kernels under their taps."""
        return dataclasses.replace(model, kernels=self.kernels(model.kernels))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While this is open, whatever Linen module runs is tapped. To be run uncompiled."""

        def intercept(next_fun, args, kwargs, context):
            method, name = context.method_name, context.module.name or ""
            if method == "attend":  # the tied head
                return self.leave("lm_head", next_fun(*self.enter("lm_head", args)))
            if method != "__call__":
                return next_fun(*args, **kwargs)
            self.path.append(name.replace("layers_", "layers."))
            try:
                point = self.name()
                if not point:
                    return next_fun(*args, **kwargs)
                return self.leave(point, next_fun(*self.enter(point, args[:1]), *args[1:], **kwargs))
            finally:
                self.path.pop()

        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.disable_jit())
            stack.enter_context(nn.intercept_methods(intercept))
            for op in FUNCTIONS:
                stack.enter_context(self.stand_in(jax_llm, op))
            yield


class _TorchTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value, on_backward):
        ctx.on_backward = on_backward
        return x.clone() if value is None else value

    @staticmethod
    def backward(ctx, arriving):
        return ctx.on_backward(arriving), None, None


class TorchRecorder(Recorder):
    def tap(self, x, key):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        self.store(self.forward, key, x.detach().double().cpu().numpy())
        self.dtypes.setdefault(key, str(x.dtype).removeprefix("torch."))
        if not x.requires_grad:
            self.detached.add(key)
        value, back = self.hands_on(x, key), self.given_back.get(key)

        def on_backward(arriving):
            self.back_dtypes.setdefault(key, str(arriving.dtype).removeprefix("torch."))
            self.store(self.backward, key, arriving.double().cpu().numpy())
            fits = back is not None and back.shape == tuple(arriving.shape)
            return torch.tensor(back, dtype=arriving.dtype, device=arriving.device) if fits else arriving

        return _TorchTap.apply(
            x, None if value is None else torch.tensor(value, dtype=x.dtype, device=x.device), on_backward
        )

    @contextlib.contextmanager
    def attached(self, model: torch.nn.Module) -> Iterator[None]:
        """While this is open, the named modules of `model` are tapped."""
        handles = []

        def before(module, args, name):
            self.path.append(name)
            return (*self.enter(name, args[:1]), *args[1:])

        def after(module, args, output, name):
            self.path.pop()
            return self.leave(name, output)

        for name, module in model.named_modules():
            if name and not isinstance(module, torch.nn.ModuleList):
                handles.append(module.register_forward_pre_hook(lambda m, a, name=name: before(m, a, name)))
                handles.append(module.register_forward_hook(lambda m, a, o, name=name: after(m, a, o, name)))

        def attend(module, x, attend=torch_llm.layers.Embedding.attend):
            return self.leave("lm_head", attend(module, *self.enter("lm_head", (x,))))

        with contextlib.ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            for module in model.modules():
                if hasattr(module, "kernels"):
                    stack.enter_context(mock.patch.object(module, "kernels", self.kernels(module.kernels)))
            for op in FUNCTIONS:
                stack.enter_context(self.stand_in(torch_llm, op))
            stack.enter_context(mock.patch.object(torch_llm.layers.Embedding, "attend", attend))
            yield

    def name(self, *last: str) -> str:
        return ".".join((*self.path[-1:], *last))  # a module's name in torch is its whole path

"""PyTorch as a side: modules with their buffers, and plain functions of tensors."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_common.errors import UserError, first_line
from parity.judge import trees
from parity.judge.draws import dropout_drawn
from parity.judge.maps import Arrays
from parity.judge.sides import Call, Result, mode_arguments
from parity.judge.taps import Taps

NARROW = (torch.float32, torch.float16, torch.bfloat16)


def torch_side(model: Any, weights: Any = None) -> "TorchSide":
    """The side of a module, or of a function (weights, *inputs)."""
    if isinstance(model, torch.nn.Module):
        if weights is not None:
            raise UserError("a torch module holds its weights: load them into it, and give the module alone")
        return TorchSide(model)
    return TorchSide(_Function(model, weights))


class _Function(torch.nn.Module):
    """A function of a nest of tensors as a module."""

    def __init__(self, function: Callable[..., Any], weights: Any) -> None:
        super().__init__()
        self.function, self.weights = function, weights
        self.names = {path: f"weight_{i}" for i, (path, _) in enumerate(trees.leaves(weights))}
        for path, x in trees.leaves(weights):
            value = torch.as_tensor(x)
            if value.is_floating_point() or value.is_complex():
                self.register_parameter(self.names[path], torch.nn.Parameter(value.detach().clone()))

    def forward(self, *args, **kwargs):
        names = iter(self.names.values())
        filled = trees.mapped(lambda leaf: getattr(self, next(names), leaf), self.weights)
        return self.function(filled, *args, **kwargs)


class TorchSide:
    framework = "torch"

    def __init__(self, module: torch.nn.Module) -> None:
        lazy = [n for n, p in module.named_parameters() if isinstance(p, torch.nn.parameter.UninitializedParameter)]
        if lazy:
            raise UserError(f"the torch module has not been run yet: {lazy[0]} has no shape; run it once before")
        self.module = module
        names = {name: path for path, name in module.names.items()} if isinstance(module, _Function) else {}
        self._own = {names.get(name, name): name for name, _ in module.named_parameters()}
        found = dict(module.named_parameters())
        self.parameters = {shown: to_numpy(found[name]) for shown, name in self._own.items()}
        self.frozen = frozenset(shown for shown, name in self._own.items() if not found[name].requires_grad)
        self.state = {n: to_numpy(x) for n, x in module.named_buffers() if x.is_floating_point() or x.is_complex()}
        self._copies: dict[str, torch.nn.Module] = {}

    def copy_of(self, parameters: Arrays, state: Arrays, dtype: str, mode: str) -> torch.nn.Module:
        """A copy of the module with other weights, in a dtype."""
        if dtype not in self._copies:
            try:
                made = copy.deepcopy(self.module)
            except Exception as error:  # whatever a module's own attributes raise
                raise UserError(
                    f"the torch module cannot be copied ({first_line(error)}); norms of weights are "
                    "those of torch.nn.utils.parametrizations"
                ) from None
            self._copies = {dtype: made._apply(lambda x: _in_dtype(x, dtype))}  # of one dtype at a time
        module = self._copies[dtype].train(mode == "train")
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        originals = dict(self.module.named_buffers())
        with torch.no_grad():
            for shown, name in self._own.items():
                tensors[name].copy_(_cast(parameters[shown], dtype))
                tensors[name].grad = None
            for name, x in module.named_buffers():
                x.copy_(_cast(state[name], dtype) if name in state else originals[name])
        return module

    def run(self, parameters: Arrays, state: Arrays, call: Call, module: torch.nn.Module | None = None) -> Result:
        module = self.copy_of(parameters, state, call.dtype, call.mode) if module is None else module
        arrays = {i: _cast(x, call.dtype) for i, x in call.arrays().items()}
        trained = {i: x.requires_grad_() for i, x in arrays.items() if x.is_floating_point() or x.is_complex()}
        args, kwargs = call.filled(arrays)
        told = mode_arguments(_arguments(module), kwargs, call.mode)
        with dropout_drawn(call.mode, call.layout), torch.set_grad_enabled(call.cotangent is not None):
            found = trees.leaves(module(*args, **kwargs, **told))
        outputs = [(path, x) for path, x in found if isinstance(x, torch.Tensor)]
        results = [(path, to_numpy(x)) for path, x in outputs]
        after = {n: to_numpy(x) for n, x in module.named_buffers() if n in self.state}
        if call.cotangent is None:
            return Result(results, {}, {}, after)
        total: Any = 0
        for i, (path, x) in enumerate(outputs):
            if x.requires_grad:
                weight = _cast(call.cotangent(i, path, tuple(x.shape)), call.dtype).to(x.dtype)
                total = total + (weight * x).sum().real if x.is_complex() else total + (weight * x).sum()
        if isinstance(total, torch.Tensor):
            total.backward()
        paths = [path for path, _ in call.leaves()]
        own = dict(module.named_parameters())
        zero = lambda x: to_numpy(x.grad) if x.grad is not None else np.zeros(tuple(x.shape))
        grads = {shown: zero(own[name]) for shown, name in self._own.items() if shown not in self.frozen}
        return Result(results, grads, {paths[i]: zero(x) for i, x in trained.items()}, after)

    def shapes(self, parameters: Arrays, state: Arrays, call: Call) -> list[tuple[str, tuple[int, ...]]]:
        return [(path, x.shape) for path, x in self.run(parameters, state, call).outputs]

    def narrow(self, parameters: Arrays, state: Arrays, call: Call) -> list[str]:
        wanted, found = getattr(torch, call.dtype), set()

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                made = out if isinstance(out, (tuple, list)) else (out,)
                for x in (*made, *args):  # and constants that were made in a narrower dtype before
                    if isinstance(x, torch.Tensor) and x.dtype in NARROW and x.dtype != wanted and x.numel() > 1:
                        found.add(str(func).removeprefix("aten.").split(".")[0])
                return out

        module = self.copy_of(parameters, state, call.dtype, call.mode)
        with Watch():
            self.run(parameters, state, call, module)
        return sorted(found)

    def tapped(self, parameters: Arrays, state: Arrays, call: Call, taps: Taps, names: dict[str, str]) -> Arrays:
        """A run with taps at the borders of modules, own name -> name of the tap; the gradients of the parameters."""
        module, handles = self.copy_of(parameters, state, call.dtype, call.mode), []

        def before(args, kwargs, point):
            if not taps.enters(point) or not args or not _is_float(args[0]):
                return None
            return (_Tap.apply(args[0], taps, (point, "in")), *args[1:]), kwargs

        def after(output, point):
            first = output[0] if isinstance(output, tuple) else output
            if not taps.ends(point) or not _is_float(first):
                return None
            made = _Tap.apply(first, taps, (point, "out"))
            return (made, *output[1:]) if isinstance(output, tuple) else made

        for name, inner in module.named_modules():
            if name in names:
                hook = lambda m, args, kwargs, point=names[name]: before(args, kwargs, point)
                handles.append(inner.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(inner.register_forward_hook(lambda m, a, out, point=names[name]: after(out, point)))
        try:
            return self.run(parameters, state, call, module).gradients
        finally:
            for handle in handles:
                handle.remove()


def _in_dtype(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Real and complex numbers in a dtype, others as they are."""
    if x.is_complex():
        return x.to(torch.complex128 if dtype == "float64" else torch.complex64)
    return x.to(getattr(torch, dtype)) if x.is_floating_point() else x


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, key):
        ctx.taps, ctx.key = taps, key
        taps.store(taps.forward, key, to_numpy(x))
        value = taps.instead(taps.given, key, tuple(x.shape))
        return x.clone() if value is None else torch.tensor(value, dtype=x.dtype)

    @staticmethod
    def backward(ctx, arriving):
        ctx.taps.store(ctx.taps.backward, ctx.key, to_numpy(arriving))
        value = ctx.taps.instead(ctx.taps.given_back, ctx.key, tuple(arriving.shape))
        return arriving if value is None else torch.tensor(value, dtype=arriving.dtype), None, None


def _arguments(module: torch.nn.Module) -> list[str]:
    try:
        if isinstance(module, _Function):
            return list(inspect.signature(module.function).parameters)
        return [
            name for name in inspect.signature(module.forward).parameters if name in ("deterministic", "is_training")
        ]
    except (TypeError, ValueError):
        return []


def to_numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach().cpu()
    x = x.double() if x.is_floating_point() else x.to(torch.complex128) if x.is_complex() else x
    return np.array(x.resolve_conj().numpy())  # a copy: torch works in place


def _cast(x: np.ndarray, dtype: str) -> torch.Tensor:
    if trees.is_complex(x):
        return torch.tensor(x, dtype=torch.complex128 if dtype == "float64" else torch.complex64)
    return torch.tensor(trees.exact(x), dtype=getattr(torch, dtype)) if trees.is_float(x) else torch.tensor(x)

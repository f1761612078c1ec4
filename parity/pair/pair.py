"""Your own pair: a JAX function or module and a torch module that are meant to be the same, compared as our two sides
are.

    from parity.pair import Pair

    pair = Pair(jax_function, torch_module, inputs=(x,), params=params)
    pair.compare().show()

Neither is changed: both are copied, given the same weights and run in float64 and float32. Outputs, the gradient of
every parameter and of the inputs, and optimizer steps are compared; what may differ is measured by moving every weight
and input by one ulp. Where they differ, a trace names the module. There is no third witness here, so a verdict says
where, not who: give `witness`, a NumPy function of (weights by torch name, *inputs), and it says who.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from llm_common.errors import UserError
from parity.core.compare import EPS, JAX, TORCH, Row, tensor_errors, worst
from parity.pair.matching import Arrays, Matching, Source, leaves_of, match, with_leaves
from parity.pair.module_taps import PairTrace, functional, trace_pair
from parity.pair.optimizer_pair import EITHER, STEPS, allowed_error, compare_optimizers, scope, to_numpy

DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found: rows of figures, which tensor is which, and where they part."""

    name: str
    rows: list[Row]
    matching: Matching
    trace: PairTrace | None
    gradients: dict[str, float] = dataclasses.field(default_factory=dict)  # of every parameter, in float64 if it ran

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def verdict(self) -> str:
        """One sentence."""
        if self.ok:
            return f"{self.name}: JAX and torch agree in all {len(self.rows)} figures."
        first = next(row for row in self.rows if not row.ok)
        place = "" if self.trace is None or self.trace.agrees else f" {self.trace.sentence()}"
        note = f" ({first.note})" if first.note else ""
        measured = (
            "not comparable" if math.isinf(first.measured) else f"{first.measured:.1e}, allowed {first.allowed:.1e}"
        )
        return f"{self.name}: {first.check}, {first.item} ({first.dtype}): {measured}{note}.{place}"

    def show(self) -> "Comparison":
        """Print which tensor is which, the table and the verdict; returns itself."""
        from parity.report.report import print_comparison

        print_comparison(self)
        return self

    def write(self, folder: str) -> "Comparison":
        """Write report.html, report.md and report.json; returns itself."""
        from parity.report.report import write_comparison

        write_comparison(self, folder)
        return self


class Pair:
    """Two implementations to be compared.

    jax: a function (params, *inputs) -> outputs; or a module: Linen (with its params), NNX, Equinox, any callable
    pytree. torch: a module. inputs: NumPy arrays, given to both. params: a pytree; needless if `jax` holds its own.
    names: torch name -> path of a leaf, or a function of all leaves by path; what is not named is matched by itself.
    weights: "jax" copies JAX's weights into torch, "torch" the other way, "shared" compares them as they are.
    optimizers: an optax transformation and a function of parameters that makes a torch optimizer. modules: torch module
    -> JAX module, where their parameters do not tell. dtypes: what to run in; float32 alone where one of the two
    computes in float32 whatever it is given, as transformers' norms do.
    """

    def __init__(
        self,
        jax: Any,
        torch: torch.nn.Module,
        inputs: Sequence[np.ndarray],
        params: Any = None,
        names: Mapping[str, Any] | None = None,
        weights: str = "jax",
        optimizers: tuple[Any, Callable] | None = None,
        modules: Mapping[str, str] | None = None,
        witness: Callable[..., Any] | None = None,
        dtypes: Sequence[str] = ("float64", "float32"),
        name: str = "pair",
    ) -> None:
        if weights not in ("jax", "torch", "shared"):
            raise UserError(f"weights = {weights!r} must be 'jax', 'torch' or 'shared'")
        if not isinstance(torch, _Module):
            raise UserError(f"torch = {type(torch).__name__} must be a torch.nn.Module; wrap a function in one")
        self.function, self.params, self.module = functional(jax, params)
        self.torch, self.inputs = torch, [np.asarray(x) for x in inputs]
        self.weights, self.optimizers, self.witness, self.name = weights, optimizers, witness, name
        self.modules, self.dtypes = dict(modules or {}), tuple(dtypes)
        self.leaves = leaves_of(self.params)
        self.tensors = {key: p.detach().double().cpu().numpy() for key, p in torch.named_parameters()}
        self.matching = match(self.tensors, self.leaves, names)
        if weights == "torch":
            for key, source in self.matching.sources.items():
                if not isinstance(source, Source):
                    raise UserError(
                        f"weights = 'torch': the function for {key!r} cannot be turned round; use weights='jax'"
                    )
                source.put(self.leaves, self.tensors[key])

    def compare(self, dtypes: Sequence[str] | None = None, steps: Sequence[int] = STEPS) -> Comparison:
        """Outputs, gradients and optimizer steps in each dtype (default: the pair's), and a trace if something
        differs.
        """
        dtypes = tuple(dtypes or self.dtypes)
        rows = [self._weights_row()]
        trace, gradients = None, {}
        if rows[0].ok:
            for dtype in dtypes:
                found, errors = self._compare_in(dtype)
                rows += found
                gradients = gradients or errors
            if self.optimizers is not None:
                for dtype in dtypes:
                    rows += compare_optimizers(*self.optimizers, self._mapped(self.leaves), steps, (dtype,))
            if any(row.check in ("outputs", "gradients") and not row.ok for row in rows):
                trace = self.trace(dtypes[0])
        return Comparison(self.name, rows, self.matching, trace, gradients)

    def trace(self, dtype: str = "float64") -> PairTrace:
        """Every module that both have, given identical inputs and gradients."""
        with scope(dtype):
            return trace_pair(self, dtype)

    # --- the weights

    def _weights_row(self) -> Row:
        m = self.matching
        unmatched = len(m.missing) + len(m.unused)
        note = "; ".join(
            [f"torch's {name}: {why}" for name, why in m.missing.items()] + [f"JAX's {x} is not used" for x in m.unused]
        )
        row = Row("weights", f"tensors without a partner, of {len(self.tensors)}", "", unmatched, 0, not unmatched)
        if unmatched:
            return dataclasses.replace(row, side=EITHER, note=note)
        if self.weights == "shared":
            name, error = worst(tensor_errors(self._mapped(self.leaves), self.tensors)) if self.tensors else ("", 0.0)
            ok = error <= EPS["float32"]
            return Row(
                "weights", "difference of the weights", "", error, EPS["float32"], ok, "" if ok else EITHER, name, name
            )
        return row

    def _mapped(self, leaves: Mapping[str, np.ndarray]) -> Arrays:
        """JAX leaves (weights or gradients) as torch has them."""
        return {name: np.asarray(source(leaves)) for name, source in self.matching.sources.items()}

    def torch_module(self, dtype: str) -> torch.nn.Module:
        """A copy of the torch module with the pair's weights."""
        module = copy.deepcopy(self.torch).to(getattr(torch, dtype))
        weights = self.tensors if self.weights == "shared" else self._mapped(self.leaves)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(torch.tensor(weights[name], dtype=p.dtype))
        return module

    def torch_inputs(self, dtype: str) -> list[torch.Tensor]:
        floats = lambda x: torch.tensor(x, dtype=getattr(torch, dtype)).requires_grad_()
        return [floats(x) if np.issubdtype(x.dtype, np.floating) else torch.tensor(x) for x in self.inputs]

    def jax_inputs(self, dtype: str, inputs: Sequence[np.ndarray] | None = None) -> list[jax.Array]:
        floats = lambda x: jnp.array(x, jnp.dtype(dtype))
        return [floats(x) if np.issubdtype(x.dtype, np.floating) else jnp.array(x) for x in inputs or self.inputs]

    # --- one dtype

    def _compare_in(self, dtype: str) -> tuple[list[Row], dict[str, float]]:
        with scope(dtype):
            theirs, their_grads = self.run_torch(dtype)
            ours, our_grads = self.run_jax(dtype, self.leaves, self.inputs)
            if len(ours) != len(theirs):
                note = f"JAX gives {len(ours)} outputs, torch {len(theirs)}"
                return [Row("outputs", "number of outputs", dtype, math.inf, 0, False, EITHER, note)], {}
            noise_out, noise_grad = self._noise(dtype, ours, our_grads)
            exact = self._witnessed(theirs)
        rows = []
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            rows.append(_output_row(f"output {i}", dtype, a, b, noise_out, exact[i] if exact else None))
        if not our_grads:
            return rows, {}
        errors = tensor_errors(our_grads, their_grads)
        name, error = worst(errors)
        allowed = allowed_error(dtype, noise_grad)
        if any(not np.isfinite(x).all() for x in (*our_grads.values(), *their_grads.values())) and all(
            r.ok for r in rows
        ):
            note = "gradients are not finite in " + ", ".join(
                n for n, x in our_grads.items() if not np.isfinite(x).all()
            )
        else:
            note = name
        ok = error <= allowed
        item = f"worst of {len(errors)}, by a random direction of the outputs"
        rows.append(Row("gradients", item, dtype, error, allowed, ok, "" if ok else EITHER, note, name, noise_grad))
        return rows, errors

    def run_torch(self, dtype: str, module: torch.nn.Module | None = None) -> tuple[list[np.ndarray], Arrays]:
        """Outputs, and gradients by name; those of the inputs are "input 0", ... . The function differentiated is a
        fixed random direction of all outputs.
        """
        module = module or self.torch_module(dtype)
        inputs = self.torch_inputs(dtype)
        outputs = [x for x in _flatten(module(*inputs)) if isinstance(x, torch.Tensor)]
        arrays = [to_numpy(x) for x in outputs]
        total = sum(
            (x * torch.tensor(_direction(i, x.shape), dtype=x.dtype)).sum()
            for i, x in enumerate(outputs)
            if x.is_floating_point() and x.requires_grad
        )
        if not isinstance(total, torch.Tensor):
            return arrays, {}
        total.backward()
        grads = {n: to_numpy(p.grad) if p.grad is not None else np.zeros(p.shape) for n, p in module.named_parameters()}
        for i, x in enumerate(inputs):
            if x.requires_grad:
                grads[f"input {i}"] = to_numpy(x.grad) if x.grad is not None else np.zeros(x.shape)
        return arrays, grads

    def run_jax(self, dtype: str, leaves: Mapping[str, np.ndarray], inputs: Sequence[np.ndarray]):
        """The same of JAX, its gradients as torch has them."""
        arrays = self.jax_inputs(dtype, inputs)
        float_inputs = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
        values = {name: jnp.array(x, jnp.dtype(dtype)) for name, x in leaves.items()}

        def total(values, floats):
            filled = with_leaves(self.params, values, jnp.dtype(dtype))
            full = [floats[float_inputs.index(i)] if i in float_inputs else x for i, x in enumerate(arrays)]
            outputs = [jnp.asarray(x) for x in jax.tree.leaves(self.function(filled, *full)) if hasattr(x, "dtype")]
            parts = [
                (x * jnp.array(_direction(i, x.shape), x.dtype)).sum()
                for i, x in enumerate(outputs)
                if jnp.issubdtype(x.dtype, jnp.floating)
            ]
            return sum(parts, jnp.zeros((), jnp.dtype(dtype))), outputs

        grad = jax.grad(total, argnums=(0, 1), has_aux=True)
        (by_leaf, by_input), outputs = grad(values, [arrays[i] for i in float_inputs])
        arrays_out = [to_numpy(x) for x in outputs]
        if not any(np.issubdtype(x.dtype, np.floating) for x in arrays_out):
            return arrays_out, {}
        grads = self._mapped({name: to_numpy(x) for name, x in by_leaf.items()})
        return arrays_out, grads | {f"input {i}": to_numpy(g) for i, g in zip(float_inputs, by_input, strict=True)}

    def _noise(self, dtype: str, outputs: list[np.ndarray], grads: Arrays) -> tuple[float, float]:
        """What one ulp in every weight and input does within JAX: the largest error of an output, and of a gradient."""
        of_outputs, of_grads = 0.0, 0.0
        for draw in range(DRAWS):
            rng = np.random.default_rng((9, draw))
            nudge = lambda x, rng=rng: x * (1 + EPS[dtype] * rng.choice([-1.0, 1.0], x.shape))
            inputs = [nudge(x) if np.issubdtype(x.dtype, np.floating) else x for x in self.inputs]
            moved, moved_grads = self.run_jax(dtype, {name: nudge(x) for name, x in self.leaves.items()}, inputs)
            pairs = [(a, b) for a, b in zip(moved, outputs, strict=True) if np.issubdtype(a.dtype, np.floating)]
            of_outputs = max([of_outputs, *(_error(a, b) for a, b in pairs)])
            if grads:
                of_grads = max(of_grads, worst(tensor_errors(moved_grads, grads))[1])
        return (x if math.isfinite(x) else 0.0 for x in (of_outputs, of_grads))  # type: ignore[return-value]

    def _witnessed(self, outputs: list[np.ndarray]) -> list[np.ndarray] | None:
        if self.witness is None:
            return None
        found = [np.asarray(x) for x in _flatten(self.witness(self._mapped(self.leaves), *self.inputs))]
        if len(found) != len(outputs):
            raise UserError(f"the witness gives {len(found)} outputs, torch {len(outputs)}")
        return found


_Module = torch.nn.Module


def _output_row(item: str, dtype: str, a: np.ndarray, b: np.ndarray, noise: float, exact: np.ndarray | None) -> Row:
    shapes = f"shape {a.shape}"
    if a.shape != b.shape:
        note = f"JAX's shape is {a.shape}, torch's {b.shape}"
        return Row("outputs", item, dtype, math.inf, 0, False, EITHER, note)
    if not (np.issubdtype(a.dtype, np.floating) and np.issubdtype(b.dtype, np.floating)):
        differing = int((a != b).sum())
        side = _blame(a, b, exact, 0.0) if differing else ""
        return Row(
            "outputs", f"{item}, {a.dtype}: elements that differ", dtype, differing, 0, not differing, side, shapes
        )
    nan_a, nan_b = ~np.isfinite(a), ~np.isfinite(b)
    allowed = allowed_error(dtype, noise)
    if (nan_a != nan_b).any():
        note = f"not finite: {nan_a.sum()} elements in JAX, {nan_b.sum()} in torch, of {a.size}"
        side = JAX if nan_a.any() and not nan_b.any() else TORCH if nan_b.any() and not nan_a.any() else EITHER
        return Row("outputs", item, dtype, math.inf, allowed, False, side, note, noise=noise)
    note = f"{nan_a.sum()} of {a.size} elements are not finite on both sides" if nan_a.any() else shapes
    finite = lambda x: np.where(nan_a, 0.0, x)
    error = _error(finite(a), finite(b))
    ok = error <= allowed
    return Row(
        "outputs", item, dtype, error, allowed, ok, "" if ok else _blame(a, b, exact, allowed), note, noise=noise
    )


def _blame(a: np.ndarray, b: np.ndarray, exact: np.ndarray | None, allowed: float) -> str:
    if exact is None:
        return EITHER
    bad = [not _error(np.asarray(x, np.float64), np.asarray(exact, np.float64)) <= allowed for x in (a, b)]
    return "JAX and torch" if all(bad) else JAX if bad[0] else TORCH if bad[1] else EITHER


def _error(a: np.ndarray, b: np.ndarray) -> float:
    return tensor_errors({"x": a}, {"x": b})["x"]


def _direction(i: int, shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng((3, i)).standard_normal(tuple(shape))


def _flatten(x: Any) -> list[Any]:
    if isinstance(x, Mapping):
        return [y for value in x.values() for y in _flatten(value)]
    if isinstance(x, (tuple, list)):
        return [y for value in x for y in _flatten(value)]
    return [] if x is None else [x]

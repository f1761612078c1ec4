"""JAX as a side: Linen with all its collections, NNX, Equinox, Haiku, Keras, and plain functions of pytrees."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from llm_common.errors import UserError
from parity.judge import trees
from parity.judge.draws import dropout_drawn
from parity.judge.maps import Arrays
from parity.judge.sides import Call, Result, mode_arguments
from parity.judge.taps import Taps

# What a function cannot be compiled for: it asks for the values of its arguments.
UNCOMPILABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.UnexpectedTracerError,
)
NARROW = ("float32", "float16", "bfloat16")


def jax_side(model: Any, weights: Any) -> "JaxSide":
    """The side of a model. weights: of Linen and Haiku, whose modules hold none, and of plain functions."""
    name = f"{type(model).__module__}.{type(model).__name__}"
    if _is(model, "flax.linen", "Module"):
        return _linen(model, weights)
    if _is(model, "flax.nnx", "Module"):
        return _nnx(model)
    if hasattr(model, "stateless_call"):
        return _keras(model)
    if hasattr(model, "init") and hasattr(model, "apply") and hasattr(model, "_fields"):
        return _haiku(model, weights)
    if _is(model, "equinox", "Module"):
        return _equinox(model, weights if _is(weights, "equinox.nn", "State") else None)
    if weights is None:
        if jax.tree.leaves(model) and callable(model):
            return JaxSide(lambda p, s, a, k, mode: (p(*a, **k), s), model, {}, model)
        raise UserError(f"{name} is a function without weights: give (function, weights)")
    return JaxSide(lambda p, s, a, k, mode: (model(p, *a, **k, **_told(model, k, mode)), s), weights, {})


def _is(x: Any, package: str, name: str) -> bool:
    """Whether x is of a class of a package that may not be installed."""
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(x).__mro__)


def _told(function: Callable, given: Mapping[str, Any], mode: str) -> dict[str, bool]:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}
    return mode_arguments(names, given, mode)


def _linen(module: Any, variables: Any) -> "JaxSide":
    if variables is None:
        raise UserError("a Linen module does not hold its weights: give (module, module.init(key, x))")
    variables = dict(variables)
    if "params" not in variables and not any(name in variables for name in ("batch_stats", "cache")):
        variables = {"params": variables}
    state = {name: x for name, x in variables.items() if name not in ("params", "intermediates")}

    def function(params, state, args, kwargs, mode):
        told = _told(type(module).__call__, kwargs, mode)
        fields = {name for name in getattr(module, "__dataclass_fields__", {}) if getattr(module, name, 0) is not None}
        named = mode_arguments([name for name in fields if isinstance(getattr(module, name), bool)], {}, mode)
        bound = module.clone(**named) if named else module
        rngs = {"dropout": jax.random.key(0), "params": jax.random.key(1)}
        mutable = [name for name in state if mode == "train" or name == "cache"]
        if not mutable:
            return bound.apply({"params": params, **state}, *args, **kwargs, **told, rngs=rngs), state
        out, after = bound.apply({"params": params, **state}, *args, **kwargs, **told, rngs=rngs, mutable=mutable)
        return out, {**state, **after}

    return JaxSide(function, variables.get("params", {}), state, module)


def _nnx(model: Any) -> "JaxSide":
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def function(params, state, args, kwargs, mode):
        merged = nnx.merge(graph, params, state)
        merged.train() if mode == "train" else merged.eval()
        out = merged(*args, **kwargs)
        return out, nnx.split(merged, nnx.Param, ...)[2]

    return JaxSide(function, params, rest, model)


def _equinox(model: Any, state: Any) -> "JaxSide":
    import equinox as eqx

    def function(params, state, args, kwargs, mode):
        bound = eqx.nn.inference_mode(params, value=mode == "eval")
        if not jax.tree.leaves(state):
            return bound(*args, **kwargs), state
        return bound(*args, state, **kwargs)

    return JaxSide(function, model, {} if state is None else state, model)


def _haiku(transformed: Any, weights: Any) -> "JaxSide":
    if weights is None:
        raise UserError(
            "a Haiku function does not hold its weights: give (transformed, params) or (transformed, (params, state))"
        )
    stateful = type(transformed).__name__ == "TransformedWithState"
    params, state = weights if stateful else (weights, {})
    key = jax.random.key(0)

    def function(params, state, args, kwargs, mode):
        told = _told(transformed.apply, kwargs, mode)
        if stateful:
            return transformed.apply(params, state, key, *args, **kwargs, **told)
        return transformed.apply(params, key, *args, **kwargs, **told), state

    return JaxSide(function, params, state)


def _keras(model: Any) -> "JaxSide":
    import keras  # pyright: ignore[reportMissingImports]

    if keras.backend.backend() != "jax":
        raise UserError(
            f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=jax, or torch and give it as a torch module"
        )
    trained, rest = ([x.path for x in found] for found in (model.trainable_variables, model.non_trainable_variables))

    def function(params, state, args, kwargs, mode):
        values = [params[name] for name in trained], [state[name] for name in rest]
        out, after = model.stateless_call(*values, *args, **kwargs, training=mode == "train")
        return out, dict(zip(rest, after, strict=True))

    values = lambda names, found: {name: jnp.asarray(x.value) for name, x in zip(names, found, strict=True)}
    return JaxSide(
        function, values(trained, model.trainable_variables), values(rest, model.non_trainable_variables), model
    )


class JaxSide:
    """function: (params, state, args, kwargs, mode) -> (outputs, state after)."""

    framework = "JAX"

    def __init__(self, function: Callable[..., tuple[Any, Any]], params: Any, state: Any, module: Any = None) -> None:
        self.function, self.params, self.states, self.module = function, params, state, module
        self.parameters, self.state = leaves_of(params), leaves_of(state)
        self.frozen: frozenset[str] = frozenset()
        self.compiled = True
        self._programs: dict[Any, Callable] = {}
        self._paths: dict[Any, list[str]] = {}

    def run(self, parameters: Arrays, state: Arrays, call: Call) -> Result:
        with scope(call.dtype):
            program, key = self._program(call)
            arguments = _arguments(parameters, state, call)
            if self.compiled:
                try:
                    grads, (outputs, after) = self._programs.setdefault(key, jax.jit(program))(*arguments)
                except UNCOMPILABLE:
                    self.compiled = False
            if not self.compiled:
                grads, (outputs, after) = program(*arguments)
            paths = [path for path, _ in call.leaves()]
            names = self._paths[key]
            return Result(
                list(zip(names, map(to_numpy, outputs), strict=True)),
                {name: _gradient(x) for name, x in grads[0].items()} if grads else {},
                {paths[i]: _gradient(x) for i, x in grads[1].items()} if grads else {},
                {name: to_numpy(x) for name, x in after.items()},
            )

    def shapes(self, parameters: Arrays, state: Arrays, call: Call) -> list[tuple[str, tuple[int, ...]]]:
        with scope(call.dtype):
            program, key = self._program(call)
            try:
                _, (outputs, _) = jax.eval_shape(program, *_arguments(parameters, state, call))
            except UNCOMPILABLE:
                return [(path, x.shape) for path, x in self.run(parameters, state, call).outputs]
            return [(path, x.shape) for path, x in zip(self._paths[key], outputs, strict=True)]

    def narrow(self, parameters: Arrays, state: Arrays, call: Call) -> list[str]:
        with scope(call.dtype):
            program, _ = self._program(call)
            try:
                jaxpr = jax.make_jaxpr(program)(*_arguments(parameters, state, call))
            except UNCOMPILABLE:
                return []
        return sorted({name for name, dtype in _products(jaxpr.jaxpr) if dtype in NARROW and dtype != call.dtype})

    def tapped(self, parameters: Arrays, state: Arrays, call: Call, taps: Taps, names: dict[str, str]) -> Arrays:
        """A run with taps at the borders of modules, own name -> name of the tap; the gradients of the parameters."""
        compiled, self.compiled = self.compiled, False
        try:
            with jax.disable_jit(), _attached(self.module, taps, names):
                return self.run(parameters, state, call).gradients
        finally:
            self.compiled = compiled

    def _program(self, call: Call) -> tuple[Callable, Any]:
        """(parameters, inputs that are real numbers, state, other inputs) -> gradients, (outputs, state after)."""
        leaves = call.leaves()
        static = tuple((path, None if isinstance(x, (np.ndarray, np.generic)) else str(x)) for path, x in leaves)
        key = call.dtype, call.mode, static, id(call.cotangent)

        def forward(values, trained, states, rest):
            args, kwargs = call.filled({**trained, **rest})
            with dropout_drawn(call.mode, call.layout):
                outputs, after = self.function(
                    with_leaves(self.params, values), with_leaves(self.states, states), args, kwargs, call.mode
                )
            found = [
                (path_name(path), jnp.asarray(x))
                for path, x in jax.tree_util.tree_flatten_with_path(outputs)[0]
                if hasattr(x, "dtype")
            ]
            self._paths[key] = [path for path, _ in found]
            after = {name: x for name, x in leaves_of(after, convert=False).items() if name in self.state}
            total = jnp.zeros(())
            if call.cotangent is not None:
                for i, (path, x) in enumerate(found):
                    if jnp.issubdtype(x.dtype, jnp.inexact):
                        weight = jnp.asarray(call.cotangent(i, path, x.shape), x.dtype)
                        total = total + jnp.real(jnp.sum(weight * x)).astype(total.dtype)
            return total, ([x for _, x in found], after)

        def program(values, trained, states, rest):
            if call.cotangent is None:
                return None, forward(values, trained, states, rest)[1]
            differentiated = jax.grad(forward, argnums=(0, 1), has_aux=True, allow_int=True)
            grads, aux = differentiated(values, trained, states, rest)
            return grads, aux

        return program, key


@contextlib.contextmanager
def _attached(module: Any, taps: Taps, names: dict[str, str]) -> Iterator[None]:
    """Taps on the Linen modules that run, or on the classes of any other module that `module` is made of."""

    def run(name: str, f: Callable, args: tuple, kwargs: dict) -> Any:
        point = names.get(name)
        if point is None:
            return f(*args, **kwargs)
        if taps.enters(point) and args:
            args = (_tap(args[0], taps, (point, "in")), *args[1:])
        out = f(*args, **kwargs)
        if not taps.ends(point):
            return out
        return (
            (_tap(out[0], taps, (point, "out")), *out[1:])
            if isinstance(out, tuple)
            else _tap(out, taps, (point, "out"))
        )

    with contextlib.ExitStack() as stack:
        if _is(module, "flax.linen", "Module"):
            import flax.linen as nn

            def intercept(next_fun, args, kwargs, context):
                if context.method_name != "__call__":
                    return next_fun(*args, **kwargs)
                return run(".".join(context.module.path), next_fun, args, kwargs)

            stack.enter_context(nn.intercept_methods(intercept))
        elif module is not None:
            table: dict[int, str] = {}

            def wrapped(call):
                def wrapper(self, *args, **kwargs):
                    if id(self) not in table:  # an outermost call: its parts get their paths
                        table.update({key: name for key, (name, _) in _paths(self).items()})
                    return run(table[id(self)], lambda *a, **k: call(self, *a, **k), args, kwargs)

                return wrapper

            for cls in {type(x) for _, x in _paths(module).values() if "__call__" in dir(type(x))}:
                stack.enter_context(mock.patch.object(cls, "__call__", wrapped(cls.__call__)))
        yield


def _paths(root: Any, prefix: str = "", found: dict[int, tuple[str, Any]] | None = None) -> dict[int, tuple[str, Any]]:
    """id -> (path, module) of a module and the modules in its attributes, lists and dicts."""
    found = {} if found is None else found
    if isinstance(root, (list, tuple)) or type(root).__name__ == "List":
        items: Any = enumerate(root)
    elif isinstance(root, Mapping):
        items = root.items()
    elif hasattr(root, "__dict__") and callable(root) and not isinstance(root, (type, np.ndarray, jax.Array)):
        package = type(root).__module__.split(".")[0]
        if package not in ("builtins", "jax", "jaxlib", "numpy") and not _is(root, "flax.nnx", "Variable"):
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


def _tap(x: Any, taps: Taps, key: tuple[str, str]) -> Any:
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    value = taps.instead(taps.given, key, tuple(x.shape))

    @jax.custom_vjp
    def tapped(x):
        taps.store(taps.forward, key, trees.exact(x))
        return x if value is None else jnp.asarray(value, x.dtype)

    def backward(_, arriving):
        taps.store(taps.backward, key, trees.exact(arriving))
        back = taps.instead(taps.given_back, key, tuple(arriving.shape))
        return (arriving if back is None else jnp.asarray(back, arriving.dtype),)

    tapped.defvjp(lambda x: (tapped(x), None), backward)
    return tapped(x)


def scope(dtype: str):
    """float64 exists in JAX where x64 is on; everything runs on the CPU in full precision."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.enable_x64(dtype == "float64"))
    stack.enter_context(jax.default_matmul_precision("highest"))
    stack.enter_context(jax.default_device(jax.devices("cpu")[0]))
    return stack


def leaves_of(tree: Any, convert: bool = True) -> dict[str, Any]:
    """Path -> array of every leaf of real or complex numbers, in the order in which they were made where a dict keeps
    it.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact):
            found[path_name(path)] = trees.exact(leaf) if convert else leaf
    order = {name: i for i, name in enumerate(_insertion_order(tree))}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _insertion_order(tree: Any, path: tuple[str, ...] = ()) -> list[str]:
    """Paths of a nest of dicts, in their own order; those that were sorted on the way, by their numbers."""
    if not isinstance(tree, Mapping):
        return [".".join(path)]
    keys = list(tree)
    if keys == sorted(keys, key=str):
        keys.sort(key=lambda key: [int(x) if x.isdigit() else 0 for x in str(key).rsplit("_", 1)[-1:]])
    return [name for key in keys for name in _insertion_order(tree[key], (*path, str(key)))]


def path_name(path: tuple) -> str:
    parts = []
    for key in path:
        part = next((getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a)), key)
        parts.append(str(part).strip("."))
    while len(parts) > 1 and parts[-1] in ("value", "raw_value"):  # NNX keeps a leaf in a variable
        parts.pop()
    return ".".join(parts)


def with_leaves(tree: Any, values: Mapping[str, Any]) -> Any:
    """The pytree with other leaves in the places of their names."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: values.get(path_name(path), leaf), tree)


def to_numpy(x: Any) -> np.ndarray:
    return trees.exact(x)


def _gradient(x: Any) -> np.ndarray:
    """torch's gradient of a complex number is the conjugate of JAX's."""
    x = trees.exact(x)
    return np.conj(x) if np.iscomplexobj(x) else x


def _cast(x: np.ndarray, dtype: str) -> jax.Array:
    if trees.is_complex(x):
        return jnp.asarray(x, jnp.complex128 if dtype == "float64" else jnp.complex64)
    return jnp.asarray(x, jnp.dtype(dtype)) if trees.is_float(x) else jnp.asarray(x)


def _arguments(parameters: Arrays, state: Arrays, call: Call) -> tuple[Any, ...]:
    """Parameters, inputs that are real numbers, state and other inputs, as the programs take them."""
    cast = lambda found: {name: _cast(x, call.dtype) for name, x in found.items()}
    arrays = {i: _cast(x, call.dtype) for i, x in call.arrays().items()}
    trained = {i: x for i, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    return cast(parameters), trained, cast(state), {i: x for i, x in arrays.items() if i not in trained}


def _products(jaxpr: Any) -> list[tuple[str, str]]:
    """(operation, dtype) of all that a program makes of more than one number, also inside of loops and calls."""
    found = []
    for eqn in jaxpr.eqns:
        found += [
            (eqn.primitive.name, str(x.aval.dtype))
            for x in eqn.outvars
            if hasattr(x.aval, "dtype") and getattr(x.aval, "size", 0) > 1
        ]
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += _products(inner)
    return found

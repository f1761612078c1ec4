"""The functions between the modules that the trace judges as points of their own. Each is declared here, once.

Taps, the names in verdicts, and the dtypes at a point's border follow from the declaration. What the specification has
at the point stands in `parity.trace.points`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Op:
    """A function that a model is given as a kernel, or that a lesson file calls by its name."""

    calls: tuple[str, ...]  # the names of its calls within one module, in their order: the last part of a point's name
    inputs: tuple[str, ...]  # its first arguments, those that are tensors of interest
    kernel: str = ""  # its field of `Kernels`, or
    caller: str = ""  # the lesson file that calls it
    function: str = ""  # by this name
    wide: tuple[str, ...] = ()  # inputs, or "out", that are float32 whatever the dtype of the computation


OPS = (
    Op(
        ("apply_rope(q)", "apply_rope(k)"),
        ("q", "cos", "sin"),
        caller="attention",
        function="apply_rope",
        wide=("cos", "sin"),
    ),
    Op(("attention",), ("q", "k", "v"), kernel="attention"),
    Op(("swiglu",), ("gate", "up"), kernel="activation"),
    Op(("loss",), ("logits",), caller="model", function="cross_entropy", wide=("out",)),
)
KERNELS = tuple(op for op in OPS if op.kernel)
FUNCTIONS = tuple(op for op in OPS if op.function)
_BY_CALL = {call: op for op in OPS for call in op.calls}


def op_of(point: str) -> Op | None:
    """The function that a point is a call of, or None: a module."""
    return _BY_CALL.get(point.rsplit(".", 1)[-1])


def input_name(point: str, i: int) -> str:
    """What the i-th input of a point is called; a module has one, x."""
    op = op_of(point)
    return "x" if op is None else op.inputs[i]


def is_wide(point: str, which: str) -> bool:
    """Whether a tensor of a point, "in0", "in1", ... or "out", is float32 in a computation of a lower precision."""
    op = op_of(point)
    return op is not None and ("out" if which == "out" else op.inputs[int(which.removeprefix("in"))]) in op.wide

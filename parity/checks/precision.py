"""Precision, op by op: whole-model errors in bfloat16 cannot see a softmax made in bfloat16 (1.05 to 1.2 times).

Given identical rounded inputs, an op that computes in float32 and rounds once gives nearly the same bits on both sides.
And a table declares which ops must run in float32 inside; both sides are watched while they run.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jax_llm.attention
import jax_llm.fast.chunked_loss
import jax_llm.layers
import jax_llm.loss
import jax_llm.optim
import jax_llm.rope
import torch_llm.attention
import torch_llm.fast.chunked_loss
import torch_llm.layers
import torch_llm.loss
import torch_llm.optim
import torch_llm.rope
from parity import spec
from parity.checks.borders import accumulator_row, border_rows, generating_row, optimizer_row
from parity.core.compare import Row, round_to, spacing, verdict
from parity.core.inputs import families, random_batch, random_weights
from parity.core.jaxprs import equations
from parity.sides.settings import Settings

# Share of elements that may differ from the specification rounded where the algorithm rounds: float32 sums in another
# order move 1e-7 of a value, so 1e-7 / 4e-3 of the elements cross a bfloat16 border; measured over 300 seeds: at most
# 1.8e-3, where rounded probabilities are summed. A softmax in bfloat16 changes about half of the elements.
DIFFERING_ALLOWED = 0.005
# By how many ulps they may differ. An op that rounds inside (the norm before its gain, the probabilities before v)
# passes on a neighbouring inner value times a factor, which is worth up to two ulps of the result. An ulp is that of
# the terms' sum of magnitudes where there is a sum: terms that cancel leave their rounding behind.
ULPS_ALLOWED = {"rms_norm": 2.0, "attention": 2.0, "chunked head gradient": 2.0}
# float32: ||op - spec|| / ||spec|| in units of u = 2^-24. A sum over n = 32 terms and some ten operations after it;
# measured over 300 seeds: at most 6 (the loss, where a large logit cancels); an op that rounds to bfloat16 inside shows
# 2^15.
FLOAT32_UNITS = 16.0


def op_inputs(seed: int, dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, 7))
    draw = lambda scale, *shape: round_to(scale * rng.standard_normal(shape), dtype)
    return {
        "x": draw(3.0, 4, 65, 32),
        "gain": round_to(1.0 + 0.25 * rng.standard_normal(32), dtype),
        "gate": draw(2.0, 4, 65, 48),
        "up": draw(1.0, 4, 65, 48),
        "q": draw(2.0, 4, 33, 4, 16),
        "k": draw(2.0, 4, 33, 2, 16),
        "v": draw(1.0, 4, 33, 2, 16),
        "logits": draw(4.0, 4, 65, 96),
        # quarters, so that the logits of the chunked loss are exact in any order: one that is rounded the other way
        # would change a whole row of the head's gradient
        "quarters": rng.integers(-2, 3, (4, 65, 32)) / 4.0,
        "head": rng.integers(-1, 2, (96, 32)) / 4.0,
    }


ANGLES = np.outer(np.arange(33), 100.0 ** (-np.arange(8) / 8.0))
EPS_NORM = 1e-5


def _spec_ops(i: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The ops in float64, rounded exactly where the algorithm rounds."""
    rnd = lambda x: round_to(x, dtype)
    k, v = np.repeat(i["k"], 2, axis=2), np.repeat(i["v"], 2, axis=2)
    ones = np.ones_like(i["gain"])
    log_probs = np.log(spec.softmax(i["logits"]))
    targets = _targets(i)
    return {
        "rms_norm": rnd(rnd(spec.rms_norm(i["x"], ones, EPS_NORM)) * i["gain"]),
        "apply_rope": rnd(spec.rotate(i["q"], ANGLES)),
        "swiglu": rnd(spec.silu(i["gate"]) * i["up"]),
        "attention": rnd(np.einsum("bnts,bsnh->btnh", rnd(spec.attention_weights(i["q"], k)), v)),
        "cross_entropy": -np.take_along_axis(log_probs, targets[..., None], axis=-1).mean(),
        "embedding": i["x"].reshape(-1, 32)[targets],
        "embedding gradient": rnd(_scatter(i["x"], targets)),
        "chunked head gradient": rnd(sum(rnd(d.T @ x) for d, x in _chunks(i, rnd))),
    }


CHUNKS = 5  # of 65 positions


def _chunks(i: dict[str, np.ndarray], rnd: Callable[[np.ndarray], np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradient of a loss for the logits (n, V) of each chunk of positions, and what they are made of (n, D)."""
    targets, found = _targets(i), []
    for x, wanted in zip(np.split(i["quarters"], CHUNKS, axis=1), np.split(targets, CHUNKS, axis=1), strict=True):
        hot = np.eye(96)[wanted]
        d = rnd((spec.softmax(rnd(x @ i["head"].T)) - hot) / targets.size)
        found.append((d.reshape(-1, 96), x.reshape(-1, 32)))
    return found


def _targets(i: dict[str, np.ndarray]) -> np.ndarray:
    return np.arange(i["logits"].size // 96).reshape(4, 65) % 5  # five ids, each many times


def _scatter(cotangent: np.ndarray, ids: np.ndarray) -> np.ndarray:
    table = np.zeros((260, 32))
    np.add.at(table, ids, cotangent)
    return table


def ops_in_jax(i: dict[str, np.ndarray], dtype: str) -> dict[str, Callable[[], Any]]:
    a = {name: jnp.array(x, jnp.dtype(dtype)) for name, x in i.items()}
    table_dtype = jnp.promote_types(jnp.dtype(dtype), jnp.float32)
    cos, sin = jnp.array(np.cos(ANGLES), table_dtype), jnp.array(np.sin(ANGLES), table_dtype)
    targets = jnp.array(_targets(i))
    layers, rows = jax_llm.layers, a["x"].reshape(-1, 32)
    return {
        "rms_norm": lambda: layers.rms_norm(a["x"], a["gain"], EPS_NORM),
        "apply_rope": lambda: jax_llm.rope.apply_rope(a["q"], cos, sin),
        "swiglu": lambda: layers.swiglu(a["gate"], a["up"]),
        "attention": lambda: jax_llm.attention.reference_attention(a["q"], a["k"], a["v"]),
        "cross_entropy": lambda: jax_llm.loss.cross_entropy(a["logits"], targets),
        "embedding": lambda: layers.embedding(targets, rows),
        "embedding gradient": lambda: jax.vjp(lambda w: layers.embedding(targets, w), rows)[1](a["x"])[0],
        "chunked head gradient": lambda: jax.grad(
            lambda w: jax_llm.fast.chunked_loss.chunked_cross_entropy(
                a["quarters"], w, targets, jnp.array(targets.size), CHUNKS
            )
        )(a["head"]),
    }


def ops_in_torch(i: dict[str, np.ndarray], dtype: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    a = {name: torch.tensor(x, device=device).to(getattr(torch, dtype)) for name, x in i.items()}
    table_dtype = torch.promote_types(getattr(torch, dtype), torch.float32)
    cos, sin = (torch.tensor(f(ANGLES), device=device).to(table_dtype) for f in (np.cos, np.sin))
    targets = torch.tensor(_targets(i), device=device)
    layers, rows = torch_llm.layers, a["x"].reshape(-1, 32)

    def embedding_gradient():
        table = rows.clone().requires_grad_()
        return torch.autograd.grad(layers.embedding(targets, table), table, a["x"])[0]

    def chunked_head_gradient():
        head, count = a["head"].clone().requires_grad_(), torch.tensor(targets.numel(), device=device)
        loss = torch_llm.fast.chunked_loss.chunked_cross_entropy(a["quarters"], head, targets, count, CHUNKS)
        return torch.autograd.grad(loss, head)[0]

    return {
        "rms_norm": lambda: layers.rms_norm(a["x"], a["gain"], EPS_NORM),
        "apply_rope": lambda: torch_llm.rope.apply_rope(a["q"], cos, sin),
        "swiglu": lambda: layers.swiglu(a["gate"], a["up"]),
        "attention": lambda: torch_llm.attention.reference_attention(a["q"], a["k"], a["v"]),
        "cross_entropy": lambda: torch_llm.loss.cross_entropy(a["logits"], targets),
        "embedding": lambda: layers.embedding(targets, rows),
        "embedding gradient": embedding_gradient,
        "chunked head gradient": chunked_head_gradient,
    }


def results_of_ops(
    s: Settings, inputs: dict[str, np.ndarray], dtype: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What every op of JAX and of torch gives for the same inputs, as float64."""
    jax_side, torch_side = s.sides(dtype)
    with jax_side.scope():
        of_jax = {n: np.asarray(f().astype(jnp.float32), np.float64) for n, f in ops_in_jax(inputs, dtype).items()}
    torch_ops = ops_in_torch(inputs, dtype, torch_side.device)
    with torch_side.scope():
        return of_jax, {name: op().double().cpu().numpy() for name, op in torch_ops.items()}


def check_precision(s: Settings) -> Iterator[Row]:
    """Every reference op on identical rounded inputs, and the declared dtypes inside them."""
    for dtype in [d for d in ("float32", "bfloat16") if d in s.dtypes]:
        inputs = op_inputs(s.seed, dtype)
        expected = _spec_ops(inputs, dtype)
        # eager on purpose: a fused JAX program may drop a rounding in the middle
        jax_results, torch_results = results_of_ops(s, inputs, dtype)
        magnitudes = _summed_magnitudes(inputs)
        for name, exact in expected.items():
            yield _op_row(name, dtype, jax_results[name], torch_results[name], exact, magnitudes.get(name))
    if "bfloat16" in s.dtypes:
        others = families(dataclasses.replace(s.cfg, num_hidden_layers=1, tie_word_embeddings=True))
        names = ("Qwen2: biases", "Qwen3: norms of q and k")  # windows and tables have rows of their own
        for name in names[1:] if s.quick else names:
            yield from border_rows(s, others[name], f"{name}, tied", DIFFERING_ALLOWED)
    for dtype in [d for d in ("bfloat16", "float64") if d in s.dtypes]:
        yield _table_row(s, dtype)
        yield from _dtype_rows(s, dtype)
    if "bfloat16" in s.dtypes:  # after the moments' own dtypes, in which it reads what is summed
        yield accumulator_row(s, "bfloat16")
        for micro_batches in (1,) if s.quick else (1, 2):
            yield optimizer_row(s, "bfloat16", micro_batches)
        yield optimizer_row(s, "bfloat16", 1, compiled=True)
        yield generating_row(s, "bfloat16")


def _op_row(
    name: str, dtype: str, jax_x: np.ndarray, torch_x: np.ndarray, exact: np.ndarray, magnitudes: np.ndarray | None
) -> Row:
    if dtype == "bfloat16" and exact.ndim:
        ulp = spacing(np.abs(exact) if magnitudes is None else magnitudes, dtype) * ULPS_ALLOWED.get(name, 1.0)
        shares = [_differing(x, exact, ulp) for x in (jax_x, torch_x)]
        pair = _differing(jax_x, torch_x, 2 * ulp)  # one may lie above the exact result and the other below
        item, allowed = f"{name}: share of elements that differ", DIFFERING_ALLOWED
    else:
        shares = [_units(x, exact) for x in (jax_x, torch_x)]
        pair = _units(jax_x, torch_x) / 2
        item, allowed = f"{name}: error in units of 2^-24", FLOAT32_UNITS
    side = verdict(not shares[0] <= allowed, not shares[1] <= allowed, pair <= allowed)
    return Row("precision", item, dtype, max(*shares, pair), allowed, not side, side, place=name if side else "")


def _summed_magnitudes(i: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For the ops whose result is a sum: the sum of its terms' magnitudes."""
    probs = spec.attention_weights(i["q"], np.repeat(i["k"], 2, axis=2))
    half = ANGLES.shape[1]
    a, b = np.abs(i["q"][..., :half]), np.abs(i["q"][..., half:])
    cos, sin = np.abs(np.cos(ANGLES))[:, None, :], np.abs(np.sin(ANGLES))[:, None, :]
    return {
        "apply_rope": np.concatenate([a * cos + b * sin, b * cos + a * sin], axis=-1),
        "attention": np.einsum("bnts,bsnh->btnh", probs, np.abs(np.repeat(i["v"], 2, axis=2))),
        "embedding gradient": _scatter(np.abs(i["x"]), _targets(i)),
        "chunked head gradient": np.sum([np.abs(d).T @ np.abs(x) for d, x in _chunks(i, lambda x: x)], axis=0),
    }


def _differing(a: np.ndarray, b: np.ndarray, allowed: np.ndarray) -> float:
    """Share of elements that differ; all of them if one differs by more than is allowed for it."""
    if a.shape != b.shape or not np.isfinite(a).all():
        return math.inf
    return 1.0 if (np.abs(a - b) > allowed).any() else float((a != b).mean())


def _units(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.linalg.norm(np.asarray(a - b)) / max(float(np.linalg.norm(b)), 1e-300)) * 2.0**24
    return error if math.isfinite(error) else math.inf


# What counts in a table is the turn from one position to the next: that is the same whatever position comes first. It
# is made of four entries, each off by half an ulp: in float32 by 2^-23 together, here twice that. In float64 the angle
# t f itself is rounded, so that T positions add T ulps. A table made or kept in bfloat16 is off by 2e-3.
def _table_allowed(dtype: str, length: int) -> float:
    return 2.0**-22 if dtype == "bfloat16" else 2.0**-52 * (4 + length)


def _table_row(s: Settings, dtype: str) -> Row:
    """The rotary table that the whole model hands to `apply_rope`, however it came by it."""
    cfg = dataclasses.replace(s.cfg, num_hidden_layers=1)
    ids, _ = random_batch(cfg, s.seed, 1, s.length)
    weights = random_weights(cfg, s.seed, dtype)
    step = np.exp(1j * spec.rope_angles(cfg, 2)[1])  # (H/2,)
    errors = []
    for module, side in zip((jax_llm.attention, torch_llm.attention), s.sides(dtype, cfg), strict=True):
        tables: list[Any] = []
        original = module.apply_rope

        def spy(x, cos, sin, original=original, tables=tables):
            tables.append((cos, sin))
            return original(x, cos, sin)

        with mock.patch.object(module, "apply_rope", spy):
            side.uncompiled_logits(weights, ids)
        worst = 0.0
        for pair in tables:
            cos, sin = (
                np.asarray(x.double().cpu() if isinstance(x, torch.Tensor) else x).astype(np.float64) for x in pair
            )
            turn = cos + 1j * sin  # (T, H/2)
            worst = max(worst, float(np.abs(np.abs(turn) - 1.0).max()))
            worst = max(worst, float(np.abs(turn[1:] * turn[:-1].conj() - step).max(initial=0.0)))
        errors.append(worst)
    allowed = _table_allowed(dtype, ids.shape[1])
    side = verdict(errors[0] > allowed, errors[1] > allowed, errors[0] == errors[1])
    item, place = "rotary table: turn from position to position", "rotary table" if side else ""
    return Row("precision", item, dtype, max(errors), allowed, not side, side, place=place)


# --- the declared table: (what, op, JAX primitives, torch operators)
# Where one of them occurs, its inputs have that dtype.
# One that does not occur is unknown, not wrong: there are other spellings, and the figures above judge the result.
DECLARED = (
    ("norm statistics", "rms_norm", "rsqrt sqrt", "aten.rsqrt aten.sqrt aten.pow"),
    ("norm mean", "rms_norm", "reduce_sum", "aten.mean aten.sum"),
    ("rotation", "apply_rope", "mul", "aten.mul"),
    ("SwiGLU", "swiglu", "mul logistic", "aten.mul aten.silu"),
    ("softmax", "attention", "exp", "aten._softmax aten.exp"),
    ("loss", "cross_entropy", "exp log", "aten._log_softmax aten.logsumexp aten.exp"),
    (
        "sums of embedding gradients",
        "embedding gradient",
        "scatter-add",
        "aten.embedding_dense_backward aten.index_put",
    ),
)


def _dtype_rows(s: Settings, dtype: str) -> Iterator[Row]:
    inputs = op_inputs(s.seed, dtype)
    wide = "float64" if dtype == "float64" else "float32"
    with jax.enable_x64(dtype == "float64"):
        jax_ops = {name: _jaxpr_dtypes(op) for name, op in ops_in_jax(inputs, dtype).items()}
    torch_ops = {name: _dispatched_dtypes(op) for name, op in ops_in_torch(inputs, dtype, torch.device("cpu")).items()}
    found: list[tuple[str, set[str], set[str]]] = [
        (what, _dtypes_of(primitives, jax_ops[op]), _dtypes_of(operators, torch_ops[op]))
        for what, op, primitives, operators in DECLARED
    ]
    # scores: the products q k^T, which are the first matrix product of attention
    scores = [{ops["attention"]["first product"]} for ops in (jax_ops, torch_ops)]
    found.append(("attention scores", scores[0], scores[1]))
    found.append(("moments", *_moment_dtypes(dtype, wide)))
    wrong = [[what for what, *dtypes in found if dtypes[k] - {wide}] for k in (0, 1)]
    side = verdict(bool(wrong[0]), bool(wrong[1]), wrong[0] == wrong[1])
    note = "; ".join(f"{label}: {', '.join(w)}" for label, w in zip(("JAX", "torch"), wrong, strict=True) if w)
    item = f"ops not in {wide} of {len(found)} declared"
    place = (wrong[0] or wrong[1] or [""])[0]
    yield Row("precision", item, dtype, max(len(w) for w in wrong), 0, not side, side, note, place)


def _dtypes_of(names: str, found: dict[str, Any]) -> set[str]:
    return set().union(*(found.get(name, set()) for name in names.split()))


def _jaxpr_dtypes(op: Callable[[], Any]) -> dict[str, Any]:
    """Primitive -> dtypes of its floating inputs, over the whole traced program; plus the first product's."""
    found: dict[str, Any] = {}

    for equation in equations(jax.make_jaxpr(op)().jaxpr):
        dtypes = {str(v.aval.dtype) for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)}
        if dtypes:
            found.setdefault(equation.primitive.name, set()).update(dtypes)
        if equation.primitive.name == "dot_general":
            found.setdefault("first product", str(equation.outvars[0].aval.dtype))
    return found


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        dtypes = {
            str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()
        }
        if dtypes:
            self.found.setdefault(name, set()).update(dtypes)
        if name in ("aten.bmm", "aten.mm") and isinstance(result, torch.Tensor):
            self.found.setdefault("first product", str(result.dtype).removeprefix("torch."))
        return result


def _dispatched_dtypes(op: Callable[[], Any]) -> dict[str, Any]:
    with _Recorder() as recorder:
        op()
    return recorder.found


def _moment_dtypes(dtype: str, master: str) -> tuple[set[str], set[str]]:
    """The dtypes of Adam's moments, and in torch of the master weights, which are its optimizer's, for parameters of a
    dtype.
    """
    with jax.enable_x64(master == "float64"):
        params = {"w": jnp.ones((2, 2), jnp.dtype(master))}
        state = jax_llm.optim.adamw(0.9, 0.95, 1e-8, 0.1).init(params)
        jax_dtypes = {str(x.dtype) for x in jax.tree.leaves(state)}
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=getattr(torch, dtype)))
    optimizer = torch_llm.optim.AdamW([p], 1e-3, (0.9, 0.95), 1e-8, 0.1)
    return jax_dtypes, {str(x.dtype).removeprefix("torch.") for x in (*optimizer.moments(p), optimizer.master(p))}

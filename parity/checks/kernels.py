"""Every kernel that a run may be given in the place of a plain function, against that function: the same weights and
batch.

`REPLACEMENTS` declares each by its field of `Kernels`. A test holds it against the packages `fast`, so that none is
forgotten.
"""

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from jax_llm import model as jax_model
from jax_llm.attention import reference_attention
from jax_llm.documents import DocumentPlaces as JaxDocumentPlaces
from jax_llm.engine.train import compiler_options
from jax_llm.fast import kernels as jax_kernels
from jax_llm.fast import products as jax_products
from jax_llm.fast.attention import FusedAttention
from jax_llm.fast.chunked_loss import ChunkedLoss as JaxChunkedLoss
from jax_llm.fast.layers import Layers
from llm_common.config import ExecutionConfig
from parity.checks.model import FLOAT64_ALLOWED
from parity.checks.noise import ceiling
from parity.core.compare import JAX, TORCH, Row, Side, Tensors, tensor_error, tensor_errors, worst
from parity.core.inputs import families, random_batch, random_weights
from parity.sides.settings import Settings
from torch_llm import model as torch_model
from torch_llm.attention import reference_attention as torch_reference_attention
from torch_llm.documents import DocumentPlaces as TorchDocumentPlaces
from torch_llm.fast import kernels as torch_kernels
from torch_llm.fast import products as torch_products
from torch_llm.fast.attention import BlockPlaces, block_mask, fused_attention
from torch_llm.fast.chunked_loss import ChunkedLoss as TorchChunkedLoss
from torch_llm.fast.layers import Remat
from torch_llm.fast.optim import sums_at_once


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A kernel, and how near the plain function's results it must come."""

    side: Side
    kernels: dict[str, Callable[..., Any]]  # by field
    name: str
    bits: bool = False  # the same bits; otherwise float64's bound, or in float32 the ceiling of one ulp everywhere
    dtype: str = "float64"
    fused: bool = False  # for weights that lie side by side; judged on the logits


def chunks_of(length: int) -> int:
    """A number of parts that divides a length."""
    return next((n for n in (3, 4, 2, 5, 7, 13) if length % n == 0), length)


def replacements(length: int) -> tuple[Replacement, ...]:
    """All of them, for sequences of a length."""
    n = chunks_of(length)
    return (
        Replacement(JAX, {"linear": jax_products.flat_linear}, "flat_linear"),
        Replacement(JAX, {"gate_up": jax_products.separated_gate_up}, "separated_gate_up"),
        Replacement(JAX, {"attention": FusedAttention("xla")}, "FusedAttention(xla)", dtype="float32"),
        Replacement(JAX, {"layers": Layers(remat="full")}, "Layers(remat full)"),
        Replacement(JAX, {"layers": Layers(remat="dots")}, "Layers(remat dots)"),
        Replacement(JAX, {"layers": Layers(scan=True)}, "Layers(scan)"),
        Replacement(JAX, {"loss": JaxChunkedLoss(n)}, f"ChunkedLoss({n})"),
        Replacement(
            JAX, {"qkv": jax_products.fused_qkv, "gate_up": jax_products.fused_gate_up}, "fused projections", fused=True
        ),
        Replacement(TORCH, {"embedding": torch_products.lean_embedding}, "lean_embedding", bits=True),
        Replacement(TORCH, {"attention": fused_attention}, "fused_attention"),
        Replacement(TORCH, {"layer": Remat("full")}, "Remat(full)", bits=True),
        Replacement(TORCH, {"layer": Remat("dots")}, "Remat(dots)", bits=True),
        Replacement(TORCH, {"loss": TorchChunkedLoss(n)}, f"ChunkedLoss({n})"),
        Replacement(
            TORCH,
            {"qkv": torch_products.fused_qkv, "gate_up": torch_products.fused_gate_up},
            "fused projections",
            fused=True,
        ),
    )


# Settings of a run, and the kernels that they put in the place of what a run without them has.
ASKED: dict[Side, tuple[tuple[dict[str, Any], dict[str, Any]], ...]] = {
    JAX: (
        ({}, {}),
        ({"attention": "xla"}, {"attention": FusedAttention("xla")}),
        (
            {"attention": "cudnn"},
            {"attention": FusedAttention("cudnn"), "gate_up": jax_products.separated_gate_up},
        ),
        ({"remat": "full"}, {"layers": Layers("full")}),
        ({"remat": "dots", "scan_layers": True}, {"layers": Layers("dots", True)}),
        ({"scan_layers": True}, {"layers": Layers(scan=True)}),
        ({"loss_chunks": 3}, {"loss": JaxChunkedLoss(3)}),
        ({"separator": (3, 0)}, {"places": JaxDocumentPlaces((3, 0))}),
        ({"separator": 0}, {"places": JaxDocumentPlaces(0)}),
        ({"fused_projections": True}, {"qkv": jax_products.fused_qkv, "gate_up": jax_products.fused_gate_up}),
    ),
    TORCH: (
        ({}, {}),
        ({"attention": "sdpa"}, {"attention": fused_attention}),
        ({"remat": "full"}, {"layer": Remat("full")}),
        ({"remat": "dots"}, {"layer": Remat("dots")}),
        ({"loss_chunks": 3}, {"loss": TorchChunkedLoss(3)}),
        ({"separator": (3, 0)}, {"places": TorchDocumentPlaces((3, 0))}),
        ({"separator": 0}, {"places": TorchDocumentPlaces(0)}),
        ({"block_masks": True}, {"places": BlockPlaces(torch_model.PLAIN.places)}),
        ({"block_masks": True, "separator": 4}, {"places": BlockPlaces(TorchDocumentPlaces(4))}),
    ),
}


def _asked() -> Iterator[Row]:
    """That a run which asks for a kernel has it: another one would give the same numbers."""
    always = {JAX: {"linear": jax_products.flat_linear}, TORCH: {"embedding": torch_products.lean_embedding}}
    plain = {JAX: jax_model.PLAIN, TORCH: torch_model.PLAIN}
    make = {JAX: jax_kernels.make_kernels, TORCH: torch_kernels.make_kernels}
    for side, cases in ASKED.items():
        wrong = []
        for settings, wanted in cases:
            found, expected = make[side](**settings), dataclasses.replace(plain[side], **always[side] | wanted)
            fields = [f.name for f in dataclasses.fields(found)]
            wrong += [f"{settings}: {name}" for name in fields if getattr(found, name) != getattr(expected, name)]
        item = f"{side}, kernels that are not what the settings ask for"
        yield _of_side(side, item, "", len(wrong), 0, "make_kernels", "; ".join(wrong[:3]))


def _options() -> Row:
    """What the compiler is told for a run that is to give the same bits every time, on each platform."""
    wanted = {("gpu", True): {"xla_gpu_deterministic_ops": True}}
    cases = itertools.product(("cpu", "gpu", "tpu"), (False, True))
    execution = ExecutionConfig()
    wrong = sum(
        compiler_options(dataclasses.replace(execution, deterministic=same), platform) != wanted.get((platform, same))
        for platform, same in cases
    )
    return _of_side(
        JAX, "JAX, options of the compiler that are not what is asked for", "", wrong, 0, "compiler_options"
    )


def _norms_at_once(s: Settings) -> Row:
    """The squares of many bfloat16 gradients, summed by the kernel that a GPU takes, against float64."""
    rng = np.random.default_rng((s.seed, 41))
    grads = [torch.tensor(rng.standard_normal(shape)).to(torch.bfloat16) for shape in ((300,), (20, 17), (1,))]
    found = sums_at_once(grads).double().numpy()
    exact = np.array([float(g.double().square().sum()) for g in grads])
    error = float(np.abs(found / exact - 1.0).max())
    # a root and a square of a float32 sum, whose roundings of 2^-24 go both ways; in bfloat16 one is 2^-9
    allowed = 2.0**-19
    item = "torch, sums of squares: many tensors at once against float64"
    return _of_side(TORCH, item, "bfloat16", error, allowed, "sums_of_squares")


def _used(s: Settings) -> Iterator[Row]:
    """That a model calls every function that it is handed, as often as it has places for it: a family that brings its
    own norm or product has it everywhere.
    """
    own = families(s.cfg)["Qwen3: norms of q and k"]
    n = own.num_hidden_layers
    wanted = {"embedding": 1, "linear": 7 * n + 1, "norm": 4 * n + 1}
    wanted |= dict.fromkeys(("activation", "attention", "qkv", "gate_up"), n)
    ids, targets = random_batch(own, s.seed, 1, min(3, s.length))
    for name, plain in ((JAX, jax_model.PLAIN), (TORCH, torch_model.PLAIN)):
        calls: Counter[str] = Counter()
        counted = {field: _counting(getattr(plain, field), calls, field) for field in (*wanted, "places")}
        side = s.sides("float32", own)[name == TORCH]
        kernels: Any = dataclasses.replace(plain, **counted)
        side.results(random_weights(own, s.seed, "float32"), ids, targets, kernels)
        # the model runs, or is traced, more than once: for the logits and for the loss
        runs = max(1, calls["embedding"])
        wrong = [f"{field} {calls[field]}" for field, times in wanted.items() if calls[field] != times * runs]
        wrong += [] if calls["places"] else ["places 0"]
        item = f"{name}, kernels that are called otherwise than a model has places for them"
        yield _of_side(name, item, "float32", len(wrong), 0, "CausalLM (kernels)", "; ".join(wrong))


def _counting(kernel: Callable[..., Any], calls: Counter[str], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return kernel(*args, **kwargs)

    return call


def check_kernels(s: Settings) -> Iterator[Row]:
    """Loss, gradients and logits with one kernel replaced, against the plain model of the same side."""
    yield from _asked()
    yield _options()
    yield _norms_at_once(s)
    yield from _used(s)
    yield from _windows(s)
    weights = random_weights(s.cfg, s.seed)
    ids, targets = random_batch(s.cfg, s.seed, s.batch, s.length)
    ids %= 3  # each of them often, so that the embedding's gradients are sums
    plain: dict[tuple[str, str], Tensors] = {}
    for one in replacements(ids.shape[1]):
        # what rounds as the plain function does must do so where rounding shows
        for dtype in (one.dtype, "bfloat16") if one.bits else (one.dtype,):
            if dtype not in s.dtypes:
                continue
            side = s.sides(dtype)[one.side == TORCH]
            base = {JAX: jax_model.PLAIN, TORCH: torch_model.PLAIN}[one.side]
            if (one.side, dtype) not in plain:
                plain[one.side, dtype] = side.results(weights, ids, targets, base)
            expected = plain[one.side, dtype]
            found = side.results(weights, ids, targets, dataclasses.replace(base, **one.kernels), one.fused)
            error = worst(tensor_errors(found, {name: expected[name] for name in found}))[1]
            allowed = 0.0 if one.bits else FLOAT64_ALLOWED
            if not one.bits and dtype != "float64":
                allowed = ceiling(s, dtype, weights, ids, targets)
            item = f"{one.side}, {' and '.join(one.kernels)}: {one.name} against plain"
            yield _of_side(one.side, item, dtype, error, allowed, one.name)


def _of_side(side: Side, item: str, dtype: str, measured: float, allowed: float, place: str, note: str = "") -> Row:
    """A row about one side alone: if it is red, that side and the place are to blame."""
    ok = measured <= allowed
    return Row("kernels", item, dtype, measured, allowed, ok, *(("", "", "") if ok else (side, note, place)))


def _in_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention with a mask (B, 1, T, T) as FlexAttention takes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow without a compiler
        return fused_attention(q, k, v, block_mask(mask))


def _windows(s: Settings) -> Iterator[Row]:
    """Attention that takes a window by itself, against a mask of that window, around the length T of a sequence;
    without cache.
    """
    if "float32" not in s.dtypes:
        return
    rng, t = np.random.default_rng((s.seed, 31)), 6
    q, k, v = (rng.standard_normal((2, t, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    distance = np.arange(t)[:, None] - np.arange(t)
    cases: Any = (
        (JAX, jnp.array, FusedAttention("xla"), reference_attention),
        (TORCH, torch.tensor, fused_attention, torch_reference_attention),
    )
    for name, put, fused, plain in cases:
        errors, (a, b, c) = {}, (put(q), put(k), put(v))
        for window in (1, 2, t - 2, t - 1, t, t + 1):
            mask = (distance >= 0) & (distance < window)
            expected = np.asarray(plain(a, b, c, put(mask)), np.float64)
            found = [np.asarray(kernel(a, b, c, None, window), np.float64) for kernel in (fused, plain)]
            size = float(np.linalg.norm(expected))
            errors[f"window {window} of {t}"] = max(tensor_error(x, expected, size) for x in found)
        if name is TORCH:  # each sequence with a mask of its own
            masks = np.stack([(distance >= 0) & (distance < window) for window in (2, t - 1)])[:, None]
            expected = np.asarray(plain(a, b, c, put(masks)), np.float64)
            found = np.asarray(_in_blocks(a, b, c, put(masks)), np.float64)
            errors["masks in blocks"] = tensor_error(found, expected, float(np.linalg.norm(expected)))
        at, error = worst(errors)
        # of T products of H factors each, softmax and T again: the roundings of float32, all in one direction
        allowed = (8 + 2 * t) * 2.0**-23
        ok = error <= allowed
        item, place = f"{name}, attention: a window by itself against its mask", "" if ok else "attention (window)"
        yield Row("kernels", item, "float32", error, allowed, ok, "" if ok else name, "" if ok else at, place)

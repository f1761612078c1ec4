"""What the specification has at every named point of the model: inputs, output, and the gradients at both."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_common.tensors import Tensors
from parity import spec
from parity.sides.taps import Values


@dataclasses.dataclass(frozen=True)
class Point:
    """What the specification has at a named point: its inputs, its output, and the gradients at both."""

    name: str
    inputs: tuple[np.ndarray, ...]
    output: np.ndarray
    d_output: np.ndarray
    d_inputs: tuple[np.ndarray, ...] = ()  # of the first inputs; a table has none


@dataclasses.dataclass(frozen=True)
class Fault:
    """The first place where a side differs, forward, else backward, else in a weight's gradient."""

    place: str
    what: str
    error: float


def specification(
    w: Tensors, ids: np.ndarray, targets: np.ndarray, cfg: Any, rnd: Callable = spec.exact, separator: Any = None
):
    """The points in the order in which their outputs are made, the loss, and the gradients of the weights."""
    flows: dict[str, np.ndarray] = {}
    cfg = spec.architecture(cfg)
    loss, grads = spec.loss_and_grads(w, ids, targets, cfg, rnd, flows, separator)
    logits, (angles, tape, last, final) = spec.forward(w, ids, cfg, rnd, separator)
    b, t = ids.shape
    heads = cfg.num_attention_heads // cfg.num_key_value_heads
    flat = lambda x: x.reshape(b, t, -1)
    points: list[Point] = []

    def add(name, inputs, output, d_inputs=()):
        points.append(Point(name, tuple(inputs), output, flows[name].reshape(output.shape), tuple(d_inputs)))

    def linear(name, x, bias=False):
        add(name, [x], spec.linear(w, name, x, bias, rnd), [rnd(flat(flows[name]) @ w[name + ".weight"])])

    def norm(name, x, y=None):
        dx, _ = spec.rms_norm_grad(flows[name], x, w[name + ".weight"], cfg.rms_norm_eps)
        y = rnd(spec.rms_norm(x, w[name + ".weight"], cfg.rms_norm_eps)) if y is None else y
        add(name, [x], y, [rnd(dx)])

    add("model.embed_tokens", [], rnd(w["model.embed_tokens.weight"][ids]))
    for i, (x_in, h1, q_raw, k_raw, q, k, v, _, attended, x_mid, h2, gate, up, hidden) in enumerate(tape):
        p = f"model.layers.{i}"
        a, m = p + ".self_attn", p + ".mlp"
        norm(p + ".input_layernorm", x_in, h1)
        for part in "qkv":
            linear(f"{a}.{part}_proj", h1, cfg.qkv_bias)
        if cfg.qk_norm:
            norm(a + ".q_norm", q_raw)
            norm(a + ".k_norm", k_raw)
        for part, x, turned in (("q", q_raw, q), ("k", k_raw, k[:, :, ::heads])):
            x = points[-2].output if cfg.qk_norm else x  # q_norm or k_norm, then apply_rope(q)
            name = f"{a}.apply_rope({part})"
            add(name, [x, np.cos(angles), np.sin(angles)], turned, [rnd(spec.rotate(flows[name], -angles))])
        backward = [flows[f"{a}.apply_rope(q)"], flows[f"{a}.apply_rope(k)"]]
        backward.append(flows[a + ".v_proj"].reshape(*v[:, :, ::heads].shape))
        inputs = [q, k[:, :, ::heads], v[:, :, ::heads]]
        add(a + ".attention", inputs, attended.reshape(q.shape), backward)
        linear(a + ".o_proj", attended)
        flows[a] = flows[a + ".o_proj"]
        add(a, [h1], points[-1].output, [flows[p + ".input_layernorm"]])
        norm(p + ".post_attention_layernorm", x_mid, h2)
        linear(m + ".gate_proj", h2)
        linear(m + ".up_proj", h2)
        add(m + ".swiglu", [gate, up], hidden, [flows[m + ".gate_proj"], flows[m + ".up_proj"]])
        linear(m + ".down_proj", hidden)
        flows[m] = flows[m + ".down_proj"]
        add(m, [h2], points[-1].output, [flows[p + ".post_attention_layernorm"]])
        x_out = tape[i + 1][0] if i + 1 < len(tape) else last
        before = "model.embed_tokens" if i == 0 else f"model.layers.{i - 1}"
        add(p, [x_in], x_out, [flows[before]])
    norm("model.norm", last, final)
    flows["model"] = flows["model.norm"]
    add("model", [], final)
    add("lm_head", [final], logits, [rnd(flows["lm_head"] @ w[spec.head_name(cfg)])])
    flows["loss"] = np.ones(())
    add("loss", [logits], np.asarray(loss), [flows["lm_head"]])
    return points, loss, grads


def given(points: list[Point]) -> tuple[Values, Values]:
    """The specification's values and gradients as a recorder wants them, to hand on."""
    forward: Values = {}
    backward: Values = {}
    for p in points:
        forward |= {(p.name, f"in{i}"): x for i, x in enumerate(p.inputs)} | {(p.name, "out"): p.output}
        backward |= {(p.name, f"in{i}"): x for i, x in enumerate(p.d_inputs)} | {(p.name, "out"): p.d_output}
    return forward, backward


def positions(x: np.ndarray, start: int, end: int) -> np.ndarray:
    """A piece of the sequence, whose axis is the second, or the first of a table."""
    return x[start:end] if x.ndim == 2 else x[:, start:end]


def piece_values(points: list[Point], start: int, end: int) -> Values:
    """What is handed on while a piece of the sequence is fed: the specification's values there, but for the cache's."""
    forward, _ = given([p for p in points if p.name != "loss"])
    cached = lambda key: key[0].endswith(".attention") and key[1] in ("in1", "in2")
    return {key: positions(x, start, end) for key, x in forward.items() if not cached(key)}

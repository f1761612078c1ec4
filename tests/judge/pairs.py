"""Pairs of models as people write them, each correct, with ways to break the candidate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


@dataclass
class Made:
    """What `judge` is given."""

    reference: Any
    candidate: Any
    inputs: Any
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Kind:
    """make(bug) -> Made; bug "" is the correct pair."""

    make: Callable[[str], Made]
    bugs: tuple[str, ...]
    places: dict[str, str] = field(default_factory=dict)  # bug -> part of the place's name


KINDS: dict[str, Kind] = {}


def kind(*bugs: str, **places: str):
    def register(make):
        KINDS[make.__name__] = Kind(make, bugs, places)
        return make

    return register


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def ids(high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, high, shape)


# --- convolutions and statistics


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (3, 3), padding="SAME")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), padding="VALID", use_bias=False)(x)
        return nn.Dense(5)(x.mean((1, 2)))


class BiasedBatchNorm(torch.nn.BatchNorm2d):
    """Flax keeps the variance of the batch itself, torch the unbiased one."""

    def forward(self, x):
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        if not self.training:
            return super().forward(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            self.running_mean.mul_(1 - self.momentum).add_(self.momentum * mean)
            self.running_var.mul_(1 - self.momentum).add_(self.momentum * var)
        x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class TorchCNN(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        norm = torch.nn.BatchNorm2d if bug == "unbiased" else BiasedBatchNorm
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.bn = norm(8, momentum=0.01 if bug == "momentum" else 0.1, eps=1e-3 if bug == "eps" else 1e-5)
        self.conv2 = torch.nn.Conv2d(8, 6, 3, bias=False)
        self.fc = torch.nn.Linear(6, 5)
        self.bug = bug

    def forward(self, x):
        x = F.relu(self.bn(self.conv1(x)))
        x = F.max_pool2d(x, 2) if self.bug == "pool" else F.avg_pool2d(x, 2)
        return self.fc(self.conv2(x).mean((2, 3)))


@kind("eps", "momentum", "unbiased", "pool", eps="bn")
def cnn_with_batch_norm(bug):
    x = floats(4, 8, 8, 3)
    return Made(
        (LinenCNN(), LinenCNN().init(KEY, x)),
        TorchCNN(bug),
        [x],
        {"layout": "NHWC->NCHW", "mode": ("train", "eval")},
    )


@kind("eps")
def cnn_whose_layout_is_found(bug):
    made = cnn_with_batch_norm(bug)
    return Made(made.reference, made.candidate, made.inputs, {"mode": "eval"})


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.bn(self.conv(x))).mean((1, 2)))


class SmallTorchCNN(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.conv, self.bn, self.head = torch.nn.Conv2d(3, 8, 3, padding=1), BiasedBatchNorm(8), torch.nn.Linear(8, 5)
        self.bug = bug

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.head((F.gelu(x) if self.bug == "gelu" else F.relu(x)).mean((2, 3)))


@kind("gelu")
def nnx_cnn(bug):
    x = floats(4, 8, 8, 3)
    return Made(NnxCNN(nnx.Rngs(0)), SmallTorchCNN(bug), [x], {"layout": "NHWC->NCHW", "mode": ("train", "eval")})


class LinenUp(nn.Module):
    @nn.compact
    def __call__(self, x):
        down = nn.relu(nn.Conv(6, (2, 2), strides=(2, 2), name="down")(x))
        up = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="up")(down)
        return nn.Conv(3, (1, 1), name="out")(jnp.concatenate([x, up], -1))


class TorchUp(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 6, 2, stride=2)
        self.up = torch.nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = torch.nn.Conv2d(7, 3, 1)
        self.bug = bug

    def forward(self, x):
        up = self.up(F.relu(self.down(x)))
        return self.out(torch.cat([up, x] if self.bug == "order" else [x, up], 1))


@kind("order")
def u_net(bug):
    x = floats(2, 8, 8, 3)
    return Made((LinenUp(), LinenUp().init(KEY, x)), TorchUp(bug), [x], {"layout": "NHWC->NCHW"})


class LinenFlat(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(7)(x.reshape(x.shape[0], -1))


class TorchFlat(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.conv, self.fc, self.bug = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4 * 36, 7), bug

    def forward(self, x):
        x = self.conv(x)
        x = x if self.bug == "relu" else F.relu(x)
        return self.fc(x.flatten(1))


@kind("relu")
def flattened_convolution(bug):
    """The rows of the dense kernel are in the order (height, width, channel) here, channels first there."""
    x = floats(2, 6, 6, 3)
    return Made((LinenFlat(), LinenFlat().init(KEY, x)), TorchFlat(bug), [x], {"layout": "NHWC->NCHW"})


# --- recurrent


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(10), name="rnn")(x)
        return nn.Dense(3, name="head")(x)


class TorchLSTM(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.rnn, self.head, self.bug = torch.nn.LSTM(6, 10, batch_first=True), torch.nn.Linear(10, 3), bug

    def forward(self, x):
        x = torch.flip(x, (1,)) if self.bug == "reversed" else x
        return self.head(self.rnn(x)[0])


@kind("reversed")
def lstm(bug):
    x = floats(2, 5, 6)
    return Made((LinenLSTM(), LinenLSTM().init(KEY, x)), TorchLSTM(bug), [x])


class LinenGRU(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.RNN(nn.GRUCell(10), name="rnn")(x))


class TorchGRU(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.rnn, self.head, self.bug = torch.nn.GRU(6, 10, batch_first=True), torch.nn.Linear(10, 3), bug

    def forward(self, x):
        out, last = self.rnn(x)
        return self.head(last[0][:, None] + 0 * out if self.bug == "last" else out)


@kind("last")
def gru(bug):
    x = floats(2, 5, 6)
    return Made((LinenGRU(), LinenGRU().init(KEY, x)), TorchGRU(bug), [x])


# --- attention


class LinenBlock(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x, mask=None):
        h = nn.LayerNorm(epsilon=1e-5, name="ln1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(h, h, mask=mask)
        h = nn.LayerNorm(epsilon=1e-5, name="ln2")(x)
        h = nn.gelu(nn.Dense(32, name="up")(h), approximate=False)
        return x + nn.Dense(self.width, name="down")(h)


class LinenViT(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), strides=(4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, 16)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, 16)), x], 1)
        x = x + self.param("pos", nn.initializers.normal(0.02), (1, x.shape[1], 16))
        for i in range(self.layers):
            x = LinenBlock(name=f"block_{i}")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(epsilon=1e-5, name="norm")(x)[:, 0])


class TorchBlock(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.ln1, self.ln2 = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16, eps=1e-6 if bug == "eps" else 1e-5)
        self.attn = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.bug = bug

    def forward(self, x):
        h = self.ln1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = F.gelu(self.up(self.ln2(x)), approximate="tanh" if self.bug == "tanh" else "none")
        return x + self.down(h) if self.bug != "residual" else self.down(h)


class TorchViT(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 16, 4, stride=4)
        self.cls, self.pos = torch.nn.Parameter(torch.zeros(1, 1, 16)), torch.nn.Parameter(torch.zeros(1, 5, 16))
        self.blocks = torch.nn.ModuleList([TorchBlock(bug if i == 1 else "") for i in range(2)])
        self.norm, self.head, self.bug = torch.nn.LayerNorm(16), torch.nn.Linear(16, 5), bug

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        cls = self.cls * (0 if self.bug == "cls" else 1)
        x = torch.cat([cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@kind("eps", "tanh", "residual", "cls", eps="ln2", tanh="blocks.1", residual="blocks.1")
def vision_transformer(bug):
    x = floats(2, 8, 8, 3)
    return Made((LinenViT(), LinenViT().init(KEY, x)), TorchViT(bug), [x], {"layout": "NHWC->NCHW"})


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            lambda module, carry, _: (module(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = block(LinenBlock(name="layers"), x, None)
        return nn.Dense(4, name="head")(x)


class TorchStack(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.layers = torch.nn.ModuleList([TorchBlock() for _ in range(3)])
        self.head, self.bug = torch.nn.Linear(16, 4), bug

    def forward(self, x):
        for layer in reversed(self.layers) if self.bug == "reversed" else self.layers:
            x = layer(x)
        return self.head(x)


@kind("reversed")
def scanned_layers(bug):
    x = floats(2, 5, 16)
    return Made((LinenScanned(), LinenScanned().init(KEY, x)), TorchStack(bug), [x])


# --- other shapes of models


def of_pytree(p, batch):
    x = p["embed"][batch["tokens"]]
    x = x * batch["mask"][..., None]
    for layer in p["layers"]:
        x = x + jnp.tanh(x @ layer["w"] + layer["b"])
    return {"logits": x @ p["embed"].T, "pooled": x.mean(1), "length": batch["mask"].sum(-1).astype(jnp.int32)}


class TorchTree(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
        self.bug = bug

    def forward(self, batch):
        x = self.embed(batch["tokens"])
        x = x if self.bug == "mask" else x * batch["mask"][..., None]
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        head = self.embed.weight.detach() if self.bug == "detached" else self.embed.weight
        return {"length": batch["mask"].sum(-1).int(), "logits": x @ head.T, "pooled": x.mean(1)}


@kind("mask", "detached", detached="embed.weight")
def dicts_in_and_out(bug):
    rng = np.random.default_rng(0)
    params = {
        "embed": rng.standard_normal((11, 8)),
        "layers": [{"w": rng.standard_normal((8, 8)), "b": np.zeros(8)} for _ in range(3)],
    }
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    mask = np.ones((2, 5), np.float32)
    mask[1, 3:] = 0
    return Made((of_pytree, params), TorchTree(bug), [{"tokens": ids(11, 2, 5), "mask": mask}])


class LinenGate(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate = self.param("gate", nn.initializers.zeros, (12,))
        h = nn.Dense(12, name="inner")(jnp.tanh(x))
        return x + gate * h


class TorchGate(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.gate, self.inner, self.bug = torch.nn.Parameter(torch.zeros(12)), torch.nn.Linear(12, 12), bug

    def forward(self, x):
        return x + self.gate * self.inner(torch.sigmoid(x) if self.bug == "sigmoid" else torch.tanh(x))


@kind("sigmoid")
def a_gate_that_starts_at_zero(bug):
    x = floats(4, 12)
    return Made((LinenGate(), LinenGate().init(KEY, x)), TorchGate(bug), [x])


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        x = nn.relu(nn.Dense(20)(x))
        x = nn.Dropout(0.3)(x, deterministic=deterministic)
        return nn.Dense(3)(x)


class TorchDropout(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        rate = 0.5 if bug == "rate" else 0.3
        self.net = torch.nn.Sequential(
            torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Dropout(rate), torch.nn.Linear(20, 3)
        )

    def forward(self, x):
        return self.net(x)


@kind("rate")
def dropout_in_training(bug):
    x = floats(4, 12)
    return Made((LinenDropout(), LinenDropout().init(KEY, x)), TorchDropout(bug), [x], {"mode": ("train", "eval")})


def spectral(p, x):
    z = jnp.fft.rfft(x, axis=-1) * (p["re"] + 1j * p["im"])
    return jnp.fft.irfft(z, n=x.shape[-1], axis=-1), z


class TorchSpectral(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.re, self.im, self.bug = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5)), bug

    def forward(self, x):
        im = -self.im if self.bug == "sign" else self.im
        z = torch.fft.rfft(x, dim=-1) * torch.complex(self.re, im)
        return torch.fft.irfft(z, n=x.shape[-1], dim=-1), z


@kind("sign")
def complex_numbers(bug):
    rng = np.random.default_rng(0)
    params = {
        "re": jnp.array(rng.standard_normal(5), jnp.float32),
        "im": jnp.array(rng.standard_normal(5), jnp.float32),
    }
    return Made((spectral, params), TorchSpectral(bug), [floats(3, 8)])


def looped(p, x):
    def body(state):
        i, x = state
        return i + 1, jnp.tanh(x @ p["w"])

    return jax.lax.while_loop(lambda state: state[0] < 4, body, (0, x))[1]


class TorchLooped(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.w, self.bug = torch.nn.Parameter(torch.zeros(6, 6)), bug

    def forward(self, x):
        for _ in range(5 if self.bug == "steps" else 4):
            x = torch.tanh(x @ self.w)
        return x


@kind("steps")
def a_loop_without_a_gradient(bug):
    w = np.random.default_rng(0).standard_normal((6, 6))
    return Made((looped, {"w": jnp.array(w, jnp.float32)}), TorchLooped(bug), [floats(3, 6)])


class Before(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        heads = lambda y: y.unflatten(-1, (4, 4)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


class After(torch.nn.Module):
    """Refactored: one projection."""

    def __init__(self, bug=""):
        super().__init__()
        self.qkv, self.out, self.bug = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16), bug

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / (4.0 if self.bug == "scale" else 2.0)
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).tril().logical_not(), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@kind("scale")
def torch_against_torch(bug):
    return Made(Before(), After(bug), [floats(2, 5, 16)])


class NnxMLP(nnx.Module):
    def __init__(self, rngs, bug=""):
        self.up, self.down = nnx.Linear(6, 12, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)
        self.bug = bug

    def __call__(self, x):
        return self.down(nnx.silu(self.up(x)) if self.bug != "relu" else nnx.relu(self.up(x)))


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="down")(nn.silu(nn.Dense(12, name="up")(x)))


@kind("relu")
def linen_against_nnx(bug):
    x = floats(4, 6)
    return Made((LinenMLP(), LinenMLP().init(KEY, x)), NnxMLP(nnx.Rngs(1), bug), [x])


class TorchRope(torch.nn.Module):
    """A table that was made in float32, as most ports have it."""

    inv_freq: torch.Tensor

    def __init__(self, bug=""):
        super().__init__()
        self.proj = torch.nn.Linear(8, 8)
        theta = 1000.0 if bug == "theta" else 10000.0
        self.register_buffer("inv_freq", 1.0 / theta ** (torch.arange(0, 8, 2).float() / 8))

    def forward(self, x):
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.inv_freq
        x = self.proj(x)
        a, b = x[..., :4], x[..., 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def with_rope(p, x):
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * 10000.0 ** (-jnp.arange(0, 8, 2) / 8)
    x = x @ p["kernel"] + p["bias"]
    a, b = x[..., :4], x[..., 4:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


@kind("theta")
def a_table_made_in_float32(bug):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.array(rng.standard_normal((8, 8)), jnp.float32), "bias": jnp.zeros(8)}
    return Made((with_rope, params), TorchRope(bug), [floats(2, 6, 8)])


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        gates = jax.nn.softmax(nn.Dense(4, name="router")(x))
        best, which = jax.lax.top_k(gates, 2)
        w = self.param("experts", nn.initializers.lecun_normal(), (4, 6, 6))
        every = jnp.einsum("bd,edf->bef", x, w)
        chosen = jnp.take_along_axis(every, which[..., None], 1)
        return (chosen * (best / best.sum(-1, keepdims=True))[..., None]).sum(1)


class TorchExperts(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.router = torch.nn.Linear(6, 4)
        self.experts = torch.nn.Parameter(torch.zeros(4, 6, 6))
        self.bug = bug

    def forward(self, x):
        best, which = self.router(x).softmax(-1).topk(2)
        best = best if self.bug == "norm" else best / best.sum(-1, keepdim=True)
        every = torch.einsum("bd,edf->bef", x, self.experts)
        chosen = torch.take_along_dim(every, which[..., None], 1)
        return (chosen * best[..., None]).sum(1)


@kind("norm")
def mixture_of_experts(bug):
    x = floats(5, 6)
    return Made((Experts(), Experts().init(KEY, x)), TorchExperts(bug), [x])


def selective_scan(p, x):
    a, b = jax.nn.sigmoid(x @ p["a"]), x @ p["b"]

    def step(h, ab):
        h = ab[0] * h + ab[1]
        return h, h

    _, out = jax.lax.scan(step, jnp.zeros_like(b[:, 0]), (a.swapaxes(0, 1), b.swapaxes(0, 1)))
    return out.swapaxes(0, 1) @ p["c"]


class TorchScan(torch.nn.Module):
    def __init__(self, bug=""):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(6, 8, bias=False)
        self.c, self.bug = torch.nn.Linear(8, 3, bias=False), bug

    def forward(self, x):
        a, b = torch.sigmoid(self.a(x)), self.b(x)
        h, out = torch.zeros_like(b[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * (h.detach() if self.bug == "detached" else h) + b[:, t]
            out.append(h)
        return self.c(torch.stack(out, 1))


@kind("detached")
def selective_state_space(bug):
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "b": (6, 8), "c": (8, 3)}
    params = {name: jnp.array(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return Made((selective_scan, params), TorchScan(bug), [floats(2, 5, 6)])

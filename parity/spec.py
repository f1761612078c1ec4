"""The specification: the whole language model in NumPy float64, one plain function a step of the algorithm.

It imports none of the three packages, so it can tell which of them is wrong, also when both sides share an error. It is
the best page to read first. Weights are a dict of arrays under Hugging Face's names, matrices as (out, in).

B batch, T positions, D hidden_size, N query heads, K key/value heads, H head_dim, F intermediate_size, V vocab_size.
`cfg` is a Hugging Face config, which `spec_config.py` reads by itself; the rules of a run are in `spec_run.py`. `rnd`
is called on every intermediate result; it is the identity but where a rounding is simulated. The forward pass takes
complex weights too: the gradients are checked by complex steps.
"""

import math

import numpy as np

from parity.spec_config import architecture

IGNORE_INDEX = -100


def exact(x):
    return x


# --- the model


def rms_norm(x, weight, eps):
    scale = (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5
    return x * scale * weight


def rope_angles(cfg, t):
    """Position times frequency, (T, H/2). Llama 3 slows down what turns less than `high` times in the original
    length.
    """
    cfg = architecture(cfg)
    frequencies = []
    for pair in range(cfg.head_dim // 2):
        f = cfg.rope_theta ** (-2.0 * pair / cfg.head_dim)
        if cfg.rope_scaling is not None:
            low, high = cfg.rope_scaling.low_freq_factor, cfg.rope_scaling.high_freq_factor
            turns = cfg.rope_scaling.original_max_position_embeddings * f / (2 * math.pi)
            if turns < low:
                f = f / cfg.rope_scaling.factor
            elif turns <= high:
                share = (turns - low) / (high - low)
                f = (1 - share) * f / cfg.rope_scaling.factor + share * f
        frequencies.append(f)
    return np.outer(np.arange(t), frequencies)


def rotate(x, angles):
    """Each pair (x[i], x[i + H/2]) of x (B, T, heads, H) turned by its position's angle."""
    half = x.shape[-1] // 2
    cos, sin = np.cos(angles)[..., None, :], np.sin(angles)[..., None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(x):
    e = np.exp(x - x.real.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention_weights(q, k, window=None, documents=None):
    """Causal softmax(q k^T / sqrt(H)) for q, k (B, T, N, H), over the last `window` positions: (B, N, T, T).

    documents (B, T): the number of the document that a token belongs to, if none may see another.
    """
    t, h = q.shape[1], q.shape[3]
    scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(h)
    distance = np.arange(t)[:, None] - np.arange(t)
    seen = (distance >= 0) & (distance < (window or t))
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return softmax(np.where(seen, scores, -np.inf))


def documents_of(ids, separator):
    """For every token (B, T) the number of its document and its position there. A document ends with the separator, or
    one of several.
    """
    documents, positions = np.zeros(ids.shape, int), np.zeros(ids.shape, int)
    for row, tokens in enumerate(ids):
        document = position = 0
        for i, token in enumerate(tokens):
            documents[row, i], positions[row, i] = document, position
            document, position = (document + 1, 0) if token in np.atleast_1d(separator) else (document, position + 1)
    return documents, positions


def silu(x):
    return x / (1.0 + np.exp(-x))


def linear(w, name, x, bias, rnd=exact):
    """x @ weight.T, plus the bias if the family has one."""
    y = rnd(x @ w[name + ".weight"].T)
    return rnd(y + w[name + ".bias"]) if bias else y


def forward(w, ids, cfg, rnd=exact, separator=None):
    """Logits (B, T, V) for token ids (B, T), and what the backward pass needs."""
    cfg = architecture(cfg)
    b, t = ids.shape
    n, kv, h = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    angles, tape, documents = rope_angles(cfg, t), [], None
    if separator is not None:
        documents, positions = documents_of(ids, separator)
        angles = angles[positions]
    x = rnd(w["model.embed_tokens.weight"][ids])
    for i in range(cfg.num_hidden_layers):
        p = f"model.layers.{i}."
        x_in = x
        h1 = rnd(rms_norm(x, w[p + "input_layernorm.weight"], cfg.rms_norm_eps))
        q = linear(w, p + "self_attn.q_proj", h1, cfg.qkv_bias, rnd).reshape(b, t, n, h)
        k = linear(w, p + "self_attn.k_proj", h1, cfg.qkv_bias, rnd).reshape(b, t, kv, h)
        v = linear(w, p + "self_attn.v_proj", h1, cfg.qkv_bias, rnd).reshape(b, t, kv, h)
        q_raw, k_raw = q, k
        if cfg.qk_norm:
            q = rnd(rms_norm(q, w[p + "self_attn.q_norm.weight"], cfg.rms_norm_eps))
            k = rnd(rms_norm(k, w[p + "self_attn.k_norm.weight"], cfg.rms_norm_eps))
        q, k = rnd(rotate(q, angles)), rnd(rotate(k, angles))
        k, v = np.repeat(k, n // kv, axis=2), np.repeat(v, n // kv, axis=2)  # query head n reads head n // (N/K)
        probs = rnd(attention_weights(q, k, cfg.sliding_window, documents))
        attended = rnd(np.einsum("bnts,bsnh->btnh", probs, v)).reshape(b, t, n * h)
        x_mid = x = rnd(x + rnd(attended @ w[p + "self_attn.o_proj.weight"].T))
        h2 = rnd(rms_norm(x, w[p + "post_attention_layernorm.weight"], cfg.rms_norm_eps))
        gate, up = rnd(h2 @ w[p + "mlp.gate_proj.weight"].T), rnd(h2 @ w[p + "mlp.up_proj.weight"].T)
        hidden = rnd(silu(gate) * up)
        x = rnd(x + rnd(hidden @ w[p + "mlp.down_proj.weight"].T))
        tape.append((x_in, h1, q_raw, k_raw, q, k, v, probs, attended, x_mid, h2, gate, up, hidden))
    final = rnd(rms_norm(x, w["model.norm.weight"], cfg.rms_norm_eps))
    return rnd(final @ w[head_name(cfg)].T), (angles, tape, x, final)


def head_name(cfg):
    return "model.embed_tokens.weight" if architecture(cfg).tie_word_embeddings else "lm_head.weight"


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] over the targets that are not IGNORE_INDEX; 0 if there is none."""
    counted = targets != IGNORE_INDEX
    shifted = logits - logits.real.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, np.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return (np.log(np.exp(shifted).sum(axis=-1)) - picked)[counted].sum() / max(counted.sum(), 1)


# --- gradients, by hand


def rms_norm_grad(dy, x, weight, eps):
    """The gradients of rms_norm with respect to x and weight."""
    scale = (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5
    normed, dn = x * scale, dy * weight
    dx = scale * (dn - normed * np.mean(dn * normed, axis=-1, keepdims=True))
    return dx, (dy * normed).sum(axis=tuple(range(dy.ndim - 1)))


def loss_and_grads(w, ids, targets, cfg, rnd=exact, flows=None, separator=None):
    """The mean loss and its gradient for every weight, in the order of the chain rule.

    A dict given as `flows` is filled with the gradient at the output of every module by name, and of the three
    functions apply_rope, attention and swiglu.
    """
    cfg = architecture(cfg)
    logits, (angles, tape, x, final) = forward(w, ids, cfg, rnd, separator)
    b, t = ids.shape
    n, kv, h = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    grads, flows = {}, {} if flows is None else flows

    def linear_grad(dy, x, name):
        flows[name.removesuffix(".weight")] = dy
        grads[name] = grads.get(name, 0.0) + np.einsum("btf,btd->fd", dy, x)
        return rnd(dy @ w[name])

    def norm_grad(dy, x, name):
        flows[name.removesuffix(".weight")] = dy
        dx, grads[name] = rms_norm_grad(dy, x, w[name], cfg.rms_norm_eps)
        return rnd(dx)

    counted = targets != IGNORE_INDEX
    one_hot = np.eye(cfg.vocab_size)[np.where(counted, targets, 0)]
    dlogits = rnd(np.where(counted[..., None], softmax(logits) - one_hot, 0.0) / max(counted.sum(), 1))
    flows["lm_head"] = dlogits
    dx = norm_grad(linear_grad(dlogits, final, head_name(cfg)), x, "model.norm.weight")
    for i in reversed(range(cfg.num_hidden_layers)):
        p = f"model.layers.{i}."
        x_in, h1, q_raw, k_raw, q, k, v, probs, attended, x_mid, h2, gate, up, hidden = tape[i]
        flows[p[:-1]] = dx
        flows[p + "mlp.swiglu"] = dhidden = linear_grad(dx, hidden, p + "mlp.down_proj.weight")
        sigmoid = 1.0 / (1.0 + np.exp(-gate))
        dgate = rnd(dhidden * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        dup = rnd(dhidden * silu(gate))
        dh2 = linear_grad(dgate, h2, p + "mlp.gate_proj.weight") + linear_grad(dup, h2, p + "mlp.up_proj.weight")
        dx = rnd(dx + norm_grad(dh2, x_mid, p + "post_attention_layernorm.weight"))
        dattended = linear_grad(dx, attended, p + "self_attn.o_proj.weight").reshape(b, t, n, h)
        flows[p + "self_attn.attention"] = dattended
        dprobs = rnd(np.einsum("btnh,bsnh->bnts", dattended, v))
        dscores = rnd(probs * (dprobs - (dprobs * probs).sum(axis=-1, keepdims=True)) / math.sqrt(h))
        dq = rnd(np.einsum("bnts,bsnh->btnh", dscores, k))
        dk = rnd(np.einsum("bnts,btnh->bsnh", dscores, q))
        dv = rnd(np.einsum("bnts,btnh->bsnh", probs, dattended))
        dk, dv = (d.reshape(b, t, kv, n // kv, h).sum(axis=3) for d in (dk, dv))
        flows[p + "self_attn.apply_rope(q)"], flows[p + "self_attn.apply_rope(k)"] = dq, dk
        dq, dk = rotate(dq, -angles), rotate(dk, -angles)
        if cfg.qk_norm:
            dq, dk = (
                norm_grad(dq, q_raw, p + "self_attn.q_norm.weight"),
                norm_grad(dk, k_raw, p + "self_attn.k_norm.weight"),
            )
        if cfg.qkv_bias:
            for name, d in (("q", dq), ("k", dk), ("v", dv)):
                grads[f"{p}self_attn.{name}_proj.bias"] = d.sum(axis=(0, 1)).reshape(-1)
        dh1 = linear_grad(dq.reshape(b, t, -1), h1, p + "self_attn.q_proj.weight")
        dh1 = dh1 + linear_grad(dk.reshape(b, t, -1), h1, p + "self_attn.k_proj.weight")
        dh1 = dh1 + linear_grad(dv.reshape(b, t, -1), h1, p + "self_attn.v_proj.weight")
        dx = rnd(dx + norm_grad(dh1, x_in, p + "input_layernorm.weight"))
    flows["model.embed_tokens"] = dx
    embedding = np.zeros_like(w["model.embed_tokens.weight"])
    np.add.at(embedding, ids, dx)
    grads["model.embed_tokens.weight"] = grads.get("model.embed_tokens.weight", 0.0) + embedding
    return cross_entropy(logits, targets), grads


# --- the optimizer


def clip(grads, max_norm):
    """Gradients scaled to a global norm of at most max_norm, and the norm before."""
    norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
    if max_norm is None or norm <= max_norm:
        return grads, norm
    return {name: g * (max_norm / norm) for name, g in grads.items()}, norm


def adamw_step(w, mu, nu, grads, opt, lr, n):
    """The n-th update, n = 1, 2, ...; returns new weights and moments. Matrices decay, gains do not."""
    mu = {name: opt.beta1 * mu[name] + (1 - opt.beta1) * g for name, g in grads.items()}
    nu = {name: opt.beta2 * nu[name] + (1 - opt.beta2) * g**2 for name, g in grads.items()}
    new = {}
    for name, p in w.items():
        m_hat, v_hat = mu[name] / (1 - opt.beta1**n), nu[name] / (1 - opt.beta2**n)
        decay = opt.weight_decay if p.ndim >= 2 else 0.0
        new[name] = p - lr * (m_hat / (np.sqrt(v_hat) + opt.eps) + decay * p)
    return new, mu, nu


# --- random numbers, initial weights and the sampler


def threefry2x32(key, x0, x1):
    """Twenty rounds of Threefish on two 32-bit words (Salmon et al. 2011); words are kept in uint64 and masked."""
    mask, words = np.uint64(0xFFFFFFFF), [np.uint64(k) for k in (*key, key[0] ^ key[1] ^ 0x1BD11BDA)]
    x0, x1 = (x0 + words[0]) & mask, (x1 + words[1]) & mask
    for i, rotations in enumerate([(13, 15, 26, 6), (17, 29, 16, 24)] * 2 + [(13, 15, 26, 6)]):
        for r in rotations:
            x0 = (x0 + x1) & mask
            x1 = ((x1 << np.uint64(r) | x1 >> np.uint64(32 - r)) & mask) ^ x0
        x0, x1 = (x0 + words[(i + 1) % 3]) & mask, (x1 + words[(i + 2) % 3] + np.uint64(i + 1)) & mask
    return x0, x1


def fold_in(key, data):
    return tuple(int(word[0]) for word in threefry2x32(key, np.zeros(1, np.uint64), np.full(1, data, np.uint64)))


def random_bits(key, n):
    b0, b1 = threefry2x32(key, np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64))
    return b0 ^ b1


def uniform(key, n):
    """n numbers in (0, 1): the middles of 2^23 cells, picked by the upper bits of the two encrypted words' xor."""
    return ((random_bits(key, n) >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23


def weight_shapes(cfg):
    """Name -> shape of every weight, in canonical order."""
    cfg = architecture(cfg)
    d, f, q = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads * cfg.head_dim
    kv = cfg.num_key_value_heads * cfg.head_dim
    shapes: dict = {"model.embed_tokens.weight": (cfg.vocab_size, d)}
    for i in range(cfg.num_hidden_layers):
        p = f"model.layers.{i}."
        shapes[p + "input_layernorm.weight"] = (d,)
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (size, d)
            if cfg.qkv_bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (size,)
        shapes[p + "self_attn.o_proj.weight"] = (d, q)
        if cfg.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = shapes[p + "self_attn.k_norm.weight"] = (cfg.head_dim,)
        shapes[p + "post_attention_layernorm.weight"] = (d,)
        shapes[p + "mlp.gate_proj.weight"] = (f, d)
        shapes[p + "mlp.up_proj.weight"] = (f, d)
        shapes[p + "mlp.down_proj.weight"] = (d, f)
    shapes["model.norm.weight"] = (d,)
    return shapes if cfg.tie_word_embeddings else {**shapes, "lm_head.weight": (cfg.vocab_size, d)}


def initial_width(name, num_layers):
    """Of the uniform distribution: a standard deviation of 0.02, less where a layer writes to the residual stream."""
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return (0.02 / math.sqrt(2 * num_layers) if residual else 0.02) * math.sqrt(12.0)


def initial_weight(seed, index, name, shape, num_layers):
    """A weight before training; index is its place in the canonical order."""
    if len(shape) == 1:
        return np.zeros(shape) if name.endswith("bias") else np.ones(shape)
    u = uniform(fold_in((0, seed), index), math.prod(shape))
    return ((u - 0.5) * initial_width(name, num_layers)).reshape(shape)


def initial_weights(seed, cfg):
    """All weights before training."""
    layers = architecture(cfg).num_hidden_layers
    shapes = weight_shapes(cfg).items()
    return {name: initial_weight(seed, i, name, shape, layers) for i, (name, shape) in enumerate(shapes)}


def filtered(logits, sampling):
    """Logits (V,) over the temperature, with the excluded tokens at -inf."""
    logits = logits / sampling.temperature
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))  # ties: the lowest id first
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    probs = softmax(logits[order])
    kept, mass = [], 0.0
    for i, p in zip(order, probs, strict=True):
        if sampling.top_p < 1.0 and mass >= sampling.top_p:
            break
        mass += p
        if p >= sampling.min_p * probs[0]:
            kept.append(i)
    result = np.full(len(logits), -np.inf)
    result[kept] = logits[kept]
    return result


def sample(logits, sampling, row, position):
    """The token drawn for row `row` at position `position`: greedy at temperature 0, else Gumbel-max."""
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    u = uniform(fold_in(fold_in((0, sampling.seed), row), position), len(logits))
    return int(np.argmax(filtered(logits, sampling) - np.log(-np.log(u))))


def generate(w, prompts, cfg, sampling, n_new, eos_ids=(), numbers=None):
    """New tokens for each of some prompts, by a full forward pass a token; an id of eos_ids ends a text and is not in
    it.

    numbers: what stands for a text's row in its draws; its row if not given.
    """
    texts = []
    for row, ids in zip(numbers or range(len(prompts)), prompts, strict=True):
        ids, text = list(ids), []
        while len(text) < n_new:
            logits, _ = forward(w, np.array([ids]), cfg)
            token = sample(logits[0, -1], sampling, row, len(ids))
            if token in eos_ids:
                break
            ids.append(token)
            text.append(token)
        texts.append(text)
    return texts

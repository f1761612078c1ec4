"""The building blocks by themselves: each against the other side, and against what the field's libraries compute."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional

import jax_llm.blocks as J
import jax_llm.rope
import torch_llm.blocks as T
from jax_llm.engine.device import x64
from llm_common.config import ModelConfig, RopeScaling
from llm_common.data.datasets import TokenDataset
from llm_common.errors import UserError
from torch_llm.optim import AdamW


def numbers(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


@pytest.fixture(autouse=True)
def wide():
    with x64("float64"):
        yield


def both(jax_function, torch_function, *arrays, **options):
    """The results of both sides, which must be the same to float64's rounding."""
    a = np.asarray(jax_function(*map(jnp.asarray, arrays), **options))
    b = torch_function(*map(torch.from_numpy, arrays), **options).numpy()
    np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)
    return b


def test_functions_by_name_are_those_of_torch():
    x = numbers(3, 5)
    np.testing.assert_allclose(both(J.silu, T.silu, x), functional.silu(torch.from_numpy(x)).numpy(), rtol=1e-14)
    wanted = functional.softmax(torch.from_numpy(x), 0).numpy()
    np.testing.assert_allclose(both(lambda a: J.softmax(a, 0), lambda a: T.softmax(a, 0), x), wanted, rtol=1e-14)
    assert J.softmax(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_feed_forward_is_the_models():
    x, gate, up, down = numbers(2, 3, 4), numbers(6, 4), numbers(6, 4, seed=1), numbers(4, 6)
    wanted = (functional.silu(torch.from_numpy(x @ gate.T)) * torch.from_numpy(x @ up.T)).numpy() @ down.T
    np.testing.assert_allclose(both(J.feed_forward, T.feed_forward, x, gate, up, down), wanted, rtol=1e-12)


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 16)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_pairs_by_complex_numbers(interleaved, scaling):
    x, positions = numbers(2, 3, 7, 6), np.array([0, 3, 1, 40, 7, 7, 2])
    options = {"theta": 500.0, "scaling": scaling, "interleaved": interleaved}
    found = both(lambda a: J.rotate(a, jnp.asarray(positions), **options),
                 lambda a: T.rotate(a, torch.from_numpy(positions), **options), x)  # fmt: skip
    frequencies = 500.0 ** (-np.arange(0, 6, 2) / 6)
    if scaling is not None:
        turns = 16 * frequencies / (2 * np.pi)
        kept = np.clip((turns - 1) / 3, 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / 8
    turn = np.exp(1j * positions[:, None] * frequencies)
    pair = (lambda a: (a[..., 0::2], a[..., 1::2])) if interleaved else (lambda a: (a[..., :3], a[..., 3:]))
    wanted = (lambda a: a[0] + 1j * a[1])(pair(x)) * turn
    np.testing.assert_allclose(np.stack(pair(found)), [wanted.real, wanted.imag], rtol=1e-11, atol=1e-12)


def test_rotation_without_positions_is_that_of_a_model():
    cfg = ModelConfig(vocab_size=9, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, head_dim=6, max_position_embeddings=16, rope_theta=300.0)  # fmt: skip
    x = jnp.asarray(numbers(1, 5, 2, 6))
    wanted = jax_llm.rope.apply_rope(x, *jax_llm.rope.rotary_table(cfg, 5, jnp.float64))
    found = jnp.swapaxes(J.rotate(jnp.swapaxes(x, 1, 2), theta=300.0), 1, 2)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_torch_and_a_query_that_sees_nothing_gets_zero(masked):
    q, k, v = numbers(2, 3, 5, 4), numbers(2, 3, 7, 4), numbers(2, 3, 7, 9)
    mask = np.random.default_rng(1).random((5, 7)) < 0.5
    mask[:, 0], mask[2] = True, False
    options = [mask] if masked else []
    found = both(J.attention, T.attention, q, k, v, *options)
    mask_of_torch = torch.from_numpy(mask | ~mask.any(1, keepdims=True)) if masked else None
    wanted = functional.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)), attn_mask=mask_of_torch)
    rows = [0, 1, 3, 4] if masked else [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found[:, :, rows], wanted.numpy()[:, :, rows], rtol=1e-12)
    if masked:
        assert not found[:, :, 2].any()
        slope = jax.grad(lambda a: J.attention(a, jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask)).sum())(
            jnp.asarray(q)
        )
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_multihead_attention_is_torchs(kv_heads):
    x, q, o = numbers(2, 5, 8), numbers(16, 8), numbers(8, 16)
    k, v = numbers(4 * kv_heads, 8), numbers(4 * kv_heads, 8, seed=2)
    found = both(J.multihead_attention, T.multihead_attention, x, q, k, v, o, heads=4)
    split = lambda w: torch.from_numpy(x @ w.T).reshape(2, 5, -1, 4).transpose(1, 2)
    wanted = functional.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(found, wanted.transpose(1, 2).reshape(2, 5, 16).numpy() @ o.T, rtol=1e-11)
    turned = J.multihead_attention(*map(jnp.asarray, (x, q, k, v, o)), heads=4, rotation=J.rotate)
    other = T.multihead_attention(*map(torch.from_numpy, (x, q, k, v, o)), heads=4, rotation=T.rotate)
    np.testing.assert_allclose(turned, other.numpy(), rtol=1e-12, atol=1e-13)
    assert np.abs(np.asarray(turned) - found).max() > 1e-3
    with pytest.raises(UserError, match="heads = 3 do not divide"):
        T.multihead_attention(*map(torch.from_numpy, (x, q, k, v, o)), heads=3)


def test_adamw_counts_by_itself_and_is_optaxs():
    params = {"w": jnp.asarray(numbers(3, 4)), "b": jnp.asarray(numbers(4))}
    rate = lambda count: 1e-2 / (1 + count)
    ours, theirs = (
        J.adamw(rate, (0.8, 0.99), 1e-7, 0.3),
        optax.adamw(rate, 0.8, 0.99, 1e-7, weight_decay=0.3),
    )
    a, b, sa, sb = params, params, ours.init(params), theirs.init(params)
    step = jax.jit(ours.update)
    for i in range(5):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(p * (i + 1)), params)
        (ua, sa), (ub, sb) = step(grads, sa, a), theirs.update(grads, sb, b)
        a, b = optax.apply_updates(a, ua), optax.apply_updates(b, ub)
    for name in params:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12)
    chained = optax.chain(optax.clip_by_global_norm(1.0), J.adamw(), optax.scale(0.5))
    chained.update(params, chained.init(params), params)
    with pytest.raises(UserError, match="the parameters are needed"):
        ours.update(params, ours.init(params))


def test_adamw_is_the_same_in_both_frameworks_also_in_bfloat16():
    """Biases decay on both sides, and a weight of bfloat16 moves as its float32 master does."""
    for dtype in ("float32", "bfloat16"):
        start = {"w": numbers(30, 40), "b": 1 + numbers(40)}
        params = {name: jnp.asarray(x, jnp.dtype(dtype)) for name, x in start.items()}
        modules = {name: torch.nn.Parameter(torch.tensor(x, dtype=getattr(torch, dtype))) for name, x in start.items()}
        ours, theirs = J.adamw(1e-3), AdamW(modules.values(), lr=1e-3)
        state = ours.init(params)
        for i in range(50):
            grads = {name: np.cos(x * (i + 1)) for name, x in start.items()}
            given = {name: jnp.asarray(g, jnp.dtype(dtype)) for name, g in grads.items()}
            updates, state = ours.update(given, state, params)
            params = optax.apply_updates(params, updates)
            for name, p in modules.items():
                p.grad = torch.tensor(np.asarray(given[name], np.float64), dtype=p.dtype)
            theirs.step()
        for name in start:
            a, b = np.asarray(params[name], np.float64), modules[name].detach().double().numpy()
            moved = np.abs(b - np.asarray(jnp.asarray(start[name], jnp.dtype(dtype)), np.float64)).mean()
            assert moved > 0.002
            # in bfloat16 two masters that differ by an ulp of float32 may round to neighbours, seldom
            assert (a != b).mean() < (0.01 if dtype == "bfloat16" else 1.1)
            np.testing.assert_allclose(a, b, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"betas": (0.9,)},
        {"betas": (1.0, 0.9)},
        {"eps": -1.0},
        {"weight_decay": -1.0},
        {"lr": -1.0},
        {"lr": float("nan")},
    ],
)
def test_adamw_refuses_what_would_move_the_wrong_way(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        AdamW([torch.nn.Parameter(torch.ones(2))], **wrong)
    with pytest.raises(UserError, match=next(iter(wrong))):
        J.adamw(**{"learning_rate" if name == "lr" else name: x for name, x in wrong.items()})


def test_what_would_silently_mean_something_else_is_refused():
    x = numbers(2, 5, 4)
    for blocks, array in ((J, jnp.asarray), (T, torch.from_numpy)):
        q = array(x)
        for mask in (np.zeros((5, 5)), np.ones((5, 5), np.int32)):
            with pytest.raises(UserError, match="bool is needed"):
                blocks.attention(q, q, q, array(mask))
        for call in (blocks.silu, blocks.softmax, blocks.rotate, lambda i, f=blocks.attention: f(i, i, i)):
            with pytest.raises(UserError, match="real numbers"):
                call(array(np.ones((5, 4), np.int32)))
        for positions in (np.ones(5), np.ones(5, bool)):
            with pytest.raises(UserError, match="whole numbers"):
                blocks.rotate(q, array(positions))
        with pytest.raises(UserError, match="an even H"):
            blocks.rotate(array(numbers(5, 3)))
        with pytest.raises(UserError, match="theta"):
            blocks.rotate(q, theta=-1.0)
        with pytest.raises(UserError, match="heads = 0"):
            blocks.multihead_attention(q, *[array(numbers(4, 4))] * 4, heads=0)
        few = blocks.rotate(q, array(np.array([5, 4, 3, 2, 1], np.uint8)))
        many = blocks.rotate(q, array(np.array([5, 4, 3, 2, 1], np.int32)))
        np.testing.assert_array_equal(np.asarray(few), np.asarray(many))
        empty = blocks.multihead_attention(array(x[:0]), *[array(numbers(4, 4))] * 4, heads=2)
        assert empty.shape == (0, 5, 4)
    with pytest.raises(UserError, match="max_norm"):
        J.clip_by_global_norm({"x": jnp.ones(2)}, -1.0)
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 2.0)
    with pytest.raises(UserError, match="max_norm"):
        T.clip_grad_norm_(weight, 0.0)
    assert float(T.clip_grad_norm_(weight, 1.0)) == 4.0  # one parameter, as torch's own takes it
    assert float(weight.grad.norm()) == pytest.approx(1.0)


def test_rotation_can_be_compiled():
    x, positions = jnp.asarray(numbers(2, 5, 4)), jnp.array([7, 8, 9, 3, 2])
    np.testing.assert_allclose(jax.jit(J.rotate)(x), J.rotate(x), rtol=1e-12)
    compiled = jax.jit(lambda x, p: J.rotate(x, p, length=16))(x, positions)
    np.testing.assert_allclose(compiled, J.rotate(x, positions), rtol=1e-12)
    with pytest.raises(UserError, match="length is missing"):
        jax.jit(J.rotate)(x, positions)
    other = T.rotate(torch.tensor(np.array(x)), torch.tensor(np.array(positions)), length=16)
    np.testing.assert_allclose(compiled, other.numpy(), rtol=1e-12)


def test_a_tree_keeps_what_jax_would_cut(tmp_path):
    tree = {"n": 3_000_000_000, "f": 0.1, "i": np.array([2**40]), "u": np.array([2**63], np.uint64), "x": jnp.ones(2)}
    J.save_tree(tmp_path / "a.safetensors", tree)
    with jax.enable_x64(False):
        found, _ = J.load_tree(tmp_path / "a.safetensors", tree)
    assert (found["n"], found["f"]) == (3_000_000_000, 0.1)
    assert (found["i"][0], found["u"][0], found["i"].dtype) == (2**40, 2**63, np.int64)


def test_torchs_adamw_has_defaults_and_takes_betas():
    weight = torch.nn.Parameter(torch.from_numpy(numbers(3, 4)))
    other = torch.nn.Parameter(weight.detach().clone())
    ours = AdamW([weight], lr=1e-2, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.3)
    theirs = torch.optim.AdamW([other], lr=1e-2, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.3)
    for i in range(4):
        for p, optimizer in ((weight, ours), (other, theirs)):
            p.grad = torch.cos(p.detach() * (i + 1))
            optimizer.step()
    torch.testing.assert_close(weight, other, rtol=1e-12, atol=0)
    assert AdamW([weight]).param_groups[0]["betas"] == (0.9, 0.95)


def test_a_clip_changes_gradients_in_place():
    parameters = [
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])
    kept = parameters[0].grad
    assert T.clip_grad_norm_(parameters, 1.0) == 5.0
    assert torch.equal(kept, torch.tensor([3.0, 0.0, 0.0]) / 5)
    assert parameters[2].grad is None
    clipped, norm = J.clip_by_global_norm({"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}, 10.0)
    assert norm == 5.0
    assert clipped["b"] == 4.0


def test_windows_of_an_array_may_overlap():
    ids = np.arange(100, 111, dtype=np.uint16)
    data = TokenDataset(ids, seq_len=4, batch_size=7, seed=3, stride=1)
    inputs, targets = data.batch(0)
    assert sorted(inputs[:, 0].tolist()) == list(range(100, 107))  # every place once in an epoch
    np.testing.assert_array_equal(targets, inputs + 1)
    assert data.fingerprint()["stride"] == 1
    assert "stride" not in TokenDataset(ids, 4, 2, 0).fingerprint()
    assert len(data.windows()) == 7
    assert data.windows()[6]["targets"].tolist() == [107, 108, 109, 110]
    assert TokenDataset(ids, 4, 2, 0, stride=3).n_windows == 3
    for wrong, words in ((ids[:4], "4 tokens are fewer"), (ids[None], "expected a flat array"), (ids * 1.0, "float64")):
        with pytest.raises(UserError, match=words):
            TokenDataset(wrong, 4, 2, 0, stride=1)
    with pytest.raises(UserError, match="stride = 0"):
        TokenDataset(ids, 4, 2, 0, stride=0)


def test_any_module_and_any_tree_is_saved_and_found_again(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    optimizer = AdamW(module.parameters())
    module(torch.ones(4, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    T.save_state(
        tmp_path / "a.safetensors", {"model": module.state_dict(), "optimizer": optimizer.state_dict()}, step=7
    )
    state, values = T.load_state(tmp_path / "a.safetensors")
    assert values == {"step": 7}
    again = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    again.load_state_dict(state["model"])
    other = AdamW(again.parameters())
    other.load_state_dict(state["optimizer"])
    for (name, x), y in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert other.count == 1
    assert torch.equal(other.moments(again[0].weight)[0], optimizer.moments(module[0].weight)[0])

    tree = {"w": [jnp.ones((2, 3), jnp.bfloat16), jnp.arange(3)], "state": optax.adam(1e-3).init({"x": jnp.zeros(2)})}
    J.save_tree(tmp_path / "b.safetensors", tree, step=3, note="ok")
    found, values = J.load_tree(tmp_path / "b.safetensors", jax.tree.map(jnp.zeros_like, tree))
    assert values == {"step": 3, "note": "ok"}
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    with pytest.raises(UserError, match="is in the file alone"):
        J.load_tree(tmp_path / "b.safetensors", {"w": tree["w"]})
    with pytest.raises(UserError, match=r"expected bfloat16 \(3, 3\)"):
        J.load_tree(tmp_path / "b.safetensors", {**tree, "w": [jnp.ones((3, 3), jnp.bfloat16), jnp.arange(3)]})
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match="damaged"):
        J.load_tree(tmp_path / "b.safetensors", tree)
    with pytest.raises(UserError, match="no such file"):
        T.load_state(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="a object; what can be saved are"):
        T.save_state(tmp_path / "d.safetensors", {"x": object()})
    assert not (tmp_path / "d.safetensors").exists()

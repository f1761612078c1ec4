"""What only a GPU can show: float32 without TF32, float64, fused attention in bfloat16, both frameworks' training
there.
"""

import dataclasses

import numpy as np
import pytest

from llm_common.config import ExecutionConfig, OptimizerConfig, Recipe, RunConfig, SamplingConfig, TrainConfig, preset
from llm_common.data.datasets import TokenDataset
from llm_common.run.folder import Run
from llm_common.run.log import read_log
from llm_tools.frameworks import open_backend
from parity.checks.ladder import run_checks
from parity.core.inputs import random_weights
from parity.sides.settings import Settings

pytestmark = pytest.mark.gpu
ON_GPU = Settings(device="gpu", steps=50, tokens=1000)


@pytest.mark.parametrize("check", ["init", "logits", "gradients", "precision", "adamw", "cache", "tokens"])
def test_the_ladder_holds_on_a_gpu(check):
    assert [row for row in run_checks(ON_GPU, (check,)) if not row.ok] == []


@pytest.mark.parametrize("length", [13, 64])  # cuDNN takes only one of them
def test_fused_attention_errs_no_more_than_the_reference(length):
    cfg = dataclasses.replace(preset("tiny"), head_dim=32, max_position_embeddings=128)
    settings = dataclasses.replace(ON_GPU, cfg=cfg, attention="auto", length=length, dtypes=("float32", "bfloat16"))
    assert [row for row in run_checks(settings, ("logits", "gradients", "cache")) if not row.ok] == []


def test_both_frameworks_train_alike_in_bfloat16(tmp_path):
    tokens = np.tile(np.random.default_rng(0).integers(0, 2048, 1000), 40).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    train = TrainConfig(batch_size=8, seq_len=128, compute_dtype="bfloat16")
    opt = OptimizerConfig(lr_max=2e-3, warmup_steps=10, total_steps=60)
    recipe = Recipe(preset("demo"), train, opt)
    data, curves = TokenDataset(tmp_path / "tokens.npy", 128, 8, 0, 2048), {}
    for framework in ("jax", "torch"):
        run = Run(tmp_path / framework, recipe, data, framework)
        open_backend(framework).fit_and_save(run, "gpu", None)
        rows = read_log(tmp_path / framework / "log.jsonl")
        curves[framework] = np.array([row["loss"] for row in rows if "event" not in row])
    assert curves["jax"][-1] < curves["jax"][0] - 1
    # bfloat16 runs of one framework differ by some 1e-2 when their sums are reordered
    assert np.sqrt(np.mean((curves["jax"] - curves["torch"]) ** 2)) < 3e-2


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_deterministic_run_resumed_is_bitwise_the_straight_one(framework, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 2048, 30_000).astype(np.uint16))
    train = TrainConfig(batch_size=8, seq_len=128, compute_dtype="bfloat16")
    opt = OptimizerConfig(lr_max=2e-3, warmup_steps=2, total_steps=12)
    recipe = Recipe(preset("demo"), train, opt, ExecutionConfig(deterministic=True))
    data = TokenDataset(tmp_path / "tokens.npy", 128, 8, 0, 2048)
    fit_and_save = lambda run: open_backend(framework).fit_and_save(run, "gpu", None)

    def stop(row):
        if row["step"] == 7 and "event" not in row:
            raise KeyboardInterrupt

    straight = fit_and_save(Run(tmp_path / "a", recipe, data, framework))
    saves = RunConfig(save_every=5)
    run = Run(tmp_path / "b", recipe, data, framework, config=saves, on_event=stop)
    with pytest.raises(KeyboardInterrupt):
        fit_and_save(run)
    resumed = fit_and_save(Run(tmp_path / "b", recipe, data, framework))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()


def test_the_same_text_from_both_on_a_gpu_and_on_the_cpu():
    cfg, weights = preset("tiny"), random_weights(preset("tiny"), 0)
    prompt = np.array([[1, 2, 3], [4, 5, 6]])
    texts = []
    for framework in ("jax", "torch"):
        for device in ("cpu", "gpu"):
            with open_backend(framework).generator(cfg, weights, "float64", device, None, "auto") as stream:
                texts.append(list(stream(prompt, 30, SamplingConfig(seed=4, top_p=0.9))))
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize("compile", ["auto", "on"])
def test_captured_steps_give_the_text_of_the_cpu(compile):
    cfg, weights = preset("tiny"), random_weights(preset("tiny"), 0)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    generator = open_backend("torch").generator
    texts = []
    for device in ("cpu", "gpu"):
        with generator(cfg, weights, "float64", device, None, compile) as stream:
            for seed in (4, 5):  # the second time the captured step is played again, with another key and other numbers
                texts.append(list(stream(prompts, 30, SamplingConfig(seed=seed, top_p=0.9), (), [seed, 2, 7])))
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_cudnn_attends_to_the_slots_seen_and_to_no_other():
    import jax
    import jax.numpy as jnp

    from jax_llm.attention import reference_attention
    from jax_llm.fast.attention import fused_attention

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (5, 1, 8, 64), (5, 96, 2, 64), (5, 96, 2, 64)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    seen = jnp.array([1, 2, 50, 95, 96])
    mask = (jnp.arange(96) < seen[:, None])[:, None, None]
    k, v = (jnp.where(mask[:, 0, 0, :, None, None], x, jnp.nan) for x in (k, v))  # what is not seen must not matter
    got = fused_attention(q, k, v, mask, "cudnn")
    k, v = (jnp.nan_to_num(x) for x in (k, v))
    expected = reference_attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    assert float(jnp.abs(got.astype(jnp.float32) - expected).max()) < 2**-6  # one rounding of values up to 4 to 8 bits


@pytest.mark.parametrize(
    "first", [0, 32]
)  # of the queries among the slots: a sequence of its own, and a prompt after others
def test_cudnn_takes_a_mask_that_hides_what_lies_ahead(first):
    import jax
    import jax.numpy as jnp

    from jax_llm.attention import reference_attention
    from jax_llm.fast.attention import fused_attention

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((3, n, heads, 64)) for n, heads in ((64, 8), (64 + first, 2), (64 + first, 2))]
    look = np.arange(64)[:, None] + first >= np.arange(64 + first)
    look = look & (rng.random((3, 1, 64, 64 + first)) < 0.5) | (np.arange(64)[:, None] + first == np.arange(64 + first))

    def results(attention, dtype):
        q, k, v = (jnp.array(x, dtype) for x in arrays)
        grads = jax.grad(lambda *qkv: (attention(*qkv).astype(jnp.float32) ** 2).sum(), (0, 1, 2))(q, k, v)
        return [np.asarray(x, np.float32) for x in (attention(q, k, v), *grads)]

    mask = jnp.array(look)
    got = results(lambda *qkv: fused_attention(*qkv, mask, "cudnn"), jnp.bfloat16)
    rounded = results(lambda *qkv: reference_attention(*qkv, mask), jnp.bfloat16)
    exact = results(lambda *qkv: reference_attention(*qkv, mask), jnp.float32)
    for a, b, expected in zip(got, rounded, exact, strict=True):
        assert np.linalg.norm(a - expected) < 2 * np.linalg.norm(b - expected)


HIDDEN = {
    "documents": (None, 1),
    "window": (48, None),
    "documents and window": (48, 1),
}


@pytest.mark.parametrize(
    ("hidden", "remat"), [*((hidden, "none") for hidden in HIDDEN), ("documents", "full"), ("documents", "dots")]
)
def test_fast_attention_with_a_mask_errs_no_more_than_the_reference(hidden, remat, monkeypatch):
    import torch

    from jax_llm.fast.attention import FusedAttention
    from parity import spec
    from parity.sides.jax_side import JaxSide
    from parity.sides.torch_side import TorchSide
    from torch_llm.engine.checkpoint import from_canonical
    from torch_llm.engine.gradients import batch_loss
    from torch_llm.fast.attention import block_mask
    from torch_llm.fast.kernels import make_kernels
    from torch_llm.model import empty_model

    window, separator = HIDDEN[hidden]
    family = {} if window is None else {"model_type": "mistral", "sliding_window": window}
    cfg = dataclasses.replace(preset("tiny"), head_dim=32, max_position_embeddings=512, **family)
    weights, rng = random_weights(cfg, 0, "bfloat16"), np.random.default_rng(0)
    ids, targets = rng.integers(2, cfg.vocab_size, (2, 2, 300))
    ids[rng.random(ids.shape) < 0.02] = 1  # documents of some 50, in blocks of 128
    exact_loss, exact = spec.loss_and_grads(weights, ids, targets, cfg, separator=separator)

    def compiled_torch():
        kernels = make_kernels("sdpa", remat, separator=separator, block_masks=True)
        model = from_canonical(empty_model(cfg, torch.bfloat16, "cuda", kernels), weights)
        inputs, labels = (torch.tensor(x, device="cuda") for x in (ids, targets))
        masters, given = dict(model.named_parameters()), []
        monkeypatch.setattr("torch_llm.fast.attention.block_mask", lambda mask: given.append(1) or block_mask(mask))
        count = torch.tensor(labels.numel(), device="cuda")
        loss = torch.compile(batch_loss, dynamic=False)(model, inputs, labels, count)
        grads = torch.autograd.grad(loss, list(masters.values()))
        assert given, "the mask was not given in blocks"
        return float(loss.detach()), {name: g.float().cpu().numpy() for name, g in zip(masters, grads, strict=True)}

    def error(result):
        loss, grads = result
        assert abs(loss - exact_loss) < 2**-8 * exact_loss
        return np.sqrt(sum(np.sum((grads[name] - g) ** 2) for name, g in exact.items()))

    fields = {"remat": remat, "separator": separator}
    side = lambda kind, attention: kind(cfg, "bfloat16", "gpu", attention).variant(**fields)
    jax, torch_eager = (side(kind, "auto").loss_and_grads(weights, ids, targets) for kind in (JaxSide, TorchSide))
    assert JaxSide(cfg, "bfloat16", "gpu", "auto")._model(ids).kernels.attention == FusedAttention("cudnn")
    rounded = error(side(TorchSide, "reference").loss_and_grads(weights, ids, targets))
    for result in (jax, torch_eager, compiled_torch()):
        assert error(result) < 1.5 * rounded

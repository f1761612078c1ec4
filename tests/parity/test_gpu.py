"""What only a GPU can show: float32 without TF32, float64, fused attention in bfloat16, both frameworks' training there."""

import dataclasses

import numpy as np
import pytest

from llm_common.config import OptimizerConfig, SamplingConfig, TrainConfig, preset
from llm_common.data import TokenDataset
from llm_common.errors import import_side
from llm_common.run_log import RunLog, read_log
from parity.cases import random_weights
from parity.ladder import run_checks
from parity.settings import Settings

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
    data, curves = TokenDataset(tmp_path / "tokens.npy", 128, 8, 0, 2048), {}
    for framework in ("jax", "torch"):
        with RunLog(tmp_path / f"{framework}.jsonl") as log:
            side = import_side(framework, "checkpoint")
            hook = lambda step, m, log=log: log.write({"step": step, **m})
            side.fit_and_save(tmp_path / framework, preset("demo"), train, opt, data, "gpu", on_step=hook)
        curves[framework] = np.array([row["loss"] for row in read_log(tmp_path / f"{framework}.jsonl")[1:]])
    assert curves["jax"][-1] < curves["jax"][0] - 1
    # bfloat16 runs of one framework differ by some 1e-2 when their sums are reordered
    assert np.sqrt(np.mean((curves["jax"] - curves["torch"]) ** 2)) < 3e-2


def test_the_same_text_from_both_on_a_gpu_and_on_the_cpu():
    cfg, weights = preset("tiny"), random_weights(preset("tiny"), 0)
    prompt = np.array([[1, 2, 3], [4, 5, 6]])
    texts = [
        import_side(framework, "generate").generate_from(
            cfg, weights, prompt, 30, SamplingConfig(seed=4, top_p=0.9), None, device, "float64"
        )
        for framework in ("jax", "torch")
        for device in ("cpu", "gpu")
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]

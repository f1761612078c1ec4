"""The train and decode steps lower for TPU, GPU and CPU on a machine that has none of the first two."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jax_llm import random_bits
from jax_llm.engine.decoding import decode_step
from jax_llm.engine.plan import make_model
from jax_llm.engine.train import init_state, make_train_step
from jax_llm.fast.attention import resolve_backend
from jax_llm.fast.kernels import make_kernels
from jax_llm.kv_cache import init_cache
from jax_llm.model import CausalLM, init_params
from jax_llm.optim import make_optimizer
from llm_common.config import OptimizerConfig, Recipe, SamplingConfig, TrainConfig, preset
from llm_common.schedule import step_scalars

PLATFORMS = {"tpu": "tpu", "cuda": "gpu", "cpu": "cpu"}
CFG = dataclasses.replace(
    preset("tiny"), head_dim=64, max_position_embeddings=128
)  # a head size that fused kernels take
OPT = OptimizerConfig()


def abstract(function, *args):
    return jax.eval_shape(function, *args)


def train_step_and_arguments(train: TrainConfig, platform: str):
    """The function that a run jits, and the shapes of its arguments."""
    recipe = Recipe(CFG, train, OPT)
    step = make_train_step(make_model(recipe, platform), make_optimizer(OPT, CFG), train.compute_dtype)
    state = abstract(lambda: init_state(recipe))
    tokens = jax.ShapeDtypeStruct((train.batch_size, train.seq_len), jnp.int32)
    scalars = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), jnp.float32), step_scalars(OPT, 0, 0))
    return jax.jit(step, donate_argnums=0), (state, tokens, tokens, scalars)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_train_step_lowers(platform, dtype):
    train = TrainConfig(batch_size=2, seq_len=64, compute_dtype=dtype)
    step, args = train_step_and_arguments(train, PLATFORMS[platform])
    # cuDNN's own lowering rule asks for a GPU to be there: ahead of time the same step is lowered with XLA's attention
    if (platform, dtype) == ("cuda", "bfloat16"):
        step = jax.jit(
            make_train_step(CausalLM(CFG, make_kernels("xla")), make_optimizer(OPT, CFG), dtype), donate_argnums=0
        )
    exported = jax.export.export(step, platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    assert "dot_general" in exported.mlir_module()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_decode_step_lowers(platform):
    model = CausalLM(CFG, make_kernels(resolve_backend("auto", PLATFORMS[platform], "bfloat16", CFG, 1)))
    sampling = SamplingConfig(temperature=0.8, top_k=5, top_p=0.9)
    numbers = jnp.arange(2)
    step = jax.jit(lambda params, cache, tokens, key: decode_step(model, params, cache, tokens, key, numbers, sampling))
    args = (
        abstract(partial(init_params, CFG, 0, jnp.bfloat16)),
        abstract(partial(init_cache, CFG, 2, 32, jnp.bfloat16)),
        jax.ShapeDtypeStruct((2, 1), jnp.int32),
        abstract(partial(random_bits.key, 0)),
    )
    exported = jax.export.export(step, platforms=[platform])(*args)
    assert exported.platforms == (platform,)

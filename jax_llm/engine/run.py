"""A training run from its folder, in JAX: resume, train, save.

here                                          torch_llm.engine.run
a state goes into `fit` and comes out         a trainer, which `fit` changes
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_llm.engine import distributed
from jax_llm.engine.checkpoint import from_canonical, from_training_state, to_training_state
from jax_llm.engine.device import select_device, x64
from jax_llm.engine.evaluate import evaluate
from jax_llm.engine.plan import make_model
from jax_llm.engine.train import TrainState, fit, init_state
from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig
from llm_common.data.datasets import Dataset
from llm_common.run.folder import Run
from llm_common.sharding import MeshConfig, check_sharded


def fit_and_save(run: Run, device: str = "auto") -> Path:
    """Train as `run` says: from its newest checkpoint, from its initial weights or from the seed, to the end or until
    it is asked to stop. Returns the newest checkpoint.

    Raises UserError if the device is absent, the folder is in use, or the checkpoint there is damaged or of another
    run.
    """
    target, cfg, train, opt = select_device(device), run.cfg, run.train, run.opt
    dtype = jnp.dtype(train.master_dtype)
    with run, jax.default_device(target), x64(train.master_dtype):
        saved = run.resume()
        if saved is not None:
            state = from_training_state(cfg, opt, saved, dtype)
        else:
            params = None if run.initial is None else from_canonical(cfg, run.initial, dtype)
            state = init_state(cfg, train, opt, params)
        model = make_model(cfg, train, target.platform)

        def readers(state: TrainState):
            """What the run may ask of a state: to be read, and its held-out loss."""
            snapshot = lambda: to_training_state(cfg, state)
            return snapshot, lambda evaluation: evaluate(model, state.params, train.compute_dtype, evaluation)

        state = fit(
            state,
            cfg,
            train,
            opt,
            run.dataset,
            on_step=lambda step, state, metrics: run.after_step(step, metrics, *readers(state)),
        )
        return run.finish(int(state.step), *readers(state))


def fit_and_save_on_mesh(run: Run, config: MeshConfig, device: str = "auto") -> Path:
    """`fit_and_save` on a mesh. Every host calls it, with a run over the same folder."""
    cfg, train, opt = run.cfg, run.train, run.opt
    check_sharded(config, cfg, train)
    mesh, dtype = distributed.make_mesh(config, device), jnp.dtype(train.master_dtype)
    with run, x64(train.master_dtype):
        saved = run.resume()
        if saved is not None:
            state = distributed.from_training_state(cfg, opt, saved, mesh, dtype)
        else:
            params = None if run.initial is None else distributed.from_canonical(cfg, run.initial, mesh, dtype)
            state = distributed.init_state(cfg, train, opt, mesh, params)

        def readers(state: TrainState):
            """What the run may ask of a state: to be read, and its held-out loss."""
            snapshot = lambda: distributed.to_training_state(cfg, state)
            return snapshot, lambda evaluation: distributed.evaluate(cfg, train, state.params, evaluation, mesh)

        after_step = lambda step, state, metrics: run.after_step(step, metrics, *readers(state))
        state = distributed.fit(state, cfg, train, opt, run.dataset, mesh, on_step=after_step)
        return run.finish(int(state.step), *readers(state))


def cost_of_determinism(
    cfg: ModelConfig, train: TrainConfig, opt: OptimizerConfig, dataset: Dataset, device: str = "auto"
) -> str:
    """What `deterministic` costs on a device (by name), measured on a few steps of a run that is thrown away: for
    people.
    """
    target = select_device(device)
    if target.platform == "cpu":
        return "deterministic: a CPU gives the same bits anyway, at no cost"
    slow, fast = (
        seconds_per_step(cfg, dataclasses.replace(train, deterministic=x), opt, dataset, device) for x in (True, False)
    )
    return f"deterministic: {slow / fast:.2f} times the time of a step ({1e3 * slow:.1f} ms for {1e3 * fast:.1f} ms)"


def seconds_per_step(
    cfg: ModelConfig, train: TrainConfig, opt: OptimizerConfig, dataset: Dataset, device: str = "auto", steps: int = 5
) -> float:
    """The median time of `steps` steps after three to warm up, from initial weights."""
    times: list[float] = []
    with jax.default_device(select_device(device)), x64(train.master_dtype):
        state = init_state(cfg, train, opt)
        fit(state, cfg, train, opt, dataset, steps + 3, lambda *_: times.append(time.perf_counter()))
    return float(np.median(np.diff(times)[2:]))

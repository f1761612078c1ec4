"""A training run from its folder, in JAX: resume, train, save.

here                                          torch_llm.engine.run
a state goes into `fit` and comes out         a trainer, which `fit` changes
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from jax_llm.engine import distributed
from jax_llm.engine.checkpoint import from_canonical, from_training_state, to_training_state
from jax_llm.engine.device import select_device, x64
from jax_llm.engine.evaluate import evaluate
from jax_llm.engine.plan import make_model
from jax_llm.engine.train import TrainState, fit, init_state
from llm_common.run.folder import Run
from llm_common.sharding import MeshConfig, check_sharded


def fit_and_save(run: Run, device: str = "auto") -> Path:
    """Train as `run` says: from its newest checkpoint, from its initial weights or from the seed, to the end or until
    it is asked to stop. Returns the newest checkpoint.

    Raises UserError if the device is absent, the folder is in use, or the checkpoint there is damaged or of another
    run.
    """
    target, recipe = select_device(device), run.recipe
    cfg, train = recipe.model, recipe.train
    dtype = jnp.dtype(train.master_dtype)
    with run, jax.default_device(target), x64(train.master_dtype):
        saved = run.resume()
        if saved is not None:
            state = from_training_state(cfg, recipe.optimizer, saved, dtype)
        else:
            params = None if run.initial is None else from_canonical(cfg, run.initial, dtype)
            state = init_state(recipe, params)
        model = make_model(recipe, target.platform)

        def readers(state: TrainState):
            """What the run may ask of a state: to be read, and its held-out loss."""
            snapshot = lambda: to_training_state(cfg, state)
            return snapshot, lambda evaluation: evaluate(model, state.params, train.compute_dtype, evaluation)

        state = fit(
            state,
            recipe,
            run.dataset,
            on_step=lambda step, state, metrics: run.after_step(step, metrics, *readers(state)),
        )
        return run.finish(int(state.step), *readers(state))


def fit_and_save_on_mesh(run: Run, config: MeshConfig, device: str = "auto") -> Path:
    """`fit_and_save` on a mesh. Every host calls it, with a run over the same folder."""
    recipe, cfg, master_dtype = run.recipe, run.recipe.model, run.recipe.train.master_dtype
    check_sharded(config, recipe)
    mesh, dtype = distributed.make_mesh(config, device), jnp.dtype(master_dtype)
    with run, x64(master_dtype):
        saved = run.resume()
        if saved is not None:
            state = distributed.from_training_state(cfg, recipe.optimizer, saved, mesh, dtype)
        else:
            params = None if run.initial is None else distributed.from_canonical(cfg, run.initial, mesh, dtype)
            state = distributed.init_state(recipe, mesh, params)

        def readers(state: TrainState):
            """What the run may ask of a state: to be read, and its held-out loss."""
            snapshot = lambda: distributed.to_training_state(cfg, state)
            return snapshot, lambda evaluation: distributed.evaluate(recipe, state.params, evaluation, mesh)

        after_step = lambda step, state, metrics: run.after_step(step, metrics, *readers(state))
        state = distributed.fit(state, recipe, run.dataset, mesh, on_step=after_step)
        return run.finish(int(state.step), *readers(state))

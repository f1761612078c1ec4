"""A training run from its folder, in PyTorch: resume, train, save.

here                                          jax_llm.engine.run
a trainer, which `fit` changes                a state goes into `fit` and comes out
"""

from pathlib import Path

import torch

from llm_common.run.folder import Run
from llm_common.sharding import MeshConfig
from torch_llm.engine import distributed
from torch_llm.engine.checkpoint import from_training_state, load_weights, to_training_state
from torch_llm.engine.device import select_device
from torch_llm.engine.evaluate import evaluate
from torch_llm.engine.train import Trainer


def fit_and_save(run: Run, device: str = "auto") -> Path:
    """Train as `run` says: from its newest checkpoint, from its initial weights or from the seed, to the end or until
    it is asked to stop. Returns the newest checkpoint.

    Raises UserError if the device is absent, the folder is in use, or the checkpoint there is damaged or of another
    run.
    """
    target = select_device(device)
    with run:
        saved = run.resume()
        seeded = saved is None and run.initial is None
        trainer = Trainer(run.recipe, target, init_weights=seeded)
        if saved is not None:
            from_training_state(trainer, saved)
        elif run.initial is not None:
            load_weights(trainer, run.initial)

        # what the run may ask of the trainer: to be read, and its held-out loss
        readers = (
            lambda: to_training_state(trainer),
            lambda evaluation: evaluate(trainer.model, evaluation),
        )
        trainer.fit(run.dataset, on_step=lambda step, _, metrics: run.after_step(step, metrics, *readers))
        return run.finish(trainer.step, *readers)


def fit_and_save_on_mesh(run: Run, config: MeshConfig, device: torch.device | str = "cpu") -> Path:
    """`fit_and_save` on a mesh. Every process calls it, with a run over the same folder."""
    with run:
        saved = run.resume()
        seeded = saved is None and run.initial is None
        trainer = distributed.ShardedTrainer(run.recipe, config, device, init_weights=seeded)
        if saved is not None:
            trainer.from_training_state(saved)
        elif run.initial is not None:
            trainer.from_canonical(run.initial)
        readers = trainer.to_training_state, trainer.evaluate
        trainer.fit(run.dataset, on_step=lambda step, _, metrics: run.after_step(step, metrics, *readers))
        return run.finish(trainer.step, *readers)

"""A training run from its folder, in PyTorch: resume, train, save.

here                                          jax_llm.run
a trainer, which `fit` changes                a state goes into `fit` and comes out
"""

from pathlib import Path

from llm_common.run import Run
from torch_llm.checkpoint import from_canonical, from_training_state, to_training_state
from torch_llm.evaluate import evaluate
from torch_llm.train import Trainer, select_device


def fit_and_save(run: Run, device: str = "auto") -> Path:
    """Train as `run` says: from its newest checkpoint, from its initial weights or from the seed, to the end or until it is
    asked to stop. Returns the newest checkpoint.

    Raises UserError if the device is absent, the folder is in use, or the checkpoint there is damaged or of another run.
    """
    target = select_device(device)
    with run:
        saved = run.resume()
        seeded = saved is None and run.initial is None
        trainer = Trainer(run.cfg, run.train, run.opt, target, init_weights=seeded)
        if saved is not None:
            from_training_state(trainer, saved)
        elif run.initial is not None:
            from_canonical(trainer.model, run.initial)

        # what the run may ask of the trainer: to be read, and its held-out loss
        readers = (
            lambda: to_training_state(trainer),
            lambda evaluation: evaluate(trainer.model, run.train.compute_dtype, evaluation),
        )
        trainer.fit(run.dataset, on_step=lambda step, _, metrics: run.after_step(step, metrics, *readers))
        return run.finish(trainer.step, *readers)

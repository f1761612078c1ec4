"""The torch side behind the interface that every check uses: canonical float64 arrays in, float64 arrays out.

The twin is `parity/jax_side.py`. Each method goes through the code that a user runs.
"""

from collections.abc import Callable

import numpy as np
import torch

from llm_common.checkpoint import TrainingState
from llm_common.config import ModelConfig, OptimizerConfig, SamplingConfig, TrainConfig
from llm_common.tensors import decays
from parity.compare import Tensors
from torch_llm import checkpoint, random_bits, sampling
from torch_llm.generate import generate
from torch_llm.kv_cache import KVCache
from torch_llm.model import CausalLM, make_model
from torch_llm.optim import make_optimizer
from torch_llm.train import Trainer, loss_and_grads


class TorchSide:
    name = "torch"

    def __init__(self, cfg: ModelConfig, dtype: str, backend: str = "reference") -> None:
        self.cfg, self.dtype, self.backend = cfg, dtype, backend
        self.master = "float64" if dtype == "float64" else "float32"
        torch.set_float32_matmul_precision("highest")

    def _model(self, weights: Tensors, dtype: str | None = None) -> CausalLM:
        model = CausalLM(self.cfg, self.backend).to(getattr(torch, dtype or self.dtype))
        return checkpoint.from_canonical(model, weights)

    def initial_weights(self, seed: int) -> Tensors:
        model = make_model(self.cfg, seed, self.backend, getattr(torch, self.master), "cpu")
        return _float64(checkpoint.to_canonical(model))

    def logits(self, weights: Tensors, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._model(weights)(torch.tensor(ids)).double().numpy()

    def cached_logits(self, weights: Tensors, ids: np.ndarray, prompt: int) -> np.ndarray:
        """The logits of ids (B, T) when the first `prompt` positions are fed together and the rest one by one."""
        model = self._model(weights)
        cache = KVCache(self.cfg, ids.shape[0], ids.shape[1], getattr(torch, self.dtype))
        pieces = [ids[:, :prompt], *np.split(ids[:, prompt:], ids.shape[1] - prompt, axis=1)]
        with torch.no_grad():
            return np.concatenate([model(torch.tensor(piece), cache).double().numpy() for piece in pieces], axis=1)

    def loss_and_grads(self, weights: Tensors, ids: np.ndarray, targets: np.ndarray) -> tuple[float, Tensors]:
        model = self._model(weights)
        loss = loss_and_grads(model, torch.tensor(ids), torch.tensor(targets), getattr(torch, self.dtype))
        grads = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
        grads |= {name: p.grad.double().numpy() for name, p in model.named_parameters() if p.grad is not None}
        return float(loss), grads

    def train(
        self,
        state: TrainingState,
        opt: OptimizerConfig,
        dataset,
        until_step: int,
        on_step: Callable[[int, Callable[[], TrainingState], float], None] | None = None,
        max_skipped_steps: int = 10,
    ) -> TrainingState:
        """Run `Trainer.fit`; `on_step` gets the step, a function that reads the state, and the loss."""
        train = TrainConfig(
            compute_dtype=self.dtype, seq_len=1, attention_backend="reference", max_skipped_steps=max_skipped_steps
        )

        def hook(step, trainer, metrics):
            if on_step is not None:
                on_step(step, lambda: checkpoint.to_training_state(trainer), metrics["loss"])

        trainer = checkpoint.from_training_state(Trainer(self.cfg, train, opt), state)
        torch.set_float32_matmul_precision("highest")
        trainer.fit(dataset, until_step, hook)
        return checkpoint.to_training_state(trainer)

    def adamw(
        self, weights: Tensors, grads: list[Tensors], opt: OptimizerConfig, keep: tuple[int, ...], library: bool
    ) -> dict[int, Tensors]:
        """The weights after the updates numbered in `keep`, from given gradients at lr_max; no clipping.

        library: by `torch.optim.AdamW` instead of ours.
        """
        model = self._model(weights, self.master)
        optimizer = make_optimizer(opt, model)
        if library:
            groups = [
                {"params": [p for p in model.parameters() if decays(p.shape) is flag], "weight_decay": decay}
                for flag, decay in ((True, opt.weight_decay), (False, 0.0))
            ]
            optimizer = torch.optim.AdamW(groups, lr=opt.lr_max, betas=(opt.beta1, opt.beta2), eps=opt.eps)
        kept = {}
        for n, g in enumerate(grads, start=1):
            for name, p in model.named_parameters():
                p.grad = torch.tensor(g[name]).to(p.dtype)
            optimizer.step()
            if n in keep:
                kept[n] = _float64(checkpoint.to_canonical(model))
        return kept

    def sample(self, logits: np.ndarray, cfg: SamplingConfig, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Tokens for logits (n, V), in float32 (float64 for float64)."""
        tensor = torch.tensor(logits).to(getattr(torch, self.master))
        key = random_bits.key(cfg.seed)
        return sampling.sample(tensor, cfg, key, torch.tensor(rows), torch.tensor(positions)).numpy()

    def generate(self, weights: Tensors, prompt: np.ndarray, n_new: int, cfg: SamplingConfig, eos_id: int | None):
        return generate(self._model(weights), prompt, n_new, cfg, eos_id)


def _float64(tensors: Tensors) -> Tensors:
    return {name: x.astype(np.float64) for name, x in tensors.items()}

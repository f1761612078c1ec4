"""Training as an object: the trainer owns the model, the optimizer and the counters.

    here                               jax_llm.train
    Trainer, an object                 TrainState, a value
    Trainer(...)                       init_state(...)
    Trainer.train_step                 make_train_step(...) -> function
    trainer.fit(...)                   state = fit(state, ...)

B batch, T positions.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig, check_length
from llm_common.data import TokenDataset
from llm_common.errors import UserError
from llm_common.schedule import learning_rate
from llm_common.tensors import check_batch
from torch_llm.attention import resolve_backend
from torch_llm.loss import cross_entropy
from torch_llm.model import CausalLM, init_model
from torch_llm.optim import clip_by_global_norm, make_optimizer


class Metrics(NamedTuple):
    loss: Tensor
    grad_norm: Tensor  # before clipping
    skipped: bool  # the update was skipped


def loss_and_grads(model: CausalLM, inputs: Tensor, targets: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Mean loss of a batch; its gradient is left in the `.grad` of the master weights. inputs, targets: (B, T).

    The masters are cast to compute_dtype once, here; autograd casts their gradients back.
    """
    model.zero_grad()
    weights = {name: p.to(compute_dtype) for name, p in model.named_parameters()}
    logits = functional_call(model, weights, (inputs,))  # (B, T, V)
    loss = cross_entropy(logits, targets)
    loss.backward()
    return loss.detach()


@contextlib.contextmanager
def matmul_precision(compute_dtype: str) -> Iterator[None]:
    """float32 means float32: TF32, which rounds the factors to 10 bits, is switched off for it while this is open."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if compute_dtype == "float32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def select_device(name: str) -> torch.device:
    """The device called "cpu", "gpu", "cuda", "cuda:1" or "mps"; "auto": a GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = "cuda" if name == "gpu" else name
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a device that computes")
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        found = "cpu, gpu" if torch.cuda.is_available() else "cpu"
        raise UserError(
            f"torch cannot use device {name!r} here ({str(error).splitlines()[0]}); present: {found}"
        ) from None
    return device


def describe(cfg: ModelConfig, train: TrainConfig, device: str) -> str:
    """What a run on a device (by name) will use, in a line for people. Raises UserError if the device is absent."""
    target = select_device(device)
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else target.type
    backend = resolve_backend(train.attention_backend, target.type, train.compute_dtype)
    return f"{name}, {train.compute_dtype}, {backend} attention"


class Trainer:
    """A training run. `model` holds the masters; `step` counts steps and `optimizer.count` the updates made."""

    def __init__(
        self, cfg: ModelConfig, train: TrainConfig, opt: OptimizerConfig, device: torch.device | str = "cpu"
    ) -> None:
        check_length(cfg, train.seq_len, "seq_len")
        self.cfg, self.train, self.opt, self.device = cfg, train, opt, torch.device(device)
        self.compute_dtype = getattr(torch, train.compute_dtype)
        backend = resolve_backend(train.attention_backend, self.device.type, train.compute_dtype)
        self.model = init_model(cfg, train.seed, backend, getattr(torch, train.master_dtype), self.device)
        self.optimizer = make_optimizer(opt, self.model)
        self.step = 0

    def train_step(self, inputs: Tensor, targets: Tensor) -> Metrics:
        """One step: gradients, global norm, clip, AdamW."""
        with matmul_precision(self.train.compute_dtype):
            loss = loss_and_grads(self.model, inputs, targets, self.compute_dtype)
        norm = clip_by_global_norm(self.model.parameters(), self.opt.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.opt, self.step)
            self.optimizer.step()
        self.step += 1
        return Metrics(loss, norm, not finite)

    def fit(
        self,
        dataset: TokenDataset,
        until_step: int | None = None,
        on_step: Callable[[int, "Trainer", dict[str, float]], None] | None = None,
    ) -> None:
        """Train from `self.step` to `until_step` (default: opt.total_steps).

        `on_step(step, trainer, metrics)` is called after each step with loss, grad_norm, lr and skipped. Raises
        UserError if too many updates in a row were skipped.
        """
        skipped_in_row = 0
        while self.step < (self.opt.total_steps if until_step is None else until_step):
            lr = learning_rate(self.opt, self.step)
            batch = dataset.batch(self.step)
            check_batch(*batch, self.cfg.vocab_size, f"step {self.step}")
            inputs, targets = (torch.tensor(np.ascontiguousarray(x), device=self.device).long() for x in batch)
            metrics = self.train_step(inputs, targets)
            skipped_in_row = skipped_in_row + 1 if metrics.skipped else 0
            if on_step is not None:
                numbers = {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm), "lr": lr}
                on_step(self.step, self, numbers | {"skipped": metrics.skipped})
            if skipped_in_row >= self.train.max_skipped_steps:
                raise UserError(
                    f"the gradient norm was not finite in {skipped_in_row} steps in a row (to step {self.step}); "
                    "lower lr_max, lengthen warmup_steps, or look for bad tokens in the data"
                )

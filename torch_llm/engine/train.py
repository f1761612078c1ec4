"""Training as an object: the trainer owns the model, the optimizer and the counters.

    here                               jax_llm.engine.train
    Trainer, an object                 TrainState, a value
    Trainer(...)                       init_state(...)
    Trainer.train_step                 make_train_step(...) -> function
    trainer.fit(...)                   state = fit(state, ...)

B batch, T positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llm_common.config import Recipe
from llm_common.data.datasets import Dataset, Prefetch
from llm_common.run.metrics import StepMetrics
from llm_common.run.previous_step import PreviousStep
from llm_common.schedule import learning_rate
from llm_common.tensors import check_batch, tensor_shapes
from torch_llm.engine.device import deterministic_algorithms, matmul_precision, to_device, to_host_later
from torch_llm.engine.diagnose import first_not_finite
from torch_llm.engine.gradients import batch_loss, loss_and_grads
from torch_llm.engine.plan import make_plan
from torch_llm.fast.optim import CompiledAdamW, sums_of_squares
from torch_llm.kernels import Kernels
from torch_llm.model import empty_model, initial_tensors
from torch_llm.optim import AdamW, clip_factor, global_norm, gradient, make_optimizer


class Trainer:
    """A training run. `model` is in the compute dtype, and `optimizer` owns the masters of its parameters and their
    moments.

    `step` counts steps and `optimizer.count` the updates made.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        init_weights: bool = True,
    ) -> None:
        """init_weights: with the weights of `train.seed`; otherwise they are still to be filled in."""
        self.recipe, self.cfg, self.device = recipe, recipe.model, torch.device(device)
        self.compute_dtype = getattr(torch, recipe.train.compute_dtype)
        upcast_dtype = torch.promote_types(self.compute_dtype, torch.float32)
        self._batch_loss = batch_loss
        self._pending: StepMetrics | None = None  # the last step, until it is known whether it made an update
        self.step = 0
        plan = make_plan(recipe, self.device)
        self.compiled = plan.compiled
        self.optimizer_class = CompiledAdamW if self.compiled else AdamW
        self._make_model(plan.kernels)
        if init_weights:
            self.init_weights()
        if self.compiled:
            # the table must be on the device before the program is traced, which would be traced again after the first
            # step
            self.model.model.places.rotary_table(torch.zeros(1, dtype=torch.long, device=self.device), upcast_dtype)
            self._compile()

    # What a trainer for many devices does in another way: `torch_llm.engine.distributed.ShardedTrainer`.

    def _make_model(self, kernels: Kernels) -> None:
        self.model = empty_model(self.cfg, self.compute_dtype, self.device, kernels)
        self.optimizer = make_optimizer(self.recipe.optimizer, self.model, self.optimizer_class)

    def init_weights(self) -> None:
        """Fill in the initial weights of `train.seed`: into the masters, which are rounded afterwards."""
        parameters, dtype = dict(self.model.named_parameters()), getattr(torch, self.recipe.train.master_dtype)
        for name, x in initial_tensors(self.cfg, self.recipe.train.seed, dtype, parameters):
            self.optimizer.set_master(parameters[name], x)

    def masters(self) -> dict[str, Tensor]:
        """The weights as the optimizer keeps them, by canonical name, in float32 (float64 for float64)."""
        parameters = dict(self.model.named_parameters())
        return {name: self.optimizer.master(parameters[name]).detach() for name in tensor_shapes(self.cfg)}

    def _compile(self) -> None:
        # dynamic=False compiles once per shape. By default the second shape triggers a dynamic-shape program, which
        # fails to compile on a GPU.
        self._batch_loss = torch.compile(batch_loss, dynamic=False)

    def loss_and_grads(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, with the gradients left in the parameters."""
        return loss_and_grads(
            self.model, inputs, targets, self.recipe.execution.gradient_accumulation_steps, self._batch_loss
        )

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global norm of the gradients."""
        return global_norm([*map(gradient, self.model.parameters())], sums_of_squares)

    def read_batch(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this step, each (B, T), on the device. Raises UserError for an id outside the
        vocabulary.
        """
        batch = dataset.batch(self.step)
        check_batch(*batch, self.cfg.vocab_size, f"step {self.step}")
        inputs, targets = (to_device(x, self.device) for x in batch)
        return inputs, targets

    def first_not_finite(self, inputs: Tensor, targets: Tensor) -> str:
        """Which tensor is the first that is not finite, for people."""
        return first_not_finite(self.model, inputs, targets)

    # The same for both.

    def train_step(self, inputs: Tensor, targets: Tensor) -> StepMetrics:
        """One step: gradients, global norm, clip, AdamW.

        Compiled, it does not wait for the device: whether the norm is finite is asked there, and here only before the
        next update, whose bias corrections depend on it.
        """
        with matmul_precision(self.recipe.train.compute_dtype), deterministic_algorithms(self.recipe.execution):
            loss = self.loss_and_grads(inputs, targets)
        norm, lr = self.grad_norm(), learning_rate(self.recipe.optimizer, self.step)
        factor, finite = clip_factor(norm, self.recipe.optimizer.max_grad_norm), torch.isfinite(norm)
        self.resolve_last_step()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if isinstance(self.optimizer, CompiledAdamW):
            self.optimizer.step(factor=factor, finite=finite)
        elif finite:
            self.optimizer.step(factor=factor)
        self.step += 1
        metrics = StepMetrics(read_later(loss, norm, ~finite, lr))
        self._pending = metrics if self.compiled else None
        return metrics

    def resolve_last_step(self) -> None:
        """Wait for the last step, and count its update only if there was one."""
        if self._pending is not None and self._pending["skipped"]:
            self.optimizer.count -= 1
        self._pending = None

    def fit(
        self,
        dataset: Dataset,
        until_step: int | None = None,
        on_step: Callable[[int, "Trainer", StepMetrics], bool | None] | None = None,
    ) -> None:
        """Train from `self.step` to `until_step` (default: the optimizer's total_steps).

        `on_step(step, trainer, metrics)` is called after each step is begun; if it returns True, training ends there. A
        step is waited for only when its metrics are read, and at the latest when the next one has been begun, so that
        the device always has work. Raises UserError if too many updates in a row were skipped, naming the tensor that
        is the first to be not finite.
        """
        previous = PreviousStep(self.optimizer.count, self.recipe.train.max_skipped_steps)
        dataset = Prefetch(dataset)
        while self.step < (self.recipe.optimizer.total_steps if until_step is None else until_step):
            inputs, targets = self.read_batch(dataset)
            metrics = self.train_step(inputs, targets)
            previous.resolve(self.first_not_finite)
            previous.begin(self.step, metrics, inputs, targets)
            if on_step is not None and on_step(self.step, self, metrics):
                break
        previous.resolve(self.first_not_finite)


def read_later(
    loss: Tensor, norm: Tensor, skipped: Tensor, lr: float
) -> Callable[[], tuple[float, float, float, bool]]:
    """A function that reads the numbers of a step, and waits for that step but for nothing begun after it."""
    numbers = to_host_later(torch.stack([loss.to(norm.dtype), norm, skipped.to(norm.dtype)]))

    def read() -> tuple[float, float, float, bool]:
        loss, norm, skipped = numbers().tolist()
        return loss, norm, lr, bool(skipped)

    return read

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

import numpy as np
import torch
from torch import Tensor, nn

from llm_common.budget import host_memory, host_memory_used
from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig, check_length
from llm_common.cudnn import why_not_cudnn
from llm_common.data import Dataset, Prefetch
from llm_common.errors import UserError
from llm_common.metrics import StepMetrics
from llm_common.schedule import learning_rate
from llm_common.tensors import check_batch, tensor_shapes
from torch_llm.fast.attention import resolve_backend, takes_blocks
from torch_llm.fast.kernels import make_kernels
from torch_llm.fast.optim import CompiledAdamW, sums_of_squares
from torch_llm.kernels import Kernels
from torch_llm.loss import IGNORE_INDEX, cross_entropy
from torch_llm.model import CausalLM, empty_model, initial_tensors
from torch_llm.optim import AdamW, clip_factor, global_norm, gradient, make_optimizer, wide_dtype


def batch_loss(model: CausalLM, inputs: Tensor, targets: Tensor, count: Tensor) -> Tensor:
    """Sum of the losses in nats of inputs and targets (B, T), over `count`."""
    return model.kernels.loss(model, inputs, targets, count)


def loss_and_grads(
    model: CausalLM,
    inputs: Tensor,
    targets: Tensor,
    accumulation_steps: int = 1,
    batch_loss: Callable[..., Tensor] = batch_loss,
) -> Tensor:
    """Mean loss of a batch; its gradients are left in the parameters, where `optim.gradient` finds them. inputs, targets: (B, T).

    With accumulation the batch is cut into `accumulation_steps` micro-batches, one after the other; the gradients are added up in
    float32, and the mean is over all counted tokens of the batch. batch_loss: that function, or a compiled form of it.
    """
    count = (targets != IGNORE_INDEX).sum()
    model.zero_grad()
    losses = []
    with summed_in_float32(model) if accumulation_steps > 1 else contextlib.nullcontext():
        for micro_batch in zip(inputs.chunk(accumulation_steps), targets.chunk(accumulation_steps), strict=True):
            loss = batch_loss(model, *micro_batch, count)
            loss.backward()
            losses.append(loss.detach())
    return torch.stack(losses).sum()


@contextlib.contextmanager
def summed_in_float32(model: nn.Module) -> Iterator[None]:
    """While this is open the gradients of parameters of a narrower dtype are added up in float32, as `main_grad`."""
    narrow = [p for p in model.parameters() if p.dtype != wide_dtype([p])]

    def add(p: Tensor) -> None:
        assert p.grad is not None
        main = getattr(p, "main_grad", None)
        setattr(p, "main_grad", p.grad.to(wide_dtype([p])) if main is None else main.add_(p.grad))  # noqa: B010
        p.grad = None

    for p in narrow:
        setattr(p, "main_grad", None)  # noqa: B010
    handles = [p.register_post_accumulate_grad_hook(add) for p in narrow]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    name = device_kind(device)
    backend = resolve_backend(train.attention_backend, train.compute_dtype)
    refused = why_not_cudnn(cfg, train.compute_dtype, train.seq_len)
    instead = f" (not cuDNN's: {refused})" if target.type == "cuda" and backend == "sdpa" and refused else ""
    compiled = "torch.compile" if compiles(train, target) else "not compiled"
    hides = train.document_separator is not None or (cfg.sliding_window or train.seq_len) < train.seq_len
    dtype = getattr(torch, train.compute_dtype)
    if hides and compiles(train, target) and takes_blocks(backend, target.type, dtype, cfg.head_dim):
        instead = " (on one GPU FlexAttention, for its mask)"
    apart = ", documents apart" if train.document_separator is not None else ""
    more = apart + (", deterministic" if train.deterministic else "")
    return f"{name}, {train.compute_dtype}, {backend} attention{instead}, {compiled}, remat {train.remat}{more}"


def run_kernels(cfg: ModelConfig, train: TrainConfig, device: torch.device) -> Kernels:
    """The kernels of a run's settings on a device."""
    backend = resolve_backend(train.attention_backend, train.compute_dtype)
    blocks = takes_blocks(backend, device.type, getattr(torch, train.compute_dtype), cfg.head_dim)
    return make_kernels(backend, train.remat, train.loss_chunks, train.document_separator, blocks)


def compiles(train: TrainConfig, device: torch.device) -> bool:
    """Whether a run uses torch.compile: by itself on a GPU, where it is worth its half minute."""
    return train.compile == "on" or (train.compile == "auto" and device.type == "cuda")


@contextlib.contextmanager
def deterministic_algorithms(train: TrainConfig) -> Iterator[None]:
    """While this is open torch takes, if the run asks for it, only algorithms that give the same bits every time."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or train.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def memory_limit(device: str) -> int | None:
    """How many bytes a device (by name) can give now, or None if it does not say."""
    target = select_device(device)
    return torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else host_memory()


def memory_used(device: str) -> int:
    """The most bytes that were in use on a device (by name)."""
    target = select_device(device)
    return torch.cuda.max_memory_allocated(target) if target.type == "cuda" else host_memory_used()


def device_kind(device: str) -> str:
    """What a device (by name) calls itself."""
    target = select_device(device)
    return torch.cuda.get_device_name(target) if target.type == "cuda" else target.type


class Trainer:
    """A training run. `model` is in the compute dtype, and `optimizer` owns the masters of its parameters and their moments.

    `step` counts steps and `optimizer.count` the updates made.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        train: TrainConfig,
        opt: OptimizerConfig,
        device: torch.device | str = "cpu",
        init_weights: bool = True,
    ) -> None:
        """init_weights: with the weights of `train.seed`; otherwise they are still to be filled in."""
        check_length(cfg, train.seq_len, "seq_len")
        self.cfg, self.train, self.opt, self.device = cfg, train, opt, torch.device(device)
        self.compute_dtype = getattr(torch, train.compute_dtype)
        upcast_dtype = torch.promote_types(self.compute_dtype, torch.float32)
        self._batch_loss = batch_loss
        self._unsettled: StepMetrics | None = None  # of a step whose update was counted before it was known to be one
        self.step = 0
        self.compiled = compiles(train, self.device)
        self.optimizer_class = CompiledAdamW if self.compiled else AdamW
        self._make_model(run_kernels(cfg, train, self.device))
        if init_weights:
            self.init_weights()
        if self.compiled:
            # the table must be on the device before the program is traced, which would be traced again after the first step
            self.model.model.places.rotary_table(torch.zeros(1, dtype=torch.long, device=self.device), upcast_dtype)
            self._compile()

    # What a trainer for many devices does in another way: `torch_llm.distributed.ShardedTrainer`.

    def _make_model(self, kernels: Kernels) -> None:
        self.model = empty_model(self.cfg, self.compute_dtype, self.device, kernels)
        self.optimizer = make_optimizer(self.opt, self.model, self.optimizer_class)

    def init_weights(self) -> None:
        """Fill in the initial weights of `train.seed`: into the masters, which are rounded afterwards."""
        parameters, dtype = dict(self.model.named_parameters()), getattr(torch, self.train.master_dtype)
        for name, x in initial_tensors(self.cfg, self.train.seed, dtype, parameters):
            self.optimizer.set_master(parameters[name], x)

    def masters(self) -> dict[str, Tensor]:
        """The weights as the optimizer keeps them, by canonical name, in float32 (float64 for float64)."""
        parameters = dict(self.model.named_parameters())
        return {name: self.optimizer.master(parameters[name]).detach() for name in tensor_shapes(self.cfg)}

    def _compile(self) -> None:
        # a program for each shape: of one for any shape, which a second shape brings, the compiler fails on a GPU
        self._batch_loss = torch.compile(batch_loss, dynamic=False)

    def loss_and_grads(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, with the gradients left in the parameters."""
        return loss_and_grads(self.model, inputs, targets, self.train.gradient_accumulation_steps, self._batch_loss)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global norm of the gradients."""
        return global_norm([*map(gradient, self.model.parameters())], sums_of_squares)

    def read_batch(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this step, each (B, T), on the device. Raises UserError for an id outside the vocabulary."""
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

        Compiled, it does not wait for the device: whether the norm is finite is asked there, and here only before the next
        update, whose bias corrections depend on it.
        """
        with matmul_precision(self.train.compute_dtype), deterministic_algorithms(self.train):
            loss = self.loss_and_grads(inputs, targets)
        norm, lr = self.grad_norm(), learning_rate(self.opt, self.step)
        factor, finite = clip_factor(norm, self.opt.max_grad_norm), torch.isfinite(norm)
        self.settle()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if isinstance(self.optimizer, CompiledAdamW):
            self.optimizer.step(factor=factor, finite=finite)
        elif finite:
            self.optimizer.step(factor=factor)
        self.step += 1
        metrics = StepMetrics(read_later(loss, norm, ~finite, lr))
        self._unsettled = metrics if self.compiled else None
        return metrics

    def settle(self) -> None:
        """Wait for the last step, and count its update only if there was one."""
        if self._unsettled is not None and self._unsettled["skipped"]:
            self.optimizer.count -= 1
        self._unsettled = None

    def fit(
        self,
        dataset: Dataset,
        until_step: int | None = None,
        on_step: Callable[[int, "Trainer", StepMetrics], bool | None] | None = None,
    ) -> None:
        """Train from `self.step` to `until_step` (default: opt.total_steps).

        `on_step(step, trainer, metrics)` is called after each step is begun; if it returns True, training ends there. A step
        is waited for only when its metrics are read, and at the latest when the next one has been begun, so that the device
        always has work. Raises UserError if too many updates in a row were skipped, naming the tensor that is the first to be
        not finite.
        """
        skipped_in_row = 0
        before: tuple[int, StepMetrics, Tensor, Tensor] | None = None  # the step before, which is not waited for

        def look_back() -> None:
            """Wait for the step before."""
            nonlocal skipped_in_row
            if before is None:
                return
            number, metrics, *batch = before
            skipped_in_row = skipped_in_row + 1 if metrics["skipped"] else 0
            if skipped_in_row >= self.train.max_skipped_steps:
                raise UserError(
                    f"the gradient norm was not finite in {skipped_in_row} steps in a row (to step {number}): "
                    f"{self.first_not_finite(*batch)}; "
                    "lower lr_max, lengthen warmup_steps, or look for bad tokens in the data"
                )

        dataset = Prefetch(dataset)
        while self.step < (self.opt.total_steps if until_step is None else until_step):
            inputs, targets = self.read_batch(dataset)
            metrics = self.train_step(inputs, targets)
            look_back()
            before = self.step, metrics, inputs, targets
            if on_step is not None and on_step(self.step, self, metrics):
                break
        look_back()


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """A batch's ids, int64, on a device, of whose work nothing is waited for."""
    ids = torch.tensor(np.ascontiguousarray(x))
    return (ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)).long()


def read_later(
    loss: Tensor, norm: Tensor, skipped: Tensor, lr: float
) -> Callable[[], tuple[float, float, float, bool]]:
    """A function that reads the numbers of a step, and waits for that step but for nothing begun after it."""
    numbers = to_host_later(torch.stack([loss.to(norm.dtype), norm, skipped.to(norm.dtype)]))

    def read() -> tuple[float, float, float, bool]:
        loss, norm, skipped = numbers().tolist()
        return loss, norm, lr, bool(skipped)

    return read


def to_host_later(x: Tensor) -> Callable[[], Tensor]:
    """A function that gives x on the host and waits until it is there, but for nothing that the device begins afterwards."""
    if not x.is_cuda:
        return lambda: x
    copy, there = x.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()

    def wait() -> Tensor:
        there.synchronize()
        return copy

    return wait


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def watch_outputs(model: CausalLM, forward: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """What a forward pass gives, and which module's output is the first in it that is not finite, for people ("": none)."""
    found: list[str] = []

    def look(name: str):
        def hook(module, args, out):
            if not finite(out) and not found:
                found.append(name or "the model")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        logits = forward()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, f"the output of {found[0]} is the first tensor that is not finite" if found else ""


@torch.no_grad()
def first_not_finite(model: CausalLM, inputs: Tensor, targets: Tensor) -> str:
    """Which tensor is the first that is not finite: a weight, else a module's output in the order in which they are computed,
    else the loss, else a gradient in the order of the backward pass. For people; runs the model once more, uncompiled.
    """
    parameters, names = dict(model.named_parameters()), list(tensor_shapes(model.cfg))
    for name in names:
        if not finite(parameters[name]):
            return f"the weight {name} is the first tensor that is not finite"
    logits, found = watch_outputs(model, lambda: model(inputs))
    if found:
        return f"{found}; all weights are finite"
    if not finite(cross_entropy(logits, targets)):
        return "the loss is the first tensor that is not finite; all logits are finite"
    with torch.enable_grad():
        loss_and_grads(model, inputs, targets)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for name in reversed(names):
        if name in grads and not finite(grads[name]):
            return f"the gradient of {name} is the first tensor that is not finite; the loss is finite"
    return "weights, activations, loss and gradients are finite now: the norm overflowed"

"""Training as an object: the trainer owns the model, the optimizer and the counters.

    here                               jax_llm.train
    Trainer, an object                 TrainState, a value
    Trainer(...)                       init_state(...)
    Trainer.train_step                 make_train_step(...) -> function
    trainer.fit(...)                   state = fit(state, ...)

B batch, T positions.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from llm_common.budget import host_memory, host_memory_used
from llm_common.config import ModelConfig, OptimizerConfig, TrainConfig, check_length
from llm_common.cudnn import why_not_cudnn
from llm_common.data import Dataset, Prefetch
from llm_common.errors import UserError
from llm_common.metrics import StepMetrics
from llm_common.schedule import learning_rate
from llm_common.tensors import check_batch, tensor_shapes
from torch_llm.attention import resolve_backend, takes_blocks
from torch_llm.chunked_loss import chunked_cross_entropy
from torch_llm.loss import IGNORE_INDEX, cross_entropy
from torch_llm.model import CausalLM, empty_model
from torch_llm.optim import clip_factor, global_norm, make_optimizer


def cast(model: CausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    """A model's weights by name, in a dtype, as leaves of their own; in the model's dtype they share its memory."""
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()}


def batch_loss(
    model: CausalLM, weights: dict[str, Tensor], inputs: Tensor, targets: Tensor, count: Tensor, loss_chunks: int = 1
) -> Tensor:
    """Sum of the losses of inputs and targets (B, T) over `count`, with weights in the place of the model's own."""
    if loss_chunks > 1:
        own = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
        x = functional_call(model.model, own, (inputs,))  # (B, T, D)
        return chunked_cross_entropy(x, head_weight(weights), targets, count, loss_chunks)
    return cross_entropy(functional_call(model, weights, (inputs,)), targets, count)


_uncompiled_loss = batch_loss


@contextlib.contextmanager
def weights_in_place(model: CausalLM, weights: dict[str, Tensor]) -> Iterator[None]:
    """While this is open a model's weights are these.

    `functional_call` puts them there for the forward pass alone; what remat computes again in the backward pass needs them, too.
    """
    own = dict(model.named_parameters())

    def put(tensors: Mapping[str, Tensor]) -> None:
        for name, x in tensors.items():
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._parameters[last] = x  # pyright: ignore[reportArgumentType]

    try:
        put(weights)
        yield
    finally:
        put(own)


def loss_and_grads(
    model: CausalLM,
    inputs: Tensor,
    targets: Tensor,
    compute_dtype: torch.dtype,
    accumulation_steps: int = 1,
    loss_chunks: int = 1,
    batch_loss: Callable[..., Tensor] = batch_loss,
) -> Tensor:
    """Mean loss of a batch; its gradient is left in the `.grad` of the master weights, in compute_dtype. inputs, targets: (B, T).

    The masters are cast to compute_dtype once, here. With accumulation the batch is cut into `accumulation_steps`
    micro-batches, one after the other; the gradients are added up in float32, and the mean is over all counted tokens of the
    batch. loss_chunks: how many parts the logits are made in, one after the other. batch_loss: that function, or a compiled form
    of it.
    """
    masters = dict(model.named_parameters())
    weights = {name: p.requires_grad_() for name, p in cast(model, compute_dtype).items()}
    count = (targets != IGNORE_INDEX).sum()
    model.zero_grad()
    losses = []
    computes_again = model.model.remat != "none" and batch_loss is _uncompiled_loss
    for micro_batch in zip(inputs.chunk(accumulation_steps), targets.chunk(accumulation_steps), strict=True):
        with weights_in_place(model, weights) if computes_again else contextlib.nullcontext():
            loss = batch_loss(model, weights, *micro_batch, count, loss_chunks)
            losses.append(loss.detach())
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for p, g in zip(masters.values(), grads, strict=True):
            if g is None:
                continue
            if accumulation_steps == 1:
                p.grad_dtype = g.dtype  # no float32 copy of what is used once
                p.grad = g
            else:
                p.grad = g.to(p.dtype) if p.grad is None else p.grad.add_(g)
    return torch.stack(losses).sum()


def head_weight(weights: dict[str, Tensor]) -> Tensor:
    """The head's matrix (V, D): its own, or the embedding's if it is tied."""
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])


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
    if (
        hides
        and compiles(train, target)
        and takes_blocks(backend, target.type, getattr(torch, train.compute_dtype), cfg.head_dim)
    ):
        instead = " (on one GPU FlexAttention, for its mask)"
    apart = ", documents apart" if train.document_separator is not None else ""
    more = apart + (", deterministic" if train.deterministic else "")
    return f"{name}, {train.compute_dtype}, {backend} attention{instead}, {compiled}, remat {train.remat}{more}"


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
    """A training run. `model` holds the masters; `step` counts steps and `optimizer.count` the updates made."""

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
        backend = resolve_backend(train.attention_backend, train.compute_dtype)
        master_dtype = getattr(torch, train.master_dtype)
        upcast_dtype = torch.promote_types(self.compute_dtype, torch.float32)
        self._batch_loss = batch_loss
        self._unsettled: StepMetrics | None = None  # of a step whose update was counted before it was known to be one
        self.step = 0
        self._make_model(backend, master_dtype)
        if init_weights:
            self.init_weights()
        self.compiled = compiles(train, self.device)
        if self.compiled:
            # the table must be on the device before the program is traced, which would be traced again after the first step
            self.model.model.rotary_table(torch.zeros(1, dtype=torch.long, device=self.device), upcast_dtype)
            self._compile()

    # What a trainer for many devices does in another way: `torch_llm.distributed.ShardedTrainer`.

    def _make_model(self, backend: str, dtype: torch.dtype) -> None:
        self.model = empty_model(self.cfg, backend, dtype, self.device, self.train.remat, self.train.document_separator)
        self.optimizer = make_optimizer(self.opt, self.model)

    def init_weights(self) -> None:
        """Fill in the initial weights of `train.seed`."""
        self.model.init_weights(self.train.seed)

    def _compile(self) -> None:
        # a program for each shape: of one for any shape, which a second shape brings, the compiler fails on a GPU
        self._batch_loss = torch.compile(batch_loss, dynamic=False)
        self.optimizer.compile_update()

    def loss_and_grads(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, with the gradients left in the masters' `.grad`."""
        steps, chunks = self.train.gradient_accumulation_steps, self.train.loss_chunks
        return loss_and_grads(self.model, inputs, targets, self.compute_dtype, steps, chunks, self._batch_loss)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The global norm of the gradients."""
        return global_norm(p.grad for p in self.model.parameters() if p.grad is not None)

    def read_batch(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this step, each (B, T), on the device. Raises UserError for an id outside the vocabulary."""
        batch = dataset.batch(self.step)
        check_batch(*batch, self.cfg.vocab_size, f"step {self.step}")
        inputs, targets = (to_device(x, self.device) for x in batch)
        return inputs, targets

    def first_not_finite(self, inputs: Tensor, targets: Tensor) -> str:
        """Which tensor is the first that is not finite, for people."""
        return first_not_finite(self.model, inputs, targets, self.compute_dtype)

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
        if self.compiled:
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
def first_not_finite(model: CausalLM, inputs: Tensor, targets: Tensor, compute_dtype: torch.dtype) -> str:
    """Which tensor is the first that is not finite: a weight, else a module's output in the order in which they are computed,
    else the loss, else a gradient in the order of the backward pass. For people; runs the model once more, uncompiled.
    """
    weights, names = cast(model, compute_dtype), list(tensor_shapes(model.cfg))
    for name in names:
        if not finite(weights[name]):
            return f"the weight {name} is the first tensor that is not finite"
    logits, found = watch_outputs(model, lambda: functional_call(model, weights, (inputs,)))
    if found:
        return f"{found}; all weights are finite"
    if not finite(cross_entropy(logits, targets)):
        return "the loss is the first tensor that is not finite; all logits are finite"
    with torch.enable_grad():
        loss_and_grads(model, inputs, targets, compute_dtype)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in reversed(names):
        if name in grads and not finite(grads[name]):
            return f"the gradient of {name} is the first tensor that is not finite; the loss is finite"
    return "weights, activations, loss and gradients are finite now: the norm overflowed"

"""The mean loss of a batch and its gradients, in micro-batches if a batch is too large.

    here                                   jax_llm.engine.gradients
    gradients are left in the parameters   gradients are returned
    a loop and a hook add up micro-batches a scan adds up micro-batches

B batch, T positions.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from torch_llm.loss import IGNORE_INDEX
from torch_llm.model import CausalLM
from torch_llm.optim import wide_dtype


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
    """Mean loss of a batch; its gradients are left in the parameters, where `optim.gradient` finds them. inputs,
    targets: (B, T).

    With accumulation the batch is cut into `accumulation_steps` micro-batches, one after the other; the gradients are
    added up in float32, and the mean is over all counted tokens of the batch. batch_loss: that function, or a compiled
    form of it.
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

"""The loss of a model on held-out tokens.

B batch, T positions.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from llm_common.config import Recipe
from llm_common.data.evaluation import EvaluateLoss, Evaluation
from llm_common.errors import UserError
from llm_common.tensors import Tensors
from torch_llm.engine.checkpoint import from_canonical
from torch_llm.engine.device import matmul_precision, select_device
from torch_llm.engine.diagnose import first_not_finite
from torch_llm.engine.plan import make_plan
from torch_llm.loss import cross_entropy_sum
from torch_llm.model import CausalLM, empty_model


def batch_loss(model: CausalLM, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: sum of the losses in nats and number of counted targets, (B,) each, for inputs and targets
    (B, T).
    """
    logits = model(inputs)
    losses, counts = zip(*(cross_entropy_sum(*row) for row in zip(logits, targets, strict=True)), strict=True)
    return torch.stack(losses), torch.stack(counts)


@torch.no_grad()
def evaluate(model: CausalLM, evaluation: Evaluation) -> tuple[float, int]:
    """Sum of the losses in nats over all held-out tokens, rows added up in float64, and how many tokens those are.

    With the weights as the model has them: a trainer's are those of the compute dtype.
    """
    total, count = 0.0, 0
    device, dtype = model.model.norm.weight.device, str(model.model.norm.weight.dtype).removeprefix("torch.")
    with matmul_precision(dtype):
        for inputs, targets in evaluation.batches():
            ids, labels = (torch.tensor(x, device=device).long() for x in (inputs, targets))
            loss, n = batch_loss(model, ids, labels)
            total, count = total + float(loss.double().sum()), count + int(n.sum())
            if not math.isfinite(total):
                why = first_not_finite(model, ids, labels)
                raise UserError(f"the loss is not finite: {why}")
    return total, count


@contextlib.contextmanager
def evaluator(recipe: Recipe, weights: Tensors, device: str = "auto") -> Iterator[EvaluateLoss]:
    """Inside `with`: `evaluate` of canonical weights on a device by name, all but its last argument filled in."""
    target, dtype = select_device(device), getattr(torch, recipe.train.compute_dtype)
    model = empty_model(recipe.model, dtype, target, make_plan(recipe, target).kernels)
    yield partial(evaluate, from_canonical(model, weights))

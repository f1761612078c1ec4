"""The loss of a model on held-out tokens.

B batch, T positions.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_llm.engine.checkpoint import from_canonical, to_host
from jax_llm.engine.device import matmul_precision, select_device, x64
from jax_llm.engine.diagnose import first_not_finite
from jax_llm.engine.gradients import cast
from jax_llm.engine.plan import make_model
from jax_llm.loss import cross_entropy_sum
from jax_llm.model import CausalLM
from jax_llm.params import Params
from llm_common.config import Recipe
from llm_common.data.evaluation import EvaluateLoss, Evaluation
from llm_common.errors import UserError
from llm_common.tensors import Tensors


@partial(jax.jit, static_argnames=("model", "compute_dtype"))
def batch_loss(
    params: Params, inputs: Array, targets: Array, *, model: CausalLM, compute_dtype: str
) -> tuple[Array, Array]:
    """Of each row: sum of the losses in nats and number of counted targets, (B,) each, for inputs and targets
    (B, T).
    """
    logits, _ = model.apply({"params": cast(params, compute_dtype)}, inputs)
    return jax.vmap(cross_entropy_sum)(logits, targets)


def evaluate(
    model: CausalLM,
    params: Params,
    compute_dtype: str,
    evaluation: Evaluation,
    put: Callable[[np.ndarray], Array] = jnp.array,
) -> tuple[float, int]:
    """Sum of the losses in nats over all held-out tokens, rows added up in float64, and how many tokens those are.

    put: brings a batch's inputs or targets (B, T) to the device, or to the devices of a mesh.
    """
    total, count = 0.0, 0
    with matmul_precision(compute_dtype):
        for inputs, targets in evaluation.batches():
            batch = put(inputs), put(targets)
            loss, n = batch_loss(params, *batch, model=model, compute_dtype=compute_dtype)
            total, count = total + float(to_host(loss).astype(np.float64).sum()), count + int(to_host(n).sum())
            if not math.isfinite(total):
                why = first_not_finite(model, cast(params, compute_dtype), *batch)
                raise UserError(f"the loss is not finite: {why}")
    return total, count


@contextlib.contextmanager
def evaluator(recipe: Recipe, weights: Tensors, device: str = "auto") -> Iterator[EvaluateLoss]:
    """Inside `with`: `evaluate` of canonical weights on a device by name, all but its last argument filled in."""
    target, train = select_device(device), recipe.train
    with jax.default_device(target), x64(train.master_dtype):
        params = from_canonical(recipe.model, weights, jnp.dtype(train.compute_dtype))
        yield partial(evaluate, make_model(recipe, target.platform), params, train.compute_dtype)

"""Other libraries' models as cases of `benchmark.py`: the same shape, trained and decoded as their own documentation
advises.

A file of yours with functions `train` and `decode` of these arguments, or one of them, is one more peer: `--peer
path/to/mine.py`. If it has a list `packages`, their versions are written into the table; `model_types` are those that
it takes, if not all.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from llm_common.config import ModelConfig, Recipe
from llm_common.errors import UserError


@functools.cache
def find_peer(name: str) -> ModuleType | SimpleNamespace:
    """The functions `train` and `decode` of a peer, or one of them, by its name or from a file."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--peer {name}: no such file")
        spec = importlib.util.spec_from_file_location(f"peer of {name}", name)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a stranger's file raises
            raise UserError(f"--peer {name} cannot be imported: {type(error).__name__}: {error}") from None
        return module
    if name not in PEERS:
        raise UserError(f"--peer {name}: unknown; known: {', '.join(PEERS)}, or a file with functions train and decode")
    for package in PEERS[name].packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--peer {name}: {package} is not installed")
    return PEERS[name]


def make_llama(cfg: ModelConfig, dtype: Any, device: Any) -> Any:
    """The transformers model of a config, with random weights."""
    import torch
    import transformers

    values = {key: value for key, value in cfg.to_hf().items() if key not in ("architectures", "torch_dtype", "dtype")}
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values), dtype=dtype)
    return model


def autocast_step(
    parameters: Iterable[Any], loss: Callable[..., Any], recipe: Recipe, device: Any
) -> Callable[[np.ndarray, np.ndarray], Any]:
    """A step of float32 weights under autocast, with torch's fused AdamW; returns the loss, not waited for.

    loss: the mean loss of ids and labels, each (B, T).
    """
    import torch

    opt, dtype, platform = recipe.optimizer, getattr(torch, recipe.train.compute_dtype), torch.device(device).type
    parameters = list(parameters)
    if platform == "cuda":
        torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(
        parameters,
        lr=opt.lr_max,
        betas=(opt.beta1, opt.beta2),
        eps=opt.eps,
        weight_decay=opt.weight_decay,
        fused=platform == "cuda",
    )

    def step(inputs: np.ndarray, targets: np.ndarray) -> Any:
        ids, labels = (torch.tensor(np.ascontiguousarray(x), device=device).long() for x in (inputs, targets))
        with torch.autocast(platform, dtype, enabled=dtype == torch.bfloat16):
            value = loss(ids, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, opt.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def train_transformers(recipe: Recipe, device: Any, liger: bool = False) -> Callable[[np.ndarray, np.ndarray], Any]:
    """`autocast_step` of the model, compiled on a GPU."""
    import torch

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore

        # Liger 0.8.5's head and loss in one is a product that torch.compile does not take
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=True)
    model = make_llama(recipe.model, torch.float32, device)
    model.train()
    parameters = model.parameters()
    if torch.device(device).type == "cuda":
        model = torch.compile(model)
    loss = lambda ids, labels: model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss
    return autocast_step(parameters, loss, recipe, device)


def decode_transformers(cfg: ModelConfig, compute_dtype: str, device: Any) -> Callable[[np.ndarray, int], np.ndarray]:
    """`generate` with a static cache, which compiles the step on a GPU: greedy continuations of prompts (B, P)."""
    import torch

    model = make_llama(cfg, getattr(torch, compute_dtype), device).eval()

    def decode(prompts: np.ndarray, n: int) -> np.ndarray:
        ids = torch.tensor(prompts, device=device).long()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].cpu().numpy()

    return decode


PEERS = {
    "transformers": SimpleNamespace(
        packages=("torch", "transformers"), train=train_transformers, decode=decode_transformers
    ),
    "transformers+liger": SimpleNamespace(
        packages=("torch", "transformers", "liger_kernel"),
        train=lambda *args: train_transformers(*args, liger=True),
        model_types=("llama",),  # those that the kernels were put into
    ),
}

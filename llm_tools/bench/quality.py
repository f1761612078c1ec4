"""Runs of this project's sides and of transformers on the same data."""

import argparse
import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llm_common.config import Recipe
from llm_common.data.evaluation import Evaluation
from llm_common.schedule import learning_rate
from llm_tools.frameworks import open_backend

ALLOWED = 3.0  # times the noise


FLOOR = 1e-4  # nats: a noise of three runs may come out too small by chance


def ours(framework: str, recipe: Recipe, data, held_out: Evaluation, args):
    """A run of one of our sides: the loss of each step, and the held-out loss at the end."""

    losses: list[float] = []
    keep = lambda step, state, metrics: losses.append(metrics["loss"])
    with open_backend(framework).open_session(recipe, args.device, None) as session:
        session.fit(data, on_step=keep)
        total, count = session.evaluate(held_out)
    return losses, total / count


def theirs(nudge: int, recipe: Recipe, data, held_out: Evaluation, args):
    """The same with transformers' Llama, torch.optim.AdamW, clip_grad_norm_ and, in bfloat16, autocast."""
    import torch
    import transformers

    from torch_llm.engine.checkpoint import to_canonical
    from torch_llm.engine.device import matmul_precision, select_device
    from torch_llm.model import init_model

    cfg, train, opt, device = recipe.model, recipe.train, recipe.optimizer, select_device(args.device)
    config = {key: value for key, value in cfg.to_hf().items() if key not in ("architectures", "model_type")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.to(device)  # pyright: ignore[reportArgumentType]
    weights = to_canonical(init_model(cfg, train.seed, torch.float32, "cpu"))
    rng = np.random.default_rng(nudge)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = weights[name]
            if nudge:
                x = np.where(rng.random(x.shape) < 0.1, np.nextafter(x, np.float32(np.inf)), x)
            p.copy_(torch.tensor(x))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": opt.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=opt.lr_max, betas=(opt.beta1, opt.beta2), eps=opt.eps)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=train.compute_dtype == "bfloat16")

    def loss_of(inputs: np.ndarray, targets: np.ndarray, reduction: str):
        x, y = (torch.tensor(np.ascontiguousarray(a), device=device).long() for a in (inputs, targets))
        with autocast:
            logits = model(x).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction=reduction)

    losses = []
    with matmul_precision(train.compute_dtype):
        for step in range(opt.total_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(opt, step)
            inputs, targets = data.batch(step)
            loss = loss_of(inputs, targets, "mean")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), opt.max_grad_norm or math.inf)
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            total = sum(loss_of(x, y, "sum").item() for x, y in held_out.batches())
    return losses, total / held_out.n_targets


def report(console: Console, results: dict[str, Any], args: argparse.Namespace) -> bool:
    table, ok = Table(title=f"{args.steps} steps, {args.compute_dtype}, {args.device}", title_justify="left"), True
    for column in ("loss", "transformers", "noise of transformers", "JAX differs by", "PyTorch differs by", "allowed"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for key, title in (("last_tenth", "last tenth of the steps"), ("held_out", "held out")):
        base = results["transformers"][key]
        noise = max(abs(run[key] - base) for name, run in results.items() if "moved" in name)
        allowed = max(FLOOR, ALLOWED * noise)
        differences = [results[name][key] - base for name in ("JAX", "PyTorch")]
        ok &= all(abs(x) <= allowed for x in differences)
        table.add_row(title, f"{base:.5f}", f"{noise:.1e}", *(f"{x:+.1e}" for x in differences), f"{allowed:.1e}")
    console.print(table)
    console.print("equal quality" if ok else "NOT equal: a difference exceeds what is allowed")
    return ok

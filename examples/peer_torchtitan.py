"""torchtitan's Llama with its own recipe on one GPU, as a peer of `benchmark.py`.

    pip install --no-deps torchtitan==0.2.2
    python scripts/benchmark.py train --preset 1b --batch-size 16 --seq-len 2048 --peer examples/peer_torchtitan.py

Its recipe: float32 weights, bfloat16 by autocast, every block and the loss compiled, fused AdamW, the norm clipped.
Without a head tied to the embedding and with the plain RoPE, which is all that its model has without a change.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

from llm_common.config import Recipe
from llm_common.errors import UserError
from llm_tools.bench.peers import autocast_step

packages = ["torch", "torchtitan"]


UNUSED = (
    "tyro",
    "torchtitan.distributed",
    "torchtitan.hf_datasets",
    "torchtitan.models.llama3.infra",
    "torchtitan.models.moe",
    *(
        f"torchtitan.components.{name}"
        for name in ("checkpoint", "dataloader", "lr_scheduler", "metrics", "optimizer", "quantization", "validate")
    ),
)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for what torchtitan's model imports and does not use, which needs a dozen packages more."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        unused = any(f"{fullname}.".startswith(f"{name}.") for name in UNUSED)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if unused else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def train(recipe: Recipe, device: torch.device) -> Callable[[np.ndarray, np.ndarray], torch.Tensor]:
    """A step that returns the loss, not waited for."""
    cfg = recipe.model
    if importlib.util.find_spec("torchtitan") is None:
        raise UserError("torchtitan is not installed: pip install --no-deps torchtitan==0.2.2")
    if (
        cfg.model_type != "llama"
        or cfg.tie_word_embeddings
        or cfg.head_dim * cfg.num_attention_heads != cfg.hidden_size
    ):
        raise UserError("torchtitan's Llama has a head of its own and heads that fill hidden_size: take another preset")
    sys.meta_path.insert(0, StandIns())
    from torchtitan.components.loss import cross_entropy_loss  # pyright: ignore
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs  # pyright: ignore
    from torchtitan.models.llama3.model.model import Transformer  # pyright: ignore

    args = TransformerModelArgs(
        dim=cfg.hidden_size,
        n_layers=cfg.num_hidden_layers,
        n_heads=cfg.num_attention_heads,
        n_kv_heads=cfg.num_key_value_heads,
        vocab_size=cfg.vocab_size,
        multiple_of=1,
        # its feed-forward has two thirds of 4 D times this, cut to an integer twice
        ffn_dim_multiplier=(cfg.intermediate_size + 0.5) / int(8 * cfg.hidden_size / 3),
        norm_eps=cfg.rms_norm_eps,
        rope_theta=cfg.rope_theta,
        rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
        max_seq_len=recipe.train.seq_len,
    )
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = Transformer(args)
        model.init_weights()
    width = model.layers["0"].feed_forward.w1.weight.shape[0]
    assert width == cfg.intermediate_size, f"intermediate_size {width}, not {cfg.intermediate_size}"
    loss_function = cross_entropy_loss
    if device.type == "cuda":
        for name, block in model.layers.named_children():
            model.layers.register_module(name, torch.compile(block, fullgraph=True))
        loss_function = torch.compile(cross_entropy_loss)
    mean = lambda ids, labels: loss_function(model(ids), labels) / labels.numel()
    return autocast_step(model.parameters(), mean, recipe, device)

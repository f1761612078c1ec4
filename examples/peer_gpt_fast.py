"""gpt-fast's decoding, as a peer of `benchmark.py`.

    git clone https://github.com/pytorch-labs/gpt-fast
    git -C gpt-fast checkout 32971d3129541c5bfb4f715abc33d1c5f408d204
    GPT_FAST=gpt-fast python scripts/benchmark.py decode --preset 1b --batch 1 --batch 32 \\
        --peer examples/peer_gpt_fast.py

Its own model and step, compiled as it compiles them: one token at a time with CUDA graphs of the compiler's, attention
left to the compiler, all products tuned. All texts of a batch have one length there. Greedy, as its sampler is at
temperature 0.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_common.config import ModelConfig
from llm_common.errors import UserError

packages = ["torch"]
COMMIT = "32971d3129541c5bfb4f715abc33d1c5f408d204"  # of September 2024; later ones ask for masks of FlexAttention


def gpt_fast() -> ModuleType:
    """Its `generate.py`, whose reader of tokenizers is left out."""
    folder = Path(os.environ.get("GPT_FAST", "gpt-fast")).resolve()
    if not (folder / "generate.py").is_file():
        raise UserError(f"GPT_FAST = {folder} has no generate.py: set it to a clone of pytorch-labs/gpt-fast")
    sys.path.insert(0, str(folder))
    tokenizer = ModuleType("tokenizer")
    tokenizer.get_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["tokenizer"] = tokenizer
    theirs = importlib.import_module("generate")
    if "block_mask" in inspect.signature(theirs.decode_one_token).parameters:
        raise UserError(f"GPT_FAST = {folder} is a later version: check out {COMMIT}")
    return theirs


def decode(cfg: ModelConfig, compute_dtype: str, device: torch.device) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function of prompts (B, P) and a number that gives so many new ids of each, (B, n)."""
    if cfg.model_type != "llama" or cfg.head_dim * cfg.num_attention_heads != cfg.hidden_size:
        raise UserError("gpt-fast's heads fill hidden_size: take another preset")
    theirs = gpt_fast()
    args = sys.modules["model"].ModelArgs(
        block_size=cfg.max_position_embeddings,
        vocab_size=cfg.vocab_size,
        n_layer=cfg.num_hidden_layers,
        n_head=cfg.num_attention_heads,
        dim=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        n_local_heads=cfg.num_key_value_heads,
        rope_base=cfg.rope_theta,
        norm_eps=cfg.rms_norm_eps,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = theirs.Transformer(args).to(getattr(torch, compute_dtype)).eval()
    one = theirs.decode_one_token
    if device.type == "cuda":
        one = torch.compile(one, mode="reduce-overhead", fullgraph=True)
    sampling = {"temperature": 0.0, "top_k": None}

    @torch.no_grad()
    def run(prompts: np.ndarray, n: int) -> np.ndarray:
        b, p = prompts.shape
        with torch.device(device):
            model.setup_caches(max_batch_size=b, max_seq_length=p + n)
            position = torch.tensor([p], dtype=torch.int)
            ids, start = torch.tensor(prompts).int().to(device), torch.arange(p)
        token = theirs.prefill(model, ids, start, **sampling).clone()
        texts = [token]
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(n - 1):
                token = one(model, token, position, **sampling)[0].clone()
                position += 1
                texts.append(token)
        return torch.cat(texts, dim=1).cpu().numpy()

    return run

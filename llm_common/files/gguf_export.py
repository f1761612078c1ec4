"""A model as one GGUF file, which llama.cpp and what is built on it read.

The container is written by the `gguf` package; what is decided here is how a model of this program becomes llama.cpp's:
names, the order of the rows of q and k, the frequencies of a scaled RoPE, the tokenizer's table.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig
from llm_common.errors import UserError, require_package
from llm_common.files.tensor_files import check_finite
from llm_common.rope import inverse_frequencies
from llm_common.tensors import Tensors, check_tensors
from llm_common.text.hf_tokenizer import AnyTokenizer, companions, stop_ids, token_ids
from llm_common.text.tokenizer import Tokenizer
from llm_common.text.tokenizer_json import read_hf_folder

# What a matrix is stored as, and the name of a file of such; vectors are float32 in all of them, as llama.cpp's own
# converter has it.
TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
BLOCK = 32  # numbers that share a scale in q8_0
# Of each of our patterns the name under which llama.cpp cuts text into words.
PATTERNS = {"gpt2": "gpt-2", "cl100k": "dbrx", "llama3": "llama-bpe", "qwen2": "qwen2", "smollm2": "smollm"}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
MODULES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def export_gguf(
    path: Path,
    cfg: ModelConfig,
    weights: Tensors,
    tokenizer: AnyTokenizer | None,
    dtype: str = "float16",
    stops: Iterable[int] = (),
) -> int:
    """Write a GGUF file, whole or not at all; returns its size in bytes.

    dtype: one of `TYPES`; a matrix whose rows are no multiple of 32 is float16 where q8_0 is asked for. stops: ids at
    which generation is to end beside the tokenizer's own. Raises UserError for a tokenizer that llama.cpp would read
    otherwise, for more ends than a file can name, and for weights that are not finite.
    """
    require_package("gguf", "gguf")
    import gguf

    check_tensors(cfg, weights, "weights")
    if cfg.sliding_window is not None:
        raise UserError("GGUF: llama.cpp's llama has no sliding window; without one the model would see more")
    architecture = ARCHITECTURES[cfg.model_type]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        _describe(writer, cfg, dtype)
        if tokenizer is not None:
            _add_tokenizer(writer, cfg, tokenizer, stops)
        for name in weights:
            x = np.asarray(weights[name], np.float32)
            check_finite(name, x)
            if architecture == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
                x = interleaved(x, cfg.head_dim)
            _add_tensor(writer, gguf_name(name), x, dtype)
        if cfg.rope_scaling is not None:
            _add_tensor(writer, "rope_freqs.weight", rope_factors(cfg), dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room or give another place") from None
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def gguf_name(name: str) -> str:
    """llama.cpp's name of a canonical tensor."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in top:
        return f"{top[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{MODULES[inner]}.{kind}"


def interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a projection (heads * H, D) in the order of the other convention of RoPE, which llama.cpp's llama has:
    the pairs (i, i + H/2) become neighbours.
    """
    heads = weight.shape[0] // head_dim
    return weight.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(cfg: ModelConfig) -> np.ndarray:
    """What llama.cpp divides each frequency by, float32 (H/2,)."""
    plain = dataclasses.replace(cfg, rope_scaling=None)
    return (inverse_frequencies(plain) / inverse_frequencies(cfg)).astype(np.float32)


def _describe(writer: Any, cfg: ModelConfig, dtype: str) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[TYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_vocab_size(cfg.vocab_size)


def _add_tensor(writer: Any, name: str, x: np.ndarray, dtype: str) -> None:
    import gguf

    kind = TYPES[dtype][0] if x.ndim > 1 else "F32"
    if kind == "Q8_0" and x.shape[-1] % BLOCK:
        kind = "F16"
    if kind == "F16" and np.abs(x).max(initial=0.0) > np.finfo(np.float16).max:
        raise UserError(f"tensor {name!r}: {np.abs(x).max():g} is not in the range of float16; export as bfloat16")
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, np.ascontiguousarray(gguf.quants.quantize(x, raw)), raw_dtype=raw)


def _add_tokenizer(writer: Any, cfg: ModelConfig, tokenizer: AnyTokenizer, stops: Iterable[int]) -> None:
    """The vocabulary as llama.cpp's byte-level BPE has it: pieces, what each of them is, merges, and the ends' ids."""
    import gguf

    files = companions(tokenizer)
    content = json.loads(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    model = content.get("model", {})
    plain = tokenizer if isinstance(tokenizer, Tokenizer) else read_hf_folder(tokenizer.folder.path)
    pattern = plain.pattern
    if model.get("type") != "BPE" or pattern not in PATTERNS:
        raise UserError(f"GGUF: a byte-level BPE tokenizer with one of the patterns {', '.join(PATTERNS)} is needed")
    pieces = {i: piece for piece, i in model["vocab"].items()}
    added = {x["id"]: x for x in content.get("added_tokens", [])}
    tokens, kinds = [], []
    for i in range(cfg.vocab_size):
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i].get("special", True) else gguf.TokenType.USER_DEFINED
            piece = added[i]["content"]
        else:
            kind = gguf.TokenType.NORMAL if i in pieces else gguf.TokenType.UNUSED
            piece = pieces.get(i, f"[PAD{i}]")
        tokens.append(piece)
        kinds.append(kind)
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PATTERNS[pattern])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    # llama.cpp ends a text at each of the three that a file names: of a text, of a turn, of a message.
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    found = stop_ids(tokenizer, stops)
    if len(found) > len(ends):
        raise UserError(f"GGUF: text would end at each of {found}; a file names {len(ends)} of them at most")
    for add, i in zip(ends, found, strict=False):
        add(i)
    ids = token_ids(tokenizer)
    if isinstance(ids.get("bos_token_id"), int):
        writer.add_bos_token_id(ids["bos_token_id"])
    writer.add_add_bos_token(bool(getattr(tokenizer, "prefix_ids", [])))
    template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)

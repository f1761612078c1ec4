"""Hugging Face's `config.json`, of transformers 4 and 5, to `ModelConfig` and back.

Keys that do not change the mathematics are passed over. Any other unknown key, and any value of a known key that the
model does not implement, is refused by name: an unknown rope type read as "none" would be a silent error.
"""

import dataclasses
from typing import Any

from llm_common.config import MODEL_TYPES, ModelConfig, RopeScaling
from llm_common.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers assumes where a file says nothing; None for the key/value heads means as many as query heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "head_dim": 128},
}
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "is_llama_config": True,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "use_sliding_window": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_dropout": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Of these, null says what a missing key says.
_NULL_IS_DEFAULT = frozenset(_FIXED) - {"hidden_act"}
# Keys that do not change the function that the weights compute: how text is drawn, what training did, where files came
# from, which kernels somebody used. A key that might change it belongs into _FIXED, with the one value that it may
# have.
_IGNORED = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "base_model_name_or_path",
        "begin_suppress_tokens",
        "bf16",
        "bos_token",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "cls_token",
        "cls_token_id",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embedding_initializer_range",
        "encoder_no_repeat_ngram_size",
        "eos_token",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "fp16",
        "fp32",
        "generation_config",
        "gradient_checkpointing",
        "id2label",
        "ignore_index",
        "initializer_range",
        "initializer_std",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "language",
        "length_penalty",
        "license",
        "logits_to_keep",
        "loss_type",
        "mask_token",
        "mask_token_id",
        "max_length",
        "max_new_tokens",
        "max_seq_len",
        "max_seq_length",
        "max_sequence_length",
        "max_window_layers",
        "min_length",
        "min_new_tokens",
        "model_max_length",
        "model_name",
        "model_name_or_path",
        "model_revision",
        "n_ctx",
        "neftune_noise_alpha",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_logits_to_keep",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token",
        "pad_token_id",
        "padding_side",
        "penalty_alpha",
        "pipeline_tag",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "seed",
        "sep_token",
        "sep_token_id",
        "seq_len",
        "seq_length",
        "suppress_tokens",
        "tags",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "tokenizer_name",
        "tokenizer_name_or_path",
        "top_k",
        "top_p",
        "torch_compile",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "trust_remote_code",
        "typical_p",
        "unk_token",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention",
        "use_flash_attention_2",
        "use_flash_attn",
        "use_flash_attn_2",
        "use_liger_kernel",
        "vocab_file",
    ]
)
_SCALING_KEYS = tuple(field.name for field in dataclasses.fields(RopeScaling))


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """The config of a Llama, Mistral, Qwen2 or Qwen3 model. Raises UserError for what is not implemented."""
    classes = config.get("architectures") or []
    config = {key: value for key, value in config.items() if key not in _IGNORED}
    model_type = config.get("model_type")
    if model_type is None and isinstance(classes, list):
        model_type = next((family for family, name in ARCHITECTURES.items() if name in classes), None)
    if model_type is None:
        raise UserError(
            f"config.json: model_type is missing, so the family is not known; add one of {', '.join(MODEL_TYPES)}"
        )
    config["model_type"] = model_type
    if model_type not in MODEL_TYPES:
        raise UserError(f"config.json: model_type = {model_type!r} is not implemented; known: {', '.join(MODEL_TYPES)}")
    for key, allowed in _FIXED.items():
        value = config.pop(key, allowed)
        if value is None and key in _NULL_IS_DEFAULT:
            continue
        if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
            if key == "quantization_config":
                raise UserError(
                    "config.json: quantization_config: the weights are quantized, which is not implemented; take the "
                    "model "
                    "in bfloat16, or save it dequantized with transformers (model.dequantize())"
                )
            raise UserError(f"config.json: {key} = {repr(value)[:200]} is not implemented; it must be {allowed!r}")
    _take_rope(config)
    if model_type != "mistral":
        config.pop("sliding_window", None)  # switched off by use_sliding_window, or meaningless
    kinds = config.pop("layer_types", None) or ()
    if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f"config.json: layer_types = {str(kinds)[:200]} must be a list of names")
    kinds = set(kinds)
    wanted = {"full_attention"} if model_type != "mistral" else {"full_attention", "sliding_attention"}
    if len(kinds) > 1 or not kinds <= wanted:
        raise UserError(f"config.json: layer_types {sorted(kinds)} are not implemented; all layers must be of one kind")
    if kinds == {"full_attention"} and model_type == "mistral":
        config["sliding_window"] = None
    for key, default in ({"rms_norm_eps": 1e-6} | _DEFAULTS[model_type]).items():
        config.setdefault(key, default)
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    config["head_dim"] = config.get("head_dim") or 0
    return ModelConfig.from_dict(config)


def _take_rope(config: dict[str, Any]) -> None:
    """Replace rope_theta + rope_scaling (transformers 4) or rope_parameters (5) by this model's two fields."""
    scalings = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.pop(key, None) or {}
        if not isinstance(rope, dict):
            raise UserError(f"config.json: {key} = {rope!r} must be an object or null")
        rope = dict(rope)
        if not rope:
            continue
        rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)  # files of transformers 4 may have both
        theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
        if config.setdefault("rope_theta", theta) != theta:
            raise UserError(f"config.json: rope_theta is {config['rope_theta']} and, in {key}, {theta}")
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"config.json: a partial_rotary_factor in {key} is not implemented")
        if rope_type == "llama3":
            missing = [name for name in _SCALING_KEYS if name not in rope]
            if missing:
                raise UserError(f"config.json: key {missing[0]!r} is missing in {key}")
            scalings.append(RopeScaling(**{name: rope.pop(name) for name in _SCALING_KEYS}))
        elif rope_type == "default":
            scalings.append(None)
        else:
            raise UserError(f"config.json: rope type {rope_type!r} is not implemented; 'default' and 'llama3' are")
        if rope:
            raise UserError(f"config.json: unknown key {sorted(rope)[0]!r} in {key}")
    if len(set(scalings)) > 1:
        raise UserError("config.json: rope_parameters and rope_scaling contradict each other; keep one of them")
    config["rope_scaling"] = scalings[0] if scalings else None


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` that transformers 4 and 5 both read. No default is left out: theirs differ."""
    values = dataclasses.asdict(cfg)
    scaling = values.pop("rope_scaling")
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling}
    if cfg.model_type != "mistral":
        del values["sliding_window"]
    return {
        "architectures": [ARCHITECTURES[cfg.model_type]],
        **values,
        "rope_parameters": {**rope, "rope_theta": cfg.rope_theta},
        **({} if scaling is None else {"rope_scaling": rope}),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **({"attention_bias": False, "mlp_bias": False} if cfg.model_type == "llama" else {}),
        **({"attention_bias": False} if cfg.model_type == "qwen3" else {}),
        **({"use_sliding_window": False} if cfg.model_type.startswith("qwen") else {}),
    }

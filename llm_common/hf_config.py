"""Hugging Face's `config.json`, of transformers 4 and 5, to `ModelConfig` and back.

Keys that do not change the mathematics are passed over. Any other unknown key, and any value of a known key that the model
does not implement, is refused by name: an unknown rope type read as "none" would be a silent error.
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
}
_IGNORED = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "auto_map",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
_SCALING_KEYS = tuple(field.name for field in dataclasses.fields(RopeScaling))


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """The config of a Llama, Mistral, Qwen2 or Qwen3 model. Raises UserError for what is not implemented."""
    config = {key: value for key, value in config.items() if key not in _IGNORED}
    model_type = config.get("model_type", "llama")
    if model_type not in MODEL_TYPES:
        raise UserError(f"config.json: model_type = {model_type!r} is not implemented; known: {', '.join(MODEL_TYPES)}")
    for key, allowed in _FIXED.items():
        value = config.pop(key, allowed)
        if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
            raise UserError(f"config.json: {key} = {value!r} is not implemented; it must be {allowed!r}")
    _take_rope(config)
    if model_type != "mistral":
        config.pop("sliding_window", None)  # switched off by use_sliding_window, or meaningless
    kinds = set(config.pop("layer_types", None) or ())
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

"""What a Hugging Face `config.json` says, read by the specification itself: a literal table of families, defaults and
nulls.

It imports none of the three packages, so that a config which both frameworks misread in the same way is seen. The
values are those of the config classes of transformers 5; a test compares them over every key left out, null and set.
"""

from types import SimpleNamespace

# What a family's file means where a key is missing. A name in the place of a value is that of another key.
DEFAULTS = {
    "llama": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": "num_attention_heads", "head_dim": "hidden_size / heads",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0,
    },
    "mistral": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": "hidden_size / heads",
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": "hidden_size / heads",
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0,
    },
    "qwen3": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0,
    },
}  # fmt: skip
# What null means, where it is not an error; of any other key transformers refuses it.
NULLS = {"num_key_value_heads": "num_attention_heads", "head_dim": "hidden_size / heads", "sliding_window": None}
BIASED = {"qwen2"}  # q_proj, k_proj and v_proj add a bias
HEAD_NORMS = {"qwen3"}  # every head of q and of k passes a norm before the rotation
WINDOWED = {"mistral"}  # the other families' sliding_window does nothing unless use_sliding_window is set
# Keys whose other values are other mathematics. Null says what a missing key says, except of the activation.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "partial_rotary_factor": 1.0, "rope_interleaved": False, "quantization_config": None, "attention_dropout": 0.0,
}  # fmt: skip
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def architecture(config):
    """A config.json, as a dict, or whatever writes one with `to_hf`: the fields that the mathematics needs, under its
    names.

    Raises ValueError for a value that it does not know.
    """
    if isinstance(config, SimpleNamespace):
        return config
    config = config if isinstance(config, dict) else config.to_hf()
    family = config.get("model_type")
    if family is None:  # transformers refuses such a file; its list of classes says as much
        classes = config.get("architectures") or []
        family = next((x for x in DEFAULTS if f"{x.capitalize()}ForCausalLM" in classes), None)
    if family not in DEFAULTS:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(DEFAULTS)}")
    values = {}
    for key, default in DEFAULTS[family].items():
        value = config.get(key, default)
        if value is None and key not in NULLS:
            raise ValueError(f"{key} is null")
        values[key] = NULLS[key] if value is None else value
    if values["num_key_value_heads"] == "num_attention_heads":
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["head_dim"] == "hidden_size / heads":
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    for key, needed in FIXED.items():
        value = config.get(key, needed)
        if value != needed and (value is not None or key == "hidden_act"):
            raise ValueError(f"{key} is {value!r}, not {needed!r}")
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1 or not kinds <= {"full_attention", *(["sliding_attention"] if family in WINDOWED else [])}:
        raise ValueError(f"layer_types {sorted(kinds)} are not of one kind that the family has")
    if family not in WINDOWED or kinds == {"full_attention"}:
        values["sliding_window"] = None
    said = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]  # of transformers 4, and 5
    kind_of = lambda rope: rope.get("rope_type", rope.get("type", "default"))
    thetas = {rope.get("rope_theta", config.get("rope_theta")) for rope in said} | {config.get("rope_theta")}
    if len({kind_of(rope) for rope in said}) > 1 or len(thetas - {None}) > 1:
        raise ValueError("the file contradicts itself on RoPE")
    rope = {key: value for part in said for key, value in part.items()}
    values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
    kind = kind_of(rope)
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not known")
    scaling = SimpleNamespace(**{key: rope[key] for key in SCALING}) if kind == "llama3" else None
    flags = {"qkv_bias": family in BIASED, "qk_norm": family in HEAD_NORMS}
    return SimpleNamespace(**values, **flags, rope_scaling=scaling, model_type=family)

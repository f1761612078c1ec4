"""The specification's reading of `config.json` against transformers' own config classes, over every key."""

import pytest

from parity.checks.configs import FIELDS, configs
from parity.spec_config import DEFAULTS, FIXED, NULLS, architecture

transformers = pytest.importorskip("transformers")
CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


def theirs(family: str, config: dict):
    """What transformers' class makes of the file, under the names of the specification; None if it refuses it."""
    values = {key: x for key, x in config.items() if key != "model_type"}
    if config.get("model_type", family) != family or ("model_type" not in config and "architectures" not in config):
        return None  # AutoConfig does not know which class to take
    try:
        found = getattr(transformers, CLASSES[family])(**values)
    except Exception:
        return None
    heads = found.num_attention_heads
    rope = found.rope_parameters
    return {
        **{
            key: getattr(found, key)
            for key in FIELDS
            if key in DEFAULTS[family] and key not in ("rope_theta", "head_dim")
        },
        "head_dim": getattr(found, "head_dim", None) or found.hidden_size // heads,
        "rope_theta": rope["rope_theta"],
        "sliding_window": found.sliding_window if family == "mistral" else None,
        "rope_type": rope["rope_type"],
        "factor": rope.get("factor"),
    }


@pytest.mark.parametrize("family", DEFAULTS)
def test_every_key_absent_null_or_set_means_what_transformers_says(family):
    compared = 0
    for what, config in configs(family):
        expected = theirs(family, config)
        try:
            found = architecture(config)
        except ValueError:
            # what only this project asks: layer_types of one kind that the family has, RoPE that does not contradict
            # itself, and of keys that stand for other mathematics the one value that is this one
            mine = what.split(" = ")[0] in ("layer_types", *FIXED) or "RoPE" in what or "rope_theta" in what
            assert expected is None or mine, what
            continue
        if expected is None:  # a null that transformers 4 took, where 5 has a type
            assert any(what == f"{key} = null" for key in (*NULLS, *FIXED)), what
            continue
        if "layer_types" in config and family == "mistral":
            continue  # another class of transformers has these
        compared += 1
        for key in set(expected) - {"rope_type", "factor"}:
            assert getattr(found, key) == expected[key], (what, key)
        assert (found.rope_scaling is None) == (expected["rope_type"] == "default"), what
        if found.rope_scaling is not None:
            assert found.rope_scaling.factor == expected["factor"], what
    assert compared > 30


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_tables_of_families_are_those_of_the_models(family):
    """Biases and norms of heads, read off modules that transformers builds."""
    config = getattr(transformers, CLASSES[family])(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = set(model.state_dict())
    found = architecture({"model_type": family})
    assert ("model.layers.0.self_attn.q_proj.bias" in names) == found.qkv_bias
    assert ("model.layers.0.self_attn.q_norm.weight" in names) == found.qk_norm
    assert not any(name.endswith(("o_proj.bias", "up_proj.bias")) for name in names)

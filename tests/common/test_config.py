"""Configs: every wrong value is refused by field and value, and config.json is read and written faithfully."""

import dataclasses
import json

import pytest

from llm_common.config import (
    PRESETS,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    SamplingConfig,
    TrainConfig,
    check_length,
    preset,
)
from llm_common.errors import UserError
from parity.core.inputs import families

TINY = dataclasses.asdict(preset("tiny"))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("cls", "changes", "words"),
    [
        (ModelConfig, {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        (ModelConfig, {"head_dim": 7}, "head_dim = 7.*even"),
        (ModelConfig, {"head_dim": 0, "hidden_size": 33}, "hidden_size = 33.*divisible"),
        (ModelConfig, {"vocab_size": 0}, "vocab_size = 0"),
        (ModelConfig, {"vocab_size": 96.0}, "vocab_size = 96.0"),
        (ModelConfig, {"num_hidden_layers": True}, "num_hidden_layers = True"),
        (ModelConfig, {"rope_theta": NAN}, "rope_theta = nan"),
        (ModelConfig, {"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
        (ModelConfig, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        (OptimizerConfig, {"lr_max": -1.0}, "lr_max = -1.0"),
        (OptimizerConfig, {"lr_min": 1.0}, "lr_min = 1.0.*lr_max"),
        (OptimizerConfig, {"warmup_steps": 10, "total_steps": 10}, "warmup_steps = 10.*less than `total_steps` = 10"),
        (OptimizerConfig, {"beta2": 1.0}, "beta2 = 1.0"),
        (OptimizerConfig, {"eps": 0.0}, "eps = 0.0"),
        (OptimizerConfig, {"weight_decay": INF}, "weight_decay = inf"),
        (OptimizerConfig, {"max_grad_norm": 0.0}, "max_grad_norm = 0.0"),
        (TrainConfig, {"seed": 2**32}, "seed = 4294967296"),
        (TrainConfig, {"compute_dtype": "float16"}, "compute_dtype = 'float16'.*bfloat16"),
        (ExecutionConfig, {"attention_backend": "flash"}, "attention_backend = 'flash'.*reference"),
        (TrainConfig, {"batch_size": 0}, "batch_size = 0"),
        (SamplingConfig, {"temperature": -0.1}, "temperature = -0.1"),
        (SamplingConfig, {"temperature": NAN}, "temperature = nan"),
        (SamplingConfig, {"temperature": 1e-30}, "temperature = 1e-30"),
        (SamplingConfig, {"top_k": -1}, "top_k = -1"),
        (SamplingConfig, {"top_p": 0.0}, "top_p = 0.0"),
        (SamplingConfig, {"top_p": NAN}, "top_p = nan"),
        (SamplingConfig, {"min_p": 1.0}, "min_p = 1.0"),
        (SamplingConfig, {"seed": -1}, "seed = -1"),
    ],
)
def test_a_wrong_value_is_refused_by_field_and_value(cls, changes, words):
    base = TINY if cls is ModelConfig else {}
    with pytest.raises(UserError, match=f"{cls.__name__}.{words}"):
        cls(**{**base, **changes})


@pytest.mark.parametrize("cls", [ModelConfig, OptimizerConfig, TrainConfig, ExecutionConfig, SamplingConfig])
def test_an_unknown_key_is_refused(cls):
    with pytest.raises(UserError, match="unknown key 'droput'.*known keys"):
        cls.from_dict({**(TINY if cls is ModelConfig else {}), "droput": 0.1})


def test_a_missing_key_is_refused():
    with pytest.raises(UserError, match="missing key 'vocab_size'"):
        ModelConfig.from_dict({})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"batch_size": 4, "gradient_accumulation_steps": 3},
            "gradient_accumulation_steps = 3: must divide batch_size = 4",
        ),
        ({"seq_len": 6, "loss_chunks": 4}, "loss_chunks = 4: must divide seq_len = 6"),
        ({"seq_len": 65}, "seq_len needs 65 positions"),
        ({"droput": 0.1}, "unknown key 'droput'"),
    ],
)
def test_what_does_not_fit_together_makes_no_recipe(settings, words):
    with pytest.raises(UserError, match=words):
        Recipe.from_settings(preset("tiny"), {"seq_len": 8, **settings})


def test_a_recipe_comes_back_from_its_settings():
    recipe = Recipe(preset("tiny"), TrainConfig(seed=3, seq_len=8), execution=ExecutionConfig(remat="full"))
    assert Recipe.from_settings(preset("tiny"), recipe.settings()) == recipe


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").vocab_size = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", [*PRESETS, *families(preset("tiny"))])
def test_config_json_round_trip(name, tmp_path):
    cfg = {**PRESETS, **families(preset("tiny"))}[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(cfg.to_hf()))
    assert ModelConfig.from_file(file) == cfg


def test_both_forms_of_rope_settings_are_read():
    common = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 9,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    old = ModelConfig.from_hf({**common, "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"})
    new = ModelConfig.from_hf(
        {**common, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}
    )
    assert old == new
    assert old.rope_theta == 5e5
    assert old.num_key_value_heads == 2  # absent: no grouping
    assert ModelConfig.from_hf({**common, "num_key_value_heads": None}).num_key_value_heads == 2
    assert old.rms_norm_eps == 1e-6  # Hugging Face's default, not ours


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "gemma", "model_type = 'gemma' is not implemented; known: llama, mistral"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("attention_bias", True, "attention_bias = True"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}, "rope type 'yarn'"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "key 'low_freq_factor' is missing in rope_scaling"),
        ("rope_scaling", LLAMA3 | {"beta": 1}, "unknown key 'beta' in rope_scaling"),
        ("rope_scaling", LLAMA3, "rope_parameters and rope_scaling contradict each other"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1.0},
            "rope_theta is 10000.0 and, in rope_parameters, 1.0",
        ),
        ("rope_parameters", "default", "must be an object"),
        ("use_sliding_window", True, "use_sliding_window = True"),
        ("layer_types", ["full_attention", "sliding_attention"], "all layers must be of one kind"),
        ("quantization_config", {"bits": 4}, "quantization_config: the weights are quantized"),
        ("an_unknown_key", 1, "unknown key 'an_unknown_key'"),
        ("layer_types", 5, "must be a list of names"),
        ("num_hidden_layers", 10_000_000, "num_hidden_layers = 10000000: must be at most"),
        ("max_position_embeddings", 10**12, "must be at most"),
        ("max_position_embeddings", 1 << 27, "lower it to the length"),
        ("head_dim", 1 << 20, "head_dim = 1048576: must be at most"),
    ],
)
def test_what_the_model_does_not_implement_is_refused_by_name(key, value, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_hf({**preset("tiny").to_hf(), key: value})


def test_unreadable_config_files(tmp_path):
    for content, words in ((None, "no such file"), ("{", "JSON"), ("[1]", "holds a list")):
        file = tmp_path / "config.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=words):
            ModelConfig.from_file(file)


@pytest.mark.parametrize(("name", "millions"), [("demo", 1.0), ("124m", 124), ("350m", 350), ("1b", 1200)])
def test_presets_have_the_size_in_their_name(name, millions):
    assert abs(preset(name).num_parameters() / 1e6 / millions - 1) < 0.12


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match="'gpt5'.*tiny.*124m"):
        preset("gpt5")


def test_a_text_longer_than_the_table_is_refused():
    with pytest.raises(UserError, match="65 positions but max_position_embeddings = 64"):
        check_length(preset("tiny"), 65, "the prompt")

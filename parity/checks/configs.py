"""Checks of what a model's folder says: configs as people write them, and weights under their names.

The specification reads every `config.json` by itself (`spec_config.py`); nothing here has been through the packages'
own writers.
"""

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from llm_common.config import ModelConfig
from llm_common.errors import UserError
from llm_common.run.checkpoint import load_weights
from parity import spec
from parity.checks.model import FLOAT64_ALLOWED
from parity.core.compare import Row, shared, three_way
from parity.core.inputs import random_batch, random_weights, variants
from parity.sides.settings import Settings
from parity.spec_config import DEFAULTS, architecture
from parity.trace.trace import located

BASE: dict[str, Any] = {
    "vocab_size": 91, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 10, "max_position_embeddings": 48, "rms_norm_eps": 3e-5, "rope_theta": 5e5,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
ABSENT = object()
# What the mathematics needs and a file must say: transformers' defaults for these are those of one published model.
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.5,
    "original_max_position_embeddings": 30,
}
# key -> values that a file may have for it, beside BASE's
OTHERS: dict[str, list[Any]] = {
    "vocab_size": [64],
    "hidden_size": [96],
    "intermediate_size": [33],
    "num_hidden_layers": [1, 3],
    "num_attention_heads": [4, 16],
    "num_key_value_heads": [ABSENT, None, 32, 1],
    "head_dim": [ABSENT, None, 4],
    "max_position_embeddings": [ABSENT, None, 512],
    "rms_norm_eps": [ABSENT, None, 1e-5, 1e-3],
    "rope_theta": [ABSENT, 1e6, 100.0],
    "tie_word_embeddings": [ABSENT, True],
    "sliding_window": [ABSENT, None, 5, 4096],
    "model_type": [ABSENT, None, "gpt2"],
    "use_sliding_window": [ABSENT, False, None, True],
    "rope_scaling": [None, LLAMA3, {"type": "llama3", **LLAMA3}, {"type": "default"}],
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_theta": 1e6, **LLAMA3},
        {"rope_theta": 123.0},
    ],
    "layer_types": [None, ["full_attention"] * 2, ["sliding_attention"] * 2],
    "hidden_act": [ABSENT, None, "gelu", "swish"],
    "attention_bias": [False, None, True],
    "mlp_bias": [None, True],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "rope_interleaved": [None, True],
    "attention_dropout": [None, 0.1],
    "quantization_config": [None, {"quant_method": "fp8"}],
    "bos_token_id": [7],
    "torch_dtype": ["bfloat16"],
}
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "sliding_window",
    "qkv_bias", "qk_norm",
)  # fmt: skip


def configs(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files of a family: every key with every other value alone, and every key left out together."""
    base = {**BASE, "model_type": family} | ({"sliding_window": 7} if family == "mistral" else {})
    yield "as it is", base
    for key, values in OTHERS.items():
        for value in values:
            changed = {**base, key: value}
            if key in ("rope_scaling", "rope_parameters") and isinstance(value, dict) and "rope_theta" in value:
                del changed["rope_theta"]
            yield f"{key} = {_text(value)}", {name: x for name, x in changed.items() if x is not ABSENT}
    for other in (LLAMA3, {"type": "default"}):  # two keys that say the same, or not
        both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": other}
        yield f"both keys of RoPE, {other}", {**base, **both}
    yield "two values of rope_theta", {**base, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}
    classes = [f"{family.capitalize()}ForCausalLM"]
    yield "architectures alone", {**{k: x for k, x in base.items() if k != "model_type"}, "architectures": classes}
    yield "only what it must have", {name: base[name] for name in (*NEEDED, "model_type")}


def _text(value: Any) -> str:
    return "(absent)" if value is ABSENT else json.dumps(value)


def differing_fields(config: dict[str, Any]) -> list[str]:
    """The fields that `ModelConfig.from_hf` reads otherwise than the specification; what one of the two refuses
    counts.
    """
    try:
        expected = architecture(config)
    except ValueError:
        expected = None
    try:
        found = ModelConfig.from_hf(config)
    except UserError as error:
        return [] if expected is None else [f"refused: {error}"]
    if expected is None:
        return ["not refused"]
    scaling = lambda x: None if x is None else [getattr(x, name) for name in LLAMA3 if name != "rope_type"]
    wrong = [name for name in FIELDS if getattr(found, name) != getattr(expected, name)]
    return wrong + ["rope_scaling"] * (scaling(found.rope_scaling) != scaling(expected.rope_scaling))


def check_config(s: Settings) -> Iterator[Row]:
    """Files of every family, key by key, as both read them; what is written, read by the specification; folders of
    weights.
    """
    for family in DEFAULTS:
        wrong, n = [], 0
        for what, config in configs(family):
            n += 1
            wrong += [f"{what}: {field}" for field in differing_fields(config)]
        row = shared("config", f"fields that {n} files of a {family} mean otherwise", len(wrong), place="from_hf")
        yield row if row.ok else dataclasses.replace(row, note="; ".join(wrong[:4]))
    wrong = []
    more = {"Mistral without a window": dataclasses.replace(s.cfg, model_type="mistral", sliding_window=None)}
    for name, cfg in (variants(s.cfg) | more).items():
        written = json.loads(json.dumps(cfg.to_hf()))
        read = architecture(written)
        wrong += [f"{name}: {field}" for field in FIELDS if getattr(read, field) != getattr(cfg, field)]
        wrong += [f"{name}: {field}" for field in differing_fields(written)]
        if (cfg.rope_scaling is None) != (read.rope_scaling is None):
            wrong.append(f"{name}: rope_scaling")
    row = shared("config", "fields of config.json as they are written", len(wrong), place="to_hf")
    yield row if row.ok else dataclasses.replace(row, note="; ".join(wrong[:4]))
    if "float64" in s.dtypes:
        for family in DEFAULTS:
            yield _folder_row(s, family)


def _folder_row(s: Settings, family: str) -> Row:
    """A folder that nobody of this project wrote: logits of both sides, from its files, and of the specification, from
    its JSON.
    """
    odd: dict[str, dict[str, Any]] = {
        "llama": {"rope_scaling": LLAMA3, "num_key_value_heads": None, "head_dim": None},
        "mistral": {"sliding_window": 5, "head_dim": 14},
        "qwen2": {"tie_word_embeddings": True, "head_dim": None, "sliding_window": 3},
        "qwen3": {"tie_word_embeddings": True, "rms_norm_eps": ABSENT, "num_key_value_heads": 1},
    }
    config = {key: x for key, x in {**BASE, "model_type": family, **odd[family]}.items() if x is not ABSENT}
    ids, _ = random_batch(ModelConfig.from_hf(config), s.seed, s.batch, s.length)
    weights = {name: x.astype(np.float32) for name, x in random_weights(architecture(config), s.seed).items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if family in ("llama", "qwen3"):
            safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        else:
            shards = [dict(itertools.islice(weights.items(), k, None, 2)) for k in (0, 1)]
            files = [f"model-{k + 1:05d}-of-00002.safetensors" for k in (0, 1)]
            for file, shard in zip(files, shards, strict=True):
                safetensors.numpy.save_file(shard, folder / file, {"format": "pt"})
            index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        cfg, tensors = load_weights(folder)
        read = {name: np.array(tensors[name], np.float64) for name in tensors}
        expected = {"logits": spec.forward({k: x.astype(np.float64) for k, x in weights.items()}, ids, config)[0]}
        results = [{"logits": side.logits(read, ids)} for side in s.sides("float64", cfg)]
    wrong = [name for name in FIELDS if getattr(cfg, name) != getattr(architecture(config), name)]
    row = three_way("config", f"logits of a folder of a {family}", "float64", [*results, expected], FLOAT64_ALLOWED)
    return dataclasses.replace(row, place="from_hf", note=", ".join(wrong)) if wrong else located(row, s, cfg)

"""Folders of strangers: each is named for what it is, with the way on; numbers that are not finite are named."""

import dataclasses
import json
import time

import numpy as np
import pytest

from llm_common.config import ModelConfig, preset
from llm_common.errors import UserError
from llm_common.files.export import export
from llm_common.files.tensor_files import TensorFiles, write_tensors
from llm_common.run.checkpoint import load_checkpoint, load_weights
from llm_common.run.folder import newest
from llm_common.tensors import tensor_shapes
from llm_common.text.tokenizer import Tokenizer

CFG = dataclasses.replace(preset("tiny"), vocab_size=260)


def weights(value=0.5):
    return {name: np.full(shape, value, np.float32) for name, shape in tensor_shapes(CFG).items()}


@pytest.fixture
def folder(tmp_path):
    export(tmp_path / "model", CFG, weights(), Tokenizer([]))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, r"a PEFT adapter.*merge_and_unload"),
        ({"model.gguf": ""}, "holds a GGUF file"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, r"pytorch_model.bin, which can run code and is not read"),
        ({"config.json": "{}", "weights.safetensors": ""}, "weights.safetensors, but neither model.safetensors"),
        ({"config.json": "{}"}, "has a config.json but no weights"),
        ({".metadata": "", "__0_0.distcp": ""}, "a checkpoint of torch's DCP.*--from-dcp"),
        ({"_CHECKPOINT_METADATA": "", "manifest.ocdbt": ""}, "an Orbax checkpoint.*--from-orbax"),
        ({"refs": None, "snapshots": None}, "a folder of the hub's cache"),
        ({"log.jsonl": ""}, "a run that has saved no checkpoint yet"),
        ({}, "has no config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_named(files, words, tmp_path):
    for name, content in files.items():
        (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        load_weights(newest(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "one file of weights; give the folder"),
        ("model.gguf", "a GGUF file"),
        ("config.json", "give the folder that it lies in"),
        ("model.pt", "a pickle, which can run code"),
        ("model.npz", "an archive of arrays"),
        ("notes.txt", "a file; a folder with config.json"),
    ],
)
def test_a_file_that_is_no_model_is_named(name, words, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=words):
        load_weights(newest(tmp_path / name))


def test_the_name_of_a_model_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    with pytest.raises(UserError, match="hf download someone/some-model --local-dir some-model"):
        load_weights(newest(Path("someone/some-model")))


def test_a_stale_index_beside_a_whole_file(folder, capsys):
    """transformers takes the whole file, so this does; and says so."""
    old = weights(-1.0)
    write_tensors(folder / "model-00001-of-00001.safetensors", old)
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, found = load_weights(folder)
    assert found["model.norm.weight"][0] == 0.5
    assert "model.safetensors is read, as by transformers; model.safetensors.index.json" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert load_weights(folder)[1]["model.norm.weight"][0] == -1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_place(bad, folder, tmp_path):
    tensors = {name: np.array(x) for name, x in load_weights(folder)[1].items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    write_tensors(folder / "model.safetensors", tensors)
    _, found = load_weights(folder)
    words = r"'model.layers.1.mlp.up_proj.weight' is not finite: 1 of 1,792 numbers.* at \[3, 5\]"
    with pytest.raises(UserError, match=words):
        _ = found["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=words):
        export(tmp_path / "again", CFG, found)
    assert not (tmp_path / "again").exists()
    assert list(tmp_path.glob(".again*")) == []


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70_000.0), ("bfloat16", 3.4e38), ("float16", -1e30)])
def test_a_number_outside_the_exports_dtype_is_named(dtype, value, tmp_path):
    tensors = weights()
    tensors["model.norm.weight"][7] = value
    with pytest.raises(UserError, match=rf"'model.norm.weight'.* at \[7\] is not in the range of {dtype}.*float32"):
        export(tmp_path / "out", CFG, tensors, dtype=dtype)
    assert not (tmp_path / "out").exists()
    export(tmp_path / "out", CFG, tensors)


def test_a_pad_token_beyond_the_embeddings_is_no_obstacle(capsys):
    from llm_common.text.tokenizer import check_vocabulary

    tokenizer = Tokenizer([], ["<|endoftext|>", "[PAD]"])
    check_vocabulary(tokenizer, 257)
    assert "added tokens beyond them are refused where a text has one" in capsys.readouterr().err
    check_vocabulary(tokenizer, 258)
    assert capsys.readouterr().err == ""
    for size in (255, 256):
        with pytest.raises(UserError, match="is smaller than the tokenizer's"):
            check_vocabulary(tokenizer, size)


HARMLESS = {
    "max_length": 20,
    "max_sequence_length": 4096,
    "temperature": 0.7,
    "repetition_penalty": 1.1,
    "attn_implementation": "sdpa",
    "use_flash_attention_2": True,
    "attention_bias": None,
    "mlp_bias": None,
    "pretraining_tp": None,
    "quantization_config": None,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "keys_to_ignore_at_inference": ["past_key_values"],
}


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_do_not_change_the_function(key):
    assert ModelConfig.from_hf({**CFG.to_hf(), key: HARMLESS[key]}) == CFG


def test_tensors_named_twice_are_refused_at_once(tmp_path):
    """The search for the name was quadratic: 100,000 of them took minutes."""
    entry = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(entry % (i // 2) for i in range(100_000)) + "}"
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    start = time.monotonic()
    with pytest.raises(UserError):
        TensorFiles(path)
    assert time.monotonic() - start < 20
    path.write_bytes((20 << 20).to_bytes(8, "little") + b" " * (21 << 20))
    with pytest.raises(UserError, match="a header of 20,971,520 bytes; at most"):
        TensorFiles(path)


@pytest.mark.parametrize(
    "content", ["[" * 10**6, '{"a":' * 10**5, "[" + "[]," * (5 << 20) + "[]]", '{"a": 1' + "0" * 5000 + "}"]
)
def test_json_without_measure(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match="config.json"):
        load_weights(tmp_path)


def test_what_is_no_checkpoint_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match="is this a checkpoint folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(x+x+)+y", r"(a|aa)+$", "("])
def test_a_pattern_that_takes_for_ever_is_refused(pattern, tmp_path, capfd):
    """A stranger's tokenizer.json may cut words by any expression; one that does not end is tried before it is used."""
    tokenizers = pytest.importorskip("tokenizers")
    from llm_common.text.hf_tokenizer import HfTokenizer

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(letters)}, []))
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    content = json.loads(t.to_str())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="takes too long|cannot be used") as caught:
        HfTokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_pattern_that_nobody_knows_and_that_ends_is_used(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from llm_common.text.hf_tokenizer import HfTokenizer

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(letters)}, []))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[A-Z]?[a-z]+|\s+|."), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.save(str(tmp_path / "tokenizer.json"))
    assert HfTokenizer(tmp_path).encode("Ab cD") == t.encode("Ab cD").ids

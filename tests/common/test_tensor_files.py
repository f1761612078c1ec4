"""safetensors files: read lazily and exactly; whatever is wrong or hostile in one is refused by name."""

import gc
import json
import os
import pickle
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_common.config import preset
from llm_common.errors import UserError
from llm_common.files.export import export
from llm_common.files.tensor_files import TensorFiles, open_model_files, read_tensors, write_tensors
from llm_common.run.checkpoint import load_weights
from llm_common.tensors import tensor_shapes

CFG = preset("tiny")


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(CFG).items()}


def raw(header: object, data: bytes = b"") -> bytes:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {**weights(), "empty": np.zeros((0, 3), np.float32), "scalar": np.float64(3.5)[()].reshape(())}
    write_tensors(tmp_path / "a.safetensors", tensors)
    files = TensorFiles(tmp_path / "a.safetensors")
    assert list(files) == sorted(tensors, key=list(files).index)
    for name, x in tensors.items():
        assert (files.entries[name].shape, files.entries[name].dtype) == (x.shape, x.dtype)
        np.testing.assert_array_equal(files[name], x)
        assert not x.size or not files[name].flags.writeable
    os.remove(tmp_path / "a.safetensors")  # what is open stays readable
    np.testing.assert_array_equal(files["model.norm.weight"], tensors["model.norm.weight"])


def test_transposed_views_are_written_as_they_look(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "a.safetensors", {"x": x})
    np.testing.assert_array_equal(read_tensors(tmp_path / "a.safetensors")["x"], x)


def test_bfloat16_is_read_as_the_float32_it_is(tmp_path):
    bits = np.array([0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x0001, 0x8000, 0x4049], np.uint16)
    (tmp_path / "a.safetensors").write_bytes(raw({"x": entry("BF16", (7,), (0, 14))}, bits.tobytes()))
    x = TensorFiles(tmp_path / "a.safetensors", finite=False)["x"]
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [1, -1, np.inf, -np.inf, 2.0**-133, -0.0, 3.140625])


HOSTILE = {
    "empty": b"",
    "short": b"\x08\0\0",
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "a header past the end": (100).to_bytes(8, "little") + b"{}",
    "a header that is not JSON": raw(b"{{{{{{{{"),
    "a header of deep lists": raw(b"[" * 100_000),
    "a list": raw([]),
    "offsets past the end": raw({"x": entry(offsets=(0, 800), shape=(200,))}, b"\0" * 8),
    "offsets that turn round": raw({"x": entry(offsets=(8, 0))}, b"\0" * 8),
    "negative offsets": raw({"x": entry(offsets=(-8, 0))}, b"\0" * 8),
    "a shape that does not fit": raw({"x": entry(shape=(3,))}, b"\0" * 8),
    "a shape that overflows": raw({"x": entry(shape=(2**40, 2**40))}, b"\0" * 8),
    "a hole": raw({"x": entry(), "y": entry(offsets=(16, 24))}, b"\0" * 24),
    "overlap": raw({"x": entry(), "y": entry(offsets=(4, 12))}, b"\0" * 12),
    "bytes left over": raw({"x": entry()}, b"\0" * 80),
    "an unknown dtype": raw({"x": entry("F31")}, b"\0" * 8),
    "integers": raw({"x": entry("I32")}, b"\0" * 8),
    "a name twice": raw(
        b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}", b"\0" * 8
    ),
    "a key twice": raw(b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
    "a path": raw({"../../etc/passwd": entry()}, b"\0" * 8),
    "an absolute path": raw({"/etc/passwd": entry()}, b"\0" * 8),
    "a pickle": pickle.dumps({"x": [1, 2, 3]}),
    "a zip": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"model\.safetensors"):
        TensorFiles(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzzed_files_are_read_or_refused_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    write_tensors(folder / "a.safetensors", {"x": np.arange(6, dtype=np.float32), "y": np.ones((2, 2), np.float64)})
    content = bytearray((folder / "a.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    (folder / "b.safetensors").write_bytes(content)
    try:
        files = TensorFiles(folder / "b.safetensors", finite=False)
    except UserError:
        return
    for x in files.values():
        assert np.asarray(x).nbytes <= len(content) * 2


def test_links_and_other_things_that_are_no_files(tmp_path):
    folder = tmp_path / "model"
    export(folder, CFG, weights())
    file = folder / "model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="a link to elsewhere"):
        load_weights(folder)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(UserError, match="model.safetensors"):
        load_weights(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="not a plain file"):
        load_weights(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="not a plain file"):
        load_weights(folder)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    export(tmp_path / "model", CFG, weights())
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (tmp_path / "model").iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_weights(snapshot)[0] == CFG


def test_a_pickle_in_the_place_of_weights_is_not_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.system, ("touch trapped",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"pytorch_model.bin: a pickle can run code and is not read"):
        open_model_files(tmp_path)
    assert not os.path.exists("trapped")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"model.norm.weight": "../x.safetensors"}), "'../x.safetensors' is not the name"),
        (lambda m: m.update({"model.norm.weight": "x.bin"}), "'x.bin' is not the name"),
        (lambda m: m.update({"model.norm.weight": "none.safetensors"}), "none.safetensors: no such file"),
        (lambda m: m.update({"extra": next(iter(m.values()))}), "tensor 'extra' is listed, but in none of the files"),
        (lambda m: m.pop("model.norm.weight"), "'model.norm.weight' is in a file, but not listed"),
        (lambda m: m.update({"model.norm.weight": 3}), "has no weight_map"),
    ],
)
def test_a_wrong_index_of_shards_is_refused(change, words, tmp_path):
    export(tmp_path / "model", CFG, weights(), shard_bytes=20_000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        load_weights(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), "tensor 'model.norm.weight' is missing"),
        (lambda w: w.update(extra=np.ones(2, np.float32)), "tensor 'extra' does not belong"),
        (lambda w: w.update({"model.norm.weight": np.ones(3, np.float32)}), r"has shape \(3,\)"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, words, tmp_path):
    tensors = weights()
    change(tensors)
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_hf()))
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match=words):
        load_weights(tmp_path)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    tensors = weights()
    (tmp_path / "config.json").write_text(json.dumps({**CFG.to_hf(), "tie_word_embeddings": True}))
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match="differs from the embedding, but the config ties the two"):
        load_weights(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)  # old files have it
    write_tensors(tmp_path / "model.safetensors", tensors)
    assert sorted(load_weights(tmp_path)[1]) == sorted(set(tensor_shapes(CFG)) - {"lm_head.weight"})


def test_open_files_are_closed_with_their_tensors(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones(3, np.float32)})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        TensorFiles(tmp_path / "a.safetensors")["x"].sum()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1

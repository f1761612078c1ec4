"""The table of sharding rules, and what a mesh must divide."""

import math
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from llm_common.config import PRESETS, ModelConfig, Recipe
from llm_common.errors import UserError
from llm_common.files.tensor_files import open_model_files, plan_shards, shard_index
from llm_common.run.estimates import GIB, memory_per_step
from llm_common.run.hosts import Hosts, roll_call
from llm_common.sharding import AXES, MeshConfig, check_mesh, check_sharded, shard_of, weight_axes
from llm_common.tensors import ReadOnDemand, tensor_shapes

CFG = ModelConfig(96, 32, 64, 2, 8, 4, head_dim=8, model_type="qwen2")


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 4, 1), MeshConfig(1, 1, 4), MeshConfig(4, 1, 1)])
def test_the_parts_cover_every_tensor_once_in_each_replica(mesh):
    for name, shape in tensor_shapes(CFG).items():
        seen = np.zeros((mesh.data, *shape), int)
        for device in range(mesh.size):
            at = mesh.coordinates(device)
            seen[at["data"]][shard_of(name, shape, mesh, at)] += 1
        cuts = math.prod(getattr(mesh, axis) for cut in weight_axes(name) for axis in cut)
        assert (seen == mesh.fsdp * mesh.tensor // cuts).all(), name


def test_every_weight_of_every_family_has_a_rule_of_its_rank():
    for cfg in (*PRESETS.values(), CFG, replace(CFG, model_type="qwen3"), replace(CFG, tie_word_embeddings=True)):
        for name, shape in tensor_shapes(cfg).items():
            axes = weight_axes(name)
            assert len(axes) == len(shape)
            assert set(sum(axes, ())) <= set(AXES)
            assert "fsdp" in sum(axes, ())  # nothing is left whole


def test_devices_and_rows():
    mesh = MeshConfig.parse("tensor=2, data=2,fsdp=3")
    assert mesh == MeshConfig(2, 3, 2)
    assert str(mesh) == "data=2,fsdp=3,tensor=2"
    assert mesh.size == 12
    assert mesh.coordinates(7) == {"data": 1, "fsdp": 0, "tensor": 1}
    assert [mesh.batch_shard(i) for i in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("text", ["data", "data=0", "rows=2", "data=2,data=2", "data=-1", "data=1.5"])
def test_what_is_not_a_mesh(text):
    with pytest.raises(UserError, match="mesh"):
        MeshConfig.parse(text)


@pytest.mark.parametrize(
    ("mesh", "batch", "steps", "words"),
    [
        ("tensor=8", 8, 1, "tensor = 8 does not divide num_key_value_heads = 4"),
        ("fsdp=5", 10, 1, "fsdp = 5 does not divide axis 1 of model.embed_tokens.weight = 32"),
        ("data=3", 8, 1, "data = 3 x fsdp = 1 does not divide batch_size = 8"),
        ("data=4,fsdp=2", 8, 2, r"batch_size / gradient_accumulation_steps = 4"),
    ],
)
def test_a_mesh_that_does_not_divide_names_number_and_axis(mesh, batch, steps, words):
    recipe = Recipe.from_settings(CFG, {"batch_size": batch, "seq_len": 4, "gradient_accumulation_steps": steps})
    with pytest.raises(UserError, match=words):
        check_sharded(MeshConfig.parse(mesh), recipe)
    with pytest.raises(UserError, match="tensor = 2 does not divide vocab_size = 97"):
        check_mesh(MeshConfig(tensor=2), replace(CFG, vocab_size=97))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_chunks": 2, "seq_len": 4}, "loss_chunks = 2 is for one device"),
        (
            {"attention_backend": "splash", "document_separator": 1},
            "'splash' hides no documents from each other; use 'auto'",
        ),
    ],
)
def test_what_a_mesh_cannot_do_is_said(settings, words):
    with pytest.raises(UserError, match=words):
        check_sharded(MeshConfig(data=2), Recipe.from_settings(CFG, {"batch_size": 8, "seq_len": 4, **settings}))


class TwoHosts(Hosts):
    """As the first of two hosts, the other of which gives prepared answers."""

    count = 2

    def __init__(self, *answers):
        self.answers = list(answers)

    def gather(self, value):
        answer = self.answers.pop(0)
        return [value, answer(value) if callable(answer) else answer]


def test_hosts_fail_together_and_notice_other_code():
    with pytest.raises(UserError, match="disk full on the other"):
        TwoHosts({"error": "disk full on the other"}).together(lambda: 1)
    assert TwoHosts({"result": 2}).together(lambda: 1) == [1, 2]
    assert TwoHosts({"result": None}).first(lambda: "x") == "x"
    with pytest.raises(UserError, match="process 1 on b has another code"):
        TwoHosts(lambda mine: mine | {"host": "b", "code": "0"}).check_same()
    with pytest.raises(UserError, match="another settings"):
        TwoHosts(lambda mine: mine | {"host": "b", "settings": "other"}).check_same(settings="mine")
    TwoHosts(lambda mine: mine).check_same(settings="mine")


def test_shards_keep_the_order_and_the_size(tmp_path):
    sizes = {f"t{i}": 10 for i in range(7)}
    assert list(plan_shards("model.safetensors", sizes)) == ["model.safetensors"]
    plan = plan_shards("model.safetensors", sizes, least=3)
    assert list(plan) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]  # of at most 70 / 3 bytes
    assert [name for names in plan.values() for name in names] == list(sizes)
    assert all(len(names) <= 2 for names in plan_shards("m.safetensors", sizes, shard_bytes=25).values())
    assert shard_index(plan, sizes)["metadata"]["total_size"] == 70
    with pytest.raises(UserError):
        open_model_files(tmp_path)


def test_tensors_on_demand_are_read_when_asked_for():
    asked = []
    tensors = ReadOnDemand(["a", "b"], lambda name: asked.append(name) or np.ones(2))
    assert list(tensors) == ["a", "b"]
    assert len(tensors) == 2
    assert not asked
    assert tensors["b"].shape == (2,)
    assert asked == ["b"]
    with pytest.raises(KeyError):
        tensors["c"]


def test_the_roll_call_waits_for_all_and_names_who_is_missing():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):  # the port is free again at once
            list(pool.map(lambda i: roll_call(address, i, 3, 20), range(3)))
        calls = [pool.submit(roll_call, address, i, 3, 1) for i in (0, 2)]
        for call in calls:
            with pytest.raises(UserError, match=r"of 3 processes these did not come within 1 s: \[1\]"):
                call.result()
    with pytest.raises(UserError, match="process 1 of 2 did not reach process 0"):
        roll_call(address, 1, 2, 0.1)
    with pytest.raises(UserError, match="not HOST:PORT"):
        roll_call("localhost", 1, 2, 0.1)


MEASURED = (  # preset, mesh, sequences, positions, remat, GiB on each device
    ("1b", "fsdp=16", 16, 2048, "full", 1.88),  # the TPU's compiler, v5e; docs/tpu_compiled.md
    ("1b", "fsdp=8", 16, 2048, "full", 3.57),  # v5p
    ("1b", "fsdp=16", 32, 2048, "full", 2.39),  # v6e
    ("8b", "fsdp=16,tensor=4", 16, 4096, "full", 4.08),
    ("8b", "fsdp=8,tensor=4", 8, 8192, "full", 8.89),
    ("1b", "", 16, 2048, "none", 57.6),  # H100, JAX; docs/scaling.md
    ("1b", "", 16, 2048, "none", 53.9),  # PyTorch
    ("1b", "data=2", 32, 2048, "none", 57.6),
    ("1b", "data=2", 32, 2048, "none", 60.2),
    ("1b", "fsdp=2", 32, 2048, "none", 51.4),
    ("1b", "fsdp=2", 32, 2048, "none", 50.2),
    ("1b", "", 32, 2048, "none", 101.1),  # H200, JAX
    ("1b", "", 32, 2048, "none", 93.3),  # PyTorch
    ("1b", "data=2", 64, 2048, "none", 101.1),
    ("1b", "data=2", 64, 2048, "none", 101.6),
    ("1b", "fsdp=2", 64, 2048, "none", 94.9),
    ("1b", "fsdp=2", 64, 2048, "none", 93.4),
)


@pytest.mark.parametrize(("name", "mesh", "batch", "length", "remat", "measured"), MEASURED)
def test_the_memory_model_is_within_a_tenth_of_what_was_measured(name, mesh, batch, length, remat, measured):
    settings = {"batch_size": batch, "seq_len": length, "compute_dtype": "bfloat16", "remat": remat}
    recipe = Recipe.from_settings(PRESETS[name], settings)
    parts = memory_per_step(recipe, fused_attention=True, compiled=True, mesh=MeshConfig.parse(mesh))
    assert abs(sum(parts.values()) / GIB / measured - 1) < 0.1

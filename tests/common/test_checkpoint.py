"""Checkpoint folders: whatever happens while one is written, the previous one loads; a damaged one is refused
by name.
"""

import json
import shutil

import numpy as np
import pytest

from llm_common.config import preset
from llm_common.errors import UserError
from llm_common.files.tensor_files import write_tensors
from llm_common.run import checkpoint
from llm_common.run.checkpoint import (
    TrainingState,
    held_out_loss,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from llm_common.run.settings import check_resumable
from llm_common.tensors import tensor_shapes
from llm_common.text.hf_tokenizer import load_tokenizer
from llm_common.text.tokenizer import Tokenizer

CFG, TOKENIZER = preset("tiny"), Tokenizer([])


def make_state(step: int) -> TrainingState:
    rng = np.random.default_rng(step)
    tensors = lambda: {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(CFG).items()
    }
    return TrainingState(tensors(), tensors(), tensors(), step, step - 1)


def test_saving_and_loading_is_the_identity(tmp_path):
    state = make_state(10)
    folder = save_checkpoint(tmp_path, CFG, state, {"seed": 3}, Tokenizer([]))
    assert folder.name == "step-00000010"
    cfg, loaded, settings = load_checkpoint(folder, CFG)
    assert cfg == CFG
    assert (loaded.step, loaded.adam_count, settings) == (10, 9, {"seed": 3})
    for name in tensor_shapes(CFG):
        for a, b in ((state.weights, loaded.weights), (state.mu, loaded.mu), (state.nu, loaded.nu)):
            np.testing.assert_array_equal(a[name], b[name])
    assert load_tokenizer(folder).vocab_size == 257
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010"]  # nothing temporary is left


@pytest.mark.parametrize("moment", ["model file", "optimizer file", "state file", "rename", "second rename"])
@pytest.mark.parametrize("same_step", [False, True])
def test_an_interrupted_save_leaves_the_previous_checkpoint(moment, same_step, tmp_path, monkeypatch):
    before = save_checkpoint(tmp_path, CFG, make_state(10), {})

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    def killed_at(name):
        return lambda path, *args: killed() if name in str(path) else write_tensors(path, *args)

    if moment == "second rename" and not same_step:
        return  # there is only one
    if moment.endswith("rename"):
        rename, calls = checkpoint.os.rename, []

        def counted(a, b):
            calls.append(a)
            return killed() if len(calls) == 1 + (moment == "second rename") else rename(a, b)

        monkeypatch.setattr(checkpoint.os, "rename", counted)
    elif moment == "state file":
        write = lambda path, content: killed() if "state" in str(path) else path.write_bytes(content)
        monkeypatch.setattr(checkpoint, "write_synced", write)
    else:
        monkeypatch.setattr(checkpoint, "write_tensors", killed_at(moment.split()[0]))
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, CFG, make_state(10 if same_step else 20), {})
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == before
    assert load_checkpoint(before)[1].step == 10
    save_checkpoint(tmp_path, CFG, make_state(20), {})  # and the next save cleans up
    assert load_checkpoint(latest_checkpoint(tmp_path))[1].step == 20


def test_every_damaged_byte_is_seen(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {}, Tokenizer([]))
    for name in ("model.safetensors", "optimizer.safetensors", "config.json", "bpe.json"):
        original = (folder / name).read_bytes()
        damaged = bytearray(original)
        damaged[-3] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            load_checkpoint(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name}: missing"):
            load_checkpoint(folder)
        (folder / name).write_bytes(original)
    load_checkpoint(folder)
    for text, words in (("[]", "format None"), ('{"format": 1}', "'adam_count' is missing")):
        (folder / "state.json").write_text(text)
        with pytest.raises(UserError, match=words):
            load_checkpoint(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="format None"):
        load_checkpoint(folder)
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match="no such file; is this a checkpoint folder"):
        load_checkpoint(folder)
    assert latest_checkpoint(tmp_path) is None  # a folder without its commit mark does not count


def test_weights_alone_are_checked_too(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {})
    damaged = bytearray((folder / "model.safetensors").read_bytes())
    damaged[-3] ^= 1
    (folder / "model.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        load_weights(folder)


def test_only_step_folders_are_checkpoints(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(7), {})
    for name in ("step-00000007.bak", "step-x", "other"):
        shutil.copytree(folder, tmp_path / name)
    assert latest_checkpoint(tmp_path) == folder


def test_a_newer_format_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {})
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 3}))
    with pytest.raises(UserError, match="format 3, but this version reads 2 and older"):
        load_checkpoint(folder)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {})
    with pytest.raises(UserError, match="another model: vocab_size = 96 here, 2048 asked for"):
        load_checkpoint(folder, preset("demo"))


def test_weights_alone_load_from_a_hugging_face_folder(tmp_path):
    state = make_state(1)
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_hf()))
    write_tensors(tmp_path / "model.safetensors", state.weights)
    cfg, weights = load_weights(tmp_path)
    assert cfg == CFG
    np.testing.assert_array_equal(weights["lm_head.weight"], state.weights["lm_head.weight"])
    assert load_tokenizer(tmp_path) is None


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):
    saved = {"train": {"seed": 0, "attention_backend": "auto"}, "data": {"tokens": 5}}
    check_resumable(tmp_path, saved, {"train": {"seed": 0, "attention_backend": "reference"}, "data": {"tokens": 5}})
    with pytest.raises(
        UserError, match="`seed` = 0 here, 1 asked for; `data` has other tokens .tokens 5 here, 6 asked for"
    ):
        check_resumable(tmp_path, saved, {"train": {"seed": 1}, "data": {"tokens": 6}})


def test_every_byte_of_the_commit_mark_counts(tmp_path):
    """state.json has a checksum of its own content: no change of a digit, a name or a loss goes unseen."""
    settings = {"seed": 3, "evaluation": {"loss": 2.5}}
    folder = save_checkpoint(tmp_path, CFG, make_state(12), settings, TOKENIZER)
    path = folder / "state.json"
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in (1, 4):
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            try:
                content = json.loads(path.read_bytes())
                same = content == json.loads(good)  # white space alone
            except ValueError:
                same = False
            if same:
                continue
            with pytest.raises(UserError):
                load_checkpoint(folder)
            assert held_out_loss(folder) is None
    path.write_bytes(good)
    assert held_out_loss(folder) == 2.5
    load_checkpoint(folder)


def test_a_step_under_another_name_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(20), {}, TOKENIZER)
    folder.rename(tmp_path / "step-00000024")
    with pytest.raises(
        UserError, match="is step 20, as its state.json says, under another name; name it step-00000020"
    ):
        load_checkpoint(tmp_path / "step-00000024")
    with pytest.raises(UserError, match="under another name"):
        load_weights(tmp_path / "step-00000024")
    (tmp_path / "step-00000024").rename(tmp_path / "the-best")  # a name of one's own says no step
    load_checkpoint(tmp_path / "the-best")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.json"]
)
def test_what_would_count_and_is_not_listed_is_refused(name, tmp_path):
    """A file laid beside a checkpoint's own must not decide which ids a text has, or where it ends."""
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {})
    (folder / name).write_text("{}")
    for load in (load_checkpoint, load_weights):
        with pytest.raises(UserError, match=f"{name}: no file of this checkpoint"):
            load(folder)
    (folder / name).unlink()
    save_file = folder / "model.safetensors.index.json"
    save_file.write_text(json.dumps({"weight_map": {}}))
    load_checkpoint(folder)  # not listed, so not looked at


def test_the_tokenizer_of_a_checkpoint_is_verified_with_the_weights(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {}, TOKENIZER)
    (folder / "bpe.json").write_text((folder / "bpe.json").read_text().replace("<|endoftext|>", "<|endofTEXT|>"))
    with pytest.raises(UserError, match=r"bpe.json: damaged \(its sha256"):
        load_weights(folder)
    (folder / "optimizer.safetensors").unlink()  # which the weights alone do not need


def test_older_checkpoints_are_read(tmp_path):
    folder = save_checkpoint(tmp_path, CFG, make_state(1), {"x": 1}, TOKENIZER)
    state = json.loads((folder / "state.json").read_text())
    del state["checksum"]
    (folder / "state.json").write_text(json.dumps({**state, "format": 1}))
    assert load_checkpoint(folder)[2] == {"x": 1}


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    for step, loss in enumerate((3.0, 1.0, float("nan"), None, 2.0, 4.0, float("inf")), 1):
        evaluation = {} if loss is None else {"evaluation": {"loss": loss if loss == loss and loss < 1e9 else None}}
        save_checkpoint(tmp_path, CFG, make_state(step), evaluation)
    # as an older version may have written it
    for step in (3, 7):
        path = tmp_path / f"step-0000000{step}" / "state.json"
        state = json.loads(path.read_text())
        state["settings"] = {"evaluation": {"loss": float("nan" if step == 3 else "-inf")}}
        state["format"] = 1
        path.write_text(json.dumps(state))
    prune_checkpoints(tmp_path, 1, 1)
    assert [x.name for x in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000007"]


def test_a_folder_that_is_nobodys_checkpoint_is_kept(tmp_path, capsys):
    """What lies where a checkpoint is to go is not ours to delete."""
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / "thesis.tex").write_text("mine")
    folder = save_checkpoint(tmp_path, CFG, make_state(2), {"data": {"tokens": 1}})
    load_checkpoint(folder)
    assert (tmp_path / "step-00000002.not-of-this-run-1" / "thesis.tex").read_text() == "mine"
    assert "is no checkpoint of this run" in capsys.readouterr().err
    other = save_checkpoint(tmp_path, CFG, make_state(2), {"data": {"tokens": 5}})  # a checkpoint, of another run
    assert load_checkpoint(other)[2]["data"] == {"tokens": 5}
    assert load_checkpoint(tmp_path / "step-00000002.not-of-this-run-2")[2]["data"] == {"tokens": 1}
    save_checkpoint(tmp_path, CFG, make_state(2), {"data": {"tokens": 5}, "framework": "jax"})  # of the same: replaced
    for step in (3, 4):
        save_checkpoint(tmp_path, CFG, make_state(step), {"data": {"tokens": 5}})
    save_checkpoint(tmp_path / "x", CFG, make_state(1), {"data": {"tokens": 9}}).rename(tmp_path / "step-00000001")
    prune_checkpoints(tmp_path, 1, 0, {"data": {"tokens": 5}})
    assert {x.name for x in tmp_path.glob("step-*[0-9]")} >= {"step-00000001", "step-00000004"}
    assert not (tmp_path / "step-00000003").exists()


def test_a_run_becomes_longer_and_not_shorter(tmp_path):
    saved = {"optimizer": {"total_steps": 100, "lr_max": 1.0}, "train": {"document_separator": [1, 2]}}
    check_resumable(
        tmp_path, saved, {"optimizer": {"total_steps": 200, "lr_max": 1.0}, "train": {"document_separator": (1, 2)}}
    )
    with pytest.raises(UserError, match="`total_steps` = 100 here, 50 asked for: a run may become longer, not shorter"):
        check_resumable(tmp_path, saved, {"optimizer": {"total_steps": 50, "lr_max": 1.0}})
    with pytest.raises(UserError, match=r"`lr_max` = 1.0 here, 2.0 asked for"):
        check_resumable(tmp_path, saved, {"optimizer": {"total_steps": 200, "lr_max": 2.0}})


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    first = save_checkpoint(tmp_path, CFG, make_state(1), {})
    state = make_state(2)
    state.weights["model.norm.weight"][0] = np.nan
    with pytest.raises(UserError, match="'model.norm.weight' is not finite"):
        save_checkpoint(tmp_path, CFG, state, {})
    assert [x.name for x in tmp_path.iterdir()] == [first.name]

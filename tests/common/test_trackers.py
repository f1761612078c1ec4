"""Weights & Biases and MLflow: what they are told, and that none of them can end a run."""

import sys
from types import SimpleNamespace

import pytest

from llm_common.errors import UserError
from llm_common.run import trackers
from llm_common.run.trackers import Trackers, parse_services

SETTINGS = {"train": {"seed": 3, "compute_dtype": "float32"}, "optimizer": {"lr_max": 1e-3}}


class FakeRun:
    def __init__(self, told):
        self.id, self.told = "abc", told

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finish")


def fake_wandb(told):
    def init(**how):
        told.append(how)
        return FakeRun(told)

    return SimpleNamespace(init=init)


def test_wandb_is_told_every_step_and_goes_on_as_the_same_run(tmp_path, monkeypatch):
    told: list = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(told))
    for i in range(2):
        board = Trackers(tmp_path, ["wandb"], SETTINGS)
        board.write(i + 1, {"loss": 2.5})
        board.close()
    first, again = told[0], told[3]
    assert (first["id"], again["id"]) == (None, "abc")
    assert first["config"] == SETTINGS
    assert first["resume"] == "allow"
    assert told[1:3] == [(1, {"loss": 2.5}), "finish"]
    assert told[4] == (2, {"loss": 2.5})


def test_a_service_that_fails_is_left_out_and_said_once(tmp_path, monkeypatch, capsys):
    told: list = []
    module = fake_wandb(told)
    monkeypatch.setitem(sys.modules, "wandb", module)
    board = Trackers(tmp_path, ["wandb"], SETTINGS)
    monkeypatch.setattr(FakeRun, "log", lambda *_, **__: 1 / 0)
    board.write(1, {"loss": 2.5})
    board.write(2, {"loss": 2.4})
    board.close()
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: wandb: division by zero; the run goes on without it, log.jsonl has everything"]
    module.init = lambda **_: (_ for _ in ()).throw(ConnectionError("no network"))
    Trackers(tmp_path, ["wandb"], SETTINGS).write(1, {"loss": 1.0})
    assert "wandb: no network" in capsys.readouterr().err


def test_names_are_refused_before_a_run(monkeypatch):
    assert parse_services(None) == ()
    with pytest.raises(UserError, match="wandbb: no such service: did you mean wandb"):
        parse_services("wandbb")
    monkeypatch.setattr(trackers, "require_package", lambda *names: None)
    assert parse_services("mlflow, wandb,mlflow") == ("mlflow", "wandb")


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_package_offline(name, tmp_path, monkeypatch, capsys):
    for package in {"wandb": ["wandb"], "mlflow": ["mlflow", "sqlalchemy"]}[name]:  # a slim mlflow keeps no database
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for i in range(2):
        board = Trackers(tmp_path, [name], SETTINGS)
        board.write(i + 1, {"loss": 2.5 - i})
        board.close()
    assert "without it" not in capsys.readouterr().err
    assert (tmp_path / f"{name}-id").read_text()
    if name == "mlflow":
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        history = client.get_metric_history((tmp_path / "mlflow-id").read_text(), "loss")
        assert [(x.step, x.value) for x in history] == [(1, 2.5), (2, 1.5)]

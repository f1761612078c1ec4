"""Plants the mutant of the process that began this one; Python imports this file by its name before anything else."""

import importlib.util
import json
import os
from pathlib import Path

if "ONE_MODEL_TWICE_MUTANT" in os.environ:
    _spec = importlib.util.spec_from_file_location("_server", Path(__file__).parents[1] / "server.py")
    assert _spec is not None and _spec.loader is not None  # noqa: PT018
    _server = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_server)
    _job = json.loads(os.environ[_server.VARIABLE])
    _server.plant(Path(_job["root"]), _job["edit"])

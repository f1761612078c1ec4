"""The processes of a run, one for each host, brought together by `jax.distributed`."""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_common.errors import UserError
from llm_common.run.hosts import Hosts, roll_call


class JaxHosts(Hosts):
    """The processes that `jax.distributed` has brought together."""

    def __init__(self, device: str) -> None:
        self.index, self.count, self.device = jax.process_index(), jax.process_count(), device

    def gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(data)] = data
        rows = multihost_utils.process_allgather(padded)
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def join_hosts(device: str = "auto", timeout: float = 300) -> Hosts:
    """Join the other processes of this run, if the environment says that there are any; to be called before anything
    else of JAX.

    Known are JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, and what `jax.distributed` finds by
    itself: SLURM, Open MPI, Kubernetes and Cloud TPU. Raises UserError if not all come within `timeout` seconds.
    """
    environment = os.environ
    if "JAX_NUM_PROCESSES" in environment:
        try:
            where = {
                "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"],
                "num_processes": int(environment["JAX_NUM_PROCESSES"]),
                "process_id": int(environment["JAX_PROCESS_ID"]),
            }
        except (KeyError, ValueError) as error:
            raise UserError(
                f"JAX_NUM_PROCESSES is set, but {error} is missing or no number; set "
                "JAX_COORDINATOR_ADDRESS=HOST:PORT, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host"
            ) from None
    elif any(int(environment.get(name, "1")) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")) or (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    ):
        where = {}
    else:
        return JaxHosts(device)
    if not jax.distributed.is_initialized():
        if where:  # JAX itself would end the process without a word that a person understands
            roll_call(where["coordinator_address"], where["process_id"], where["num_processes"], timeout)
        try:
            jax.distributed.initialize(**where, initialization_timeout=max(1, int(timeout)))
        except Exception as error:
            raise UserError(
                f"not all processes came within {timeout:g} s: {' '.join(str(error).split())[:600]}"
            ) from None
    return JaxHosts(device)

"""The processes of a run, one for each device, brought together in a process group."""

import atexit
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed has them, but does not export them

from llm_common.errors import UserError
from llm_common.run.hosts import Hosts
from torch_llm.engine.device import select_device


class TorchHosts(Hosts):
    """The processes of a process group; a host in this sense has one device."""

    def __init__(self, device: str) -> None:
        self.index, self.count, self.device = dist.get_rank(), dist.get_world_size(), device

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def join_hosts(device: str = "auto", timeout: float = 300) -> Hosts:
    """Join the other processes of this run, as torchrun's environment describes them, or SLURM's; a process alone is a
    group of one.

    Raises UserError, naming the processes, if not all come within `timeout` seconds.
    """
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        environment.setdefault("MASTER_PORT", "29500")
        for name, source in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
            environment[name] = environment[f"SLURM_{source}"]
        if "MASTER_ADDR" not in environment:
            raise UserError(
                "SLURM started several tasks: set MASTER_ADDR to the first host, as the README's script does"
            )
    if "RANK" not in environment:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    span = timedelta(seconds=timeout)
    where, came = (environment["MASTER_ADDR"], int(environment["MASTER_PORT"])), [f"came/{i}" for i in range(count)]
    try:
        store = TCPStore(*where, count, is_master=_is_master(rank), timeout=span, wait_for_workers=False)
        store.set(came[rank], socket.gethostname())
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {rank} of {count} did not reach process 0 at {where[0]}:{where[1]} within {timeout:g} s "
            f"({str(error).splitlines()[0]}); is it running, and is MASTER_ADDR its host?"
        ) from None
    try:
        store.wait(came, span)
    except RuntimeError:
        missing = ", ".join(str(i) for i in range(count) if not store.check([came[i]]))
        raise UserError(
            f"of {count} processes these did not come within {timeout:g} s: {missing}; look at their output"
        ) from None
    target = select_device(device)
    cuda = target.type == "cuda"
    if cuda:
        index = int(environment.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise UserError(
                f"process {rank} would use GPU {index}, but {torch.cuda.device_count()} are here; give a smaller "
                "`mesh`, or name more hosts (NNODES)"
            )
        target = torch.device("cuda", index)
        torch.cuda.set_device(target)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=PrefixStore("group", store), rank=rank, world_size=count
    )
    # Gloo's threads need the GIL to free their last tensors, and abort the process if the interpreter is shutting down
    # by then. Sleeping releases the GIL first.
    atexit.register(time.sleep, 0.1)
    return TorchHosts(str(target))


def _is_master(rank: int) -> bool:
    """Whether this process must open the store: torchrun's agent may have done so already."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

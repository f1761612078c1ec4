"""One process for each device of a host, begun by the program itself: what torchrun does, with one line where something
is wrong.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from types import FrameType

from llm_common.errors import SAID, UserError
from llm_common.processes import lifeline

GRACE = 10.0  # seconds that the others have to end by themselves once one has failed


def processes_here(devices: int) -> int:
    """How many of a mesh's devices are for this host: all, or an equal share of them where NNODES says that there are
    more hosts.

    Raises UserError for a share that is not whole, and for a host without its number or the first one's address.
    """
    hosts = _number("NNODES", 1)
    if hosts == 1:
        return devices
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"NNODES={hosts}: set {' and '.join(missing)} as well, on every host")
    if _number("NODE_RANK", 0) >= hosts:
        raise UserError(f"NODE_RANK={os.environ['NODE_RANK']}: hosts are counted from 0, and NNODES is {hosts}")
    if devices % hosts:
        raise UserError(
            f"a mesh of {devices} devices cannot be shared by NNODES={hosts} hosts: change `mesh` or NNODES"
        )
    return devices // hosts


def _number(name: str, least: int) -> int:
    """The whole number that an environment variable holds, `least` if it is not set."""
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text)


def launch(devices: int) -> int:
    """Run this program's command line again in a process for each of this host's devices; returns the exit code of the
    first that failed, or 0. They form a group of `devices`, with those of other hosts where the environment names these
    (`processes_here`).

    Ctrl-C and SIGTERM reach all of them. What they say on stderr is shown once, however many say it.
    """
    count = processes_here(devices)
    first = _number("NODE_RANK", 0) * count if count < devices else 0
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())} if count == devices else {}
    with lifeline() as (descriptor, variables):
        processes: list[subprocess.Popen[bytes]] = []
        for i in range(count):
            ranks = {"RANK": str(first + i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(devices)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *sys.argv],
                    env={**os.environ, **address, **ranks, **variables},
                    stdout=None if first + i == 0 else subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[descriptor],
                    start_new_session=True,  # a terminal's Ctrl-C comes once, through this process
                )
            )
        return _attend(processes)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _attend(processes: list[subprocess.Popen[bytes]]) -> int:
    """Pass signals on to the processes and show what they say until they have ended; the exit code of the first that
    failed, or 0.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    said = {f"{line}\n".encode() for line in SAID}
    readers = [threading.Thread(target=_show, args=(process, said)) for process in processes]
    try:
        for reader in readers:
            reader.start()
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for reader in readers:
            reader.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(process: subprocess.Popen[bytes], said: set[bytes]) -> None:
    """Pass on what a process writes to stderr, but no line that another one has written."""
    assert process.stderr is not None
    for line in process.stderr:
        if line not in said:
            said.add(line)
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """The exit code of the first process that failed, or 0; the others have a while to end then."""
    waiting = list(processes)
    while waiting:
        for process in waiting:
            try:
                code = process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            waiting = [other for other in waiting if other is not process]
            if code:
                for other in waiting:
                    try:
                        other.wait(GRACE)
                    except subprocess.TimeoutExpired:
                        other.kill()
                return code if code > 0 else 128 - code
            break
    return 0

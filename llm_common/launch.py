"""One process for each device of a host, begun by the program itself: what torchrun does, with one line where something is wrong."""

import os
import signal
import socket
import subprocess
import sys
import threading
from types import FrameType

PARENT = "ONE_MODEL_TWICE_PARENT"  # names the descriptor of a pipe that closes when the process that launched this one is gone
GRACE = 10.0  # seconds that the others have to end by themselves once one has failed


def launch(count: int) -> int:
    """Run this program's command line again in `count` processes that form a group; returns the exit code of the first that failed, or 0.

    Ctrl-C and SIGTERM reach all of them. What they say on stderr is shown once, however many say it.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    reading, writing = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, PARENT: reading}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(x) for name, x in variables.items()}}
        processes.append(
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env=environment,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[reading],
                start_new_session=True,  # a terminal's Ctrl-C comes once, through this process
            )
        )
    os.close(reading)

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    said: set[bytes] = set()
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
        os.close(writing)


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


def end_with_launcher() -> None:
    """Let this process end when the one that launched it is gone. Nothing happens in a process that was not launched."""
    descriptor = os.environ.get(PARENT)
    if descriptor is None:
        return

    def watch() -> None:
        os.read(int(descriptor), 1)  # returns when the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

"""The processes that train together, as what is neither framework's sees them: they agree, wait for each other, share
out work.

A host is one process: in JAX it drives all devices of a machine, in torch one device.
"""

import hashlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llm_common.errors import UserError

T = TypeVar("T")


class Hosts:
    """One process alone; the frameworks' subclasses are several. All hosts call the same methods in the same order.

    device: the name of the device, or of the kind of devices, that this process drives.
    """

    index, count, device = 0, 1, "auto"

    def gather(self, value: Any) -> list[Any]:
        """Every host's value, which is JSON, in the order of the hosts."""
        return [value]

    def together(self, action: Callable[[], T]) -> list[T]:
        """Do something on every host and return what came of it, as JSON. Where it fails on one, all raise its
        UserError.
        """
        try:
            outcome = {"result": action()}
        except UserError as error:
            outcome = {"error": str(error)}
        outcomes = self.gather(outcome)
        for outcome in outcomes:
            if "error" in outcome:
                raise UserError(outcome["error"])
        return [outcome["result"] for outcome in outcomes]

    def first(self, action: Callable[[], T]) -> T:
        """Do something on the first host alone; all return its result, as JSON, or raise its UserError."""
        return self.together(lambda: action() if self.index == 0 else None)[0]  # pyright: ignore[reportReturnType]

    def check_same(self, **values: Any) -> None:
        """Raise UserError, naming the hosts, unless the values and the code are the same on all of them."""
        mine = {"host": socket.gethostname(), "code": code_hash(), **values}
        first, *others = self.gather(mine)
        for index, other in enumerate(others, 1):
            for key in mine:
                if key != "host" and other[key] != first[key]:
                    raise UserError(
                        f"process {index} on {other['host']} has another {key} than process 0 on {first['host']} "
                        f"({other[key]} against {first[key]}); install the same version and pass the same flags on all"
                    )


ONE_HOST = Hosts()


def code_hash() -> str:
    """sha256 of the source of this program's packages, shortened: tells two versions apart."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in ("llm_common", "jax_llm", "torch_llm"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def text_hash(value: Any) -> str:
    """sha256 of a value's text, shortened."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def roll_call(address: str, index: int, count: int, timeout: float) -> None:
    """Wait until all processes of a run are there: the first listens at `address` (HOST:PORT), the others report to it.

    The port is free again afterwards. Raises UserError, naming who is missing, if not all come within `timeout`
    seconds.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{address!r} is not HOST:PORT, the address of process 0")
    deadline = time.monotonic() + timeout
    if index == 0:
        _await_others(int(port), count, deadline, timeout)
    else:
        _report(host, int(port), index, deadline, f"process {index} of {count}", timeout)


def _await_others(port: int, count: int, deadline: float, timeout: float) -> None:
    came: dict[int, socket.socket] = {}
    with socket.create_server(("", port)) as server:
        while len(came) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                came[int(connection.recv(64))] = connection
            except (OSError, ValueError):
                continue  # the deadline, or somebody who is not one of us
    missing = [i for i in range(1, count) if i not in came]
    error = f"of {count} processes these did not come within {timeout:g} s: {missing}; look at their output"
    for connection in came.values():
        with connection:
            connection.sendall((error if missing else "ok").encode())
            connection.recv(1)  # the other end closes first, so that the port is free at once
    if missing:
        raise UserError(error)


def _report(host: str, port: int, index: int, deadline: float, who: str, timeout: float) -> None:
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(str(index).encode())
                connection.settimeout(max(deadline - time.monotonic(), 0) + 10)
                answer = connection.recv(4096).decode()
                break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{who} did not reach process 0 at {host}:{port} within {timeout:g} s ({error}); is it running?"
                ) from None
            time.sleep(0.2)
    if answer != "ok":
        raise UserError(answer or f"{who}: process 0 went away")

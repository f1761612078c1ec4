"""Chat templates of strangers, rendered as transformers renders them, in a process that is bounded in time and
memory.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm_common.errors import UserError, require_package

SECONDS = 1.5  # for one conversation; a template that ends takes some milliseconds
START_SECONDS = 60.0  # for the process to come up, on however busy a machine
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message's reasoning comes


class _Worker:
    """The process that renders; begun when it is needed, killed when a template takes too long."""

    def __init__(self) -> None:
        self._lock, self._process = threading.Lock(), None

    def render(self, template: str, context: dict[str, Any]) -> str:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._begin()
            found = self._ask(template, context, SECONDS)
        if "error" in found:
            raise UserError(f"the chat template failed: {found['error']}")
        return found["text"]

    def _begin(self) -> None:
        require_package("jinja2", "hf")
        # -P: the modules beside the worker's file must not stand before those of the standard library
        command = [sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py"))]
        # in a group of its own: Ctrl-C is for this program, and the worker ends when its stdin is closed, however that
        # comes about
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        atexit.register(self._end, self._process)
        if self._ask("", {}, START_SECONDS).get("text") != "":
            raise UserError(
                "chat templates cannot be rendered here; is the package jinja2 whole? pip install --force jinja2"
            )

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _ask(self, template: str, context: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        request = json.dumps({"template": template, "context": context}).encode()
        until = time.monotonic() + seconds
        try:
            process.stdin.write(len(request).to_bytes(8, "little") + request)
            process.stdin.flush()
            length = int.from_bytes(self._read(process, 8, until), "little")
            return json.loads(self._read(process, length, until))
        except TimeoutError:
            self._end(process)
            return {"error": f"it did not end within {seconds:g} seconds"}
        except (OSError, EOFError):
            self._end(process)
            return {"error": "it ended the process that renders it; it may need too much memory"}

    @staticmethod
    def _read(process: subprocess.Popen, size: int, until: float) -> bytes:
        assert process.stdout is not None
        found = bytearray()
        while len(found) < size:
            if not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(process.stdout.fileno(), min(size - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return bytes(found)


_worker = _Worker()


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    special_tokens: dict[str, str],
) -> str:
    """A conversation in a chat template. special_tokens: those that the tokenizer has, "bos_token" and so on.

    Raises UserError, in one line, for whatever goes wrong in the template, and for one that takes too long or too much.
    """
    plain = [{key: x for key, x in message.items() if x is not None} for message in messages]
    for i, message in enumerate(plain):
        reasoning = next((message[key] for key in REASONING if key in message), None)
        if reasoning is not None:
            plain[i] = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    context = {
        "messages": plain,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
    }
    return _worker.render(template, context)

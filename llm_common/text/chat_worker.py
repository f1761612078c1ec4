"""Renders chat templates for `chat_template`, in a process of its own whose memory is bounded and which may be killed.

A template is a stranger's program. It runs in jinja's sandbox, with what transformers 5 offers one, and nothing else.
Read from stdin and written to stdout are JSON objects, each after its length as 8 bytes. This file imports nothing of
this project.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 768 << 20  # bytes of address space, the interpreter's own among them
CPU_SECONDS = 5.0
LARGEST = 64 << 20  # characters of a rendered conversation


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant said. It changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


class Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class Namespace(jinja2.utils.Namespace):
    """jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace stores no name with an underscore before it: {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that transformers gives a chat template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


def answer(environment: Any, templates: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """{"text": ...}, or {"error": one line}."""
    try:
        source = request["template"]
        if source not in templates:
            templates.clear()  # one conversation's template at a time
            templates[source] = environment.from_string(source)
        text = templates[source].render(**request["context"])
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply, or calls itself without end"}
    except BaseException as error:  # a stranger's program may raise anything
        line = getattr(error, "lineno", None)
        words = " ".join(str(error).split())[:500] or type(error).__name__
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return {"error": kind + words + (f" (line {line})" if line else "")}
    if len(text) > LARGEST:
        return {"error": f"it renders {len(text):,} characters; at most {LARGEST:,} are taken"}
    return {"text": text}


def main() -> None:
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a system that does not know this limit
            resource.setrlimit(limit, (value, value))
    environment, templates = make_environment(), {}
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(length := source.read(8)) == 8:
        request = json.loads(source.read(int.from_bytes(length, "little")))
        signal.setitimer(
            signal.ITIMER_VIRTUAL, CPU_SECONDS
        )  # ends this process, should the one that waits for it be gone
        try:
            result = json.dumps(answer(environment, templates, request)).encode()
        except MemoryError:
            result = b'{"error": "it needs too much memory"}'
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        target.write(len(result).to_bytes(8, "little") + result)
        target.flush()


if __name__ == "__main__":
    main()

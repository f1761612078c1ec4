"""What stands between the `tokenizers` library and strangers' files: transformers' classes, patterns without end,
panics.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_common.errors import UserError, notice
from llm_common.text.tokenizer_folder import TokenizerFolder
from llm_common.text.tokenizer_json import QWEN2_PATTERN, SPELLINGS

PROBE_SECONDS = 1.8  # for a pre-tokenizer that nobody knows, to cut texts made to be hard
# Steps of a tokenizer whose time is known; a Split with an unknown pattern is tried first.
_HARMLESS = frozenset(
    [
        "ByteLevel",
        "Digits",
        "Metaspace",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
        "UnicodeScripts",
        "BertPreTokenizer",
    ]
)


def cut_as_class(tokenizer: Any, folder: TokenizerFolder, content: dict[str, Any]) -> None:
    """What transformers' class for this folder does to tokenizer.json: its own way of cutting text, whatever the file
    says.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    name, prefix_space = folder.class_name, folder.config.get("add_prefix_space")
    if name == "LlamaTokenizer" and not _is_byte_level(content):
        prefix_space = True if prefix_space is None else bool(prefix_space)
        scheme = ("always" if folder.config.get("legacy", False) else "first") if prefix_space else "never"
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix_space else []))
    elif name in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        if not _is_byte_level(content):
            raise UserError(
                f"{folder.path}: tokenizer.json is not byte-level, but transformers takes it for a {name}, which is; "
                "say what it is "
                "by tokenizer_class in tokenizer_config.json and by model_type in config.json"
            )
        before = [content.get(key) for key in ("normalizer", "pre_tokenizer")]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix_space), use_regex=name == "GPT2Tokenizer")
        tokenizer.normalizer = normalizers.NFC() if name == "Qwen2Tokenizer" else None
        tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
        if name == "Qwen2Tokenizer":
            split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.model.ignore_merges = False
        if _cutting(before) != _cutting(
            [json.loads(tokenizer.to_str()).get(key) for key in ("normalizer", "pre_tokenizer")]
        ):
            notice(
                f"{folder.path}: text is cut as transformers' {name} does it, and not as tokenizer.json says; a "
                'tokenizer_class of "PreTrainedTokenizerFast" in tokenizer_config.json would follow the file'
            )


def _cutting(steps: list[Any]) -> str:
    """How a normalizer and a pre-tokenizer, as JSON, cut a text: without what is said of the places of pieces alone."""
    flat: list[Any] = []
    for step in steps:
        inner = step.get("normalizers") or step.get("pretokenizers") if isinstance(step, dict) else None
        flat += inner if isinstance(inner, list) else [step]
    return json.dumps(
        [{k: v for k, v in x.items() if k != "trim_offsets"} for x in flat if isinstance(x, dict)], sort_keys=True
    )


def _is_byte_level(content: dict[str, Any]) -> bool:
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps)


def probe(path: Path, content: dict[str, Any]) -> bool:
    """Whether a tokenizer has patterns that nobody knows; they are tried first. Raises UserError if they take
    too long.
    """
    steps: list[Any] = []
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = content.get(key)
        found = step.get(inner, [step]) if isinstance(step, dict) else []
        steps += found if isinstance(found, list) else [found]
    patterns = [step.get("pattern") for step in steps if isinstance(step, dict) and step.get("type") not in _HARMLESS]
    expressions = [x.get("Regex") for x in patterns if isinstance(x, dict) and "Regex" in x]
    if all(x in SPELLINGS for x in expressions):
        return False
    model = {"type": "BPE", "vocab": {}, "merges": []}
    bare = json.dumps({"version": "1.0", "added_tokens": [], "model": model} | {
        key: content.get(key) for key in ("normalizer", "pre_tokenizer")
    })  # fmt: skip
    program = Path(__file__).with_name("pattern_probe.py")
    try:
        result = subprocess.run(
            [sys.executable, "-P", str(program)],
            input=bare.encode(),
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{path}: its pre-tokenizer takes too long for texts of 40 letters; its pattern is not used"
        ) from None
    if result.returncode:
        words = result.stderr.decode("utf-8", "replace").strip().splitlines() or [""]
        reason = next((line for line in words if "retry-limit" in line), words[-1])[:200]
        raise UserError(f"{path}: its normalizer or pre-tokenizer cannot be used ({reason})")
    return True


@contextlib.contextmanager
def quiet(active: bool) -> Iterator[None]:
    """While this is open, if it is active, nothing reaches stderr: a panic of the library writes pages there before it
    is caught.
    """
    if not active:
        yield
        return
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def unless_panic(error: BaseException, what: str) -> BaseException:
    """The error to raise for something that is no Exception: a panic becomes a UserError, Ctrl-C stays what it is."""
    return UserError(f"{what} ({str(error)[:200]})") if type(error).__name__ == "PanicException" else error

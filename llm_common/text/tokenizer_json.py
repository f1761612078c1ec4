"""Hugging Face's tokenizer files of byte-level BPE, written and read without its library.

Read are GPT-2's `vocab.json` with `merges.txt`, and `tokenizer.json` with the pre-tokenizers of GPT-2, Llama 3, Qwen
and SmolLM2. Everything else is refused, and what is different is named: ids that are nearly right are worse than none.
"""

import functools
import json
from pathlib import Path
from typing import Any

from llm_common.errors import UserError, parse_json
from llm_common.text.tokenizer import END_OF_TEXT, Tokenizer
from llm_common.text.tokenizer_folder import TokenizerFolder, say_other_id
from llm_common.text.words import PATTERNS, without_possessive

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = _CONTRACTIONS + r"\p{N}" + _REST
SPELLINGS = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama3", QWEN2_PATTERN: "qwen2"}
USE_LIBRARY = "install the tokenizers package, which reads every kind"


def to_hf_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` that give the same ids in `tokenizers` and transformers."""
    special = {i: text for text, i in tokenizer.added.items()}
    write = to_letters
    vocab = {special.get(i) or write(token): i for i, token in tokenizer.vocab.items()}
    if len(vocab) < len(tokenizer.vocab):
        clash = next(
            text
            for text in special.values()
            if write(text.encode()) != text and _bytes(text) in tokenizer.vocab.values()
        )
        raise UserError(
            f"special token {clash!r} is, in Hugging Face's files, also the spelling of other bytes; take another "
            "text for it"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    normalizer = None if tokenizer.normalization is None else {"type": tokenizer.normalization}
    split = {
        "type": "Split",
        "pattern": {"Regex": _export_pattern(tokenizer.pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": text in tokenizer.special_tokens}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, text in sorted(special.items())
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _template(tokenizer),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": vocab,
            "merges": [[write(a), write(b)] for a, b in tokenizer.merges],
        },
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.end_of_text is not None:
        config |= {
            "bos_token": next(iter(tokenizer.prompt_prefix), tokenizer.end_token),
            "eos_token": tokenizer.end_token,
        }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8"),
        "tokenizer_config.json": json.dumps(config, indent=2).encode("utf-8"),
    }


def _export_pattern(name: str) -> str:
    """A pattern as the library's regular expressions read it: a + after a quantifier is a repetition, $ the end of any
    line.
    """
    return without_possessive(PATTERNS[name]).replace("$", r"\z")


def _template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What puts the prompt's prefix before a text."""
    if not tokenizer.prompt_prefix:
        return None
    special = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokenizer.prompt_prefix]
    text = lambda name: {"Sequence": {"id": name, "type_id": 0}}
    ids = {x: {"id": x, "ids": [tokenizer.special_tokens[x]], "tokens": [x]} for x in tokenizer.prompt_prefix}
    return {
        "type": "TemplateProcessing",
        "single": [*special, text("A")],
        "pair": [*special, text("A"), text("B")],
        "special_tokens": ids,
    }


def read_hf_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`.

    Raises UserError if it is not byte-level BPE with a pre-tokenizer that is known, naming what it is.
    """
    found = TokenizerFolder(folder)
    path = folder / ("tokenizer.json" if "tokenizer.json" in found.files else "vocab.json")
    if path.name not in found.files:
        raise UserError(f"{path}: no such file")
    try:
        content = parse_json(found.files[path.name], str(path))
        if path.name == "vocab.json":
            return _read_vocab_and_merges(found, path, content)
        return _read_tokenizer_json(found, path, content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a tokenizer ({type(error).__name__}: {str(error)[:200]})") from None


# The classes whose tokenizer vocab.json and merges.txt are, and the pattern and the normalization that the class adds
# to them.
_CLASSES = {"GPT2Tokenizer": ("gpt2", None), "CodeGenTokenizer": ("gpt2", None), "Qwen2Tokenizer": ("qwen2", "NFC")}


def _read_vocab_and_merges(found: TokenizerFolder, path: Path, numbers: dict[str, int]) -> Tokenizer:
    """vocab.json and merges.txt say nothing of how words are cut; the class does, which tokenizer_config.json or the
    model names.
    """
    if "merges.txt" not in found.files:
        raise UserError(f"{path.with_name('merges.txt')}: no such file; it belongs to vocab.json")
    name = found.class_name or "GPT2Tokenizer"
    if name not in _CLASSES:
        raise UserError(
            f"{path}: belongs to a {name}, which cuts words in a way that only a tokenizer.json says; "
            "save the tokenizer with transformers as a fast tokenizer"
        )
    if found.config.get("add_prefix_space"):
        raise UserError(
            f"{path}: a tokenizer with add_prefix_space is not known; save it with transformers as a fast one"
        )
    pattern, normalization = _CLASSES[name]
    merges_path = path.with_name("merges.txt")
    text = found.files["merges.txt"].decode("utf-8-sig")
    merges = _merges(merges_path, [x for x in text.split("\n") if x.strip() and not x.startswith("#version")])
    letters = {text: _bytes(text) for text in numbers}
    added = dict(found.added)
    if not added:  # GPT-2's own files say nowhere which tokens are not made of merges
        made = {bytes([b]) for b in range(256)} | {a + b for a, b in merges}
        added = {
            t: {"id": i, "special": True} for t, i in numbers.items() if letters[t] is None or letters[t] not in made
        }
    for text in found.named.values():
        if text in numbers:
            added.setdefault(text, {"id": numbers[text], "special": True})
    _renumber(path, numbers, added)
    return _tokenizer(
        found, path, merges, added, pattern, {t: i for t, i in numbers.items() if t not in added}, normalization
    )


def _read_tokenizer_json(found: TokenizerFolder, path: Path, content: dict[str, Any]) -> Tokenizer:
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path}: a {model['type']} model, not byte-level BPE; {USE_LIBRARY}")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout", "fuse_unk"):
        if model.get(key):
            raise UserError(f"{path}: BPE with {key}, not byte-level BPE; {USE_LIBRARY}")
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UserError(f"{path}: normalizer {normalizer} is not known; {USE_LIBRARY}")
    added = {token["content"]: token for token in content.get("added_tokens") or []}
    added |= {text: token for text, token in found.added.items() if text not in added}
    for text in found.named.values():
        if text in model["vocab"]:
            added.setdefault(text, {"id": model["vocab"][text], "special": True})
    _renumber(path, model["vocab"], added)
    ignore = bool(model.get("ignore_merges"))
    if found.class_name in _CLASSES:  # as transformers has it
        if found.config.get("add_prefix_space"):
            raise UserError(f"{path}: a {found.class_name} with add_prefix_space is not known; {USE_LIBRARY}")
        (pattern, normalizer), ignore = _CLASSES[found.class_name], False
    else:
        pattern = _pattern(path, content.get("pre_tokenizer"))
    merges = _merges(path, model["merges"])
    vocab = {text: i for text, i in model["vocab"].items() if added.get(text, {}).get("id") != i}
    prefix = _prefix(path, content.get("post_processor"))
    return _tokenizer(found, path, merges, added, pattern, vocab, normalizer, prefix, ignore)


def _renumber(path: Path, vocab: dict[str, int], added: dict[str, dict[str, Any]]) -> None:
    """Give added tokens the ids that Hugging Face's library gives them: the vocabulary's, otherwise the next one, gaps
    or not.
    """
    most, taken = -1, set(vocab.values())
    for text, token in sorted(added.items(), key=lambda item: item[1]["id"]):
        number = vocab.get(text, max(most + 1, len(vocab)))
        most = max(most, number)
        if text not in vocab and number in taken:
            raise UserError(
                f"{path}: the added token {text!r} gets id {number}, as in transformers, which another token has"
            )
        if number != token["id"]:
            say_other_id(path, text, token["id"], number)
            added[text] = {**token, "id": number}


def _tokenizer(
    found: TokenizerFolder,
    path: Path,
    merges: list[tuple[bytes, bytes]],
    added: dict[str, dict[str, Any]],
    pattern: str,
    numbers: dict[str, int],
    normalization: str | None,
    prefix: list[str] | None = None,
    ignore_merges: bool = False,
) -> Tokenizer:
    """A tokenizer of the tokens that merges make, by their letters, and of added ones."""
    vocab = {}
    for text, i in numbers.items():
        letters = _bytes(text)
        if letters is None:
            raise UserError(f"{path}: token {text[:100]!r} is not byte-level; {USE_LIBRARY}")
        vocab[i] = letters
    for text, token in added.items():
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                raise UserError(f"{path}: token {text!r} with {key} is not known; {USE_LIBRARY}")
    if found.config.get("split_special_tokens"):
        raise UserError(
            f"{path}: split_special_tokens, by which no text has a special token, is not known; {USE_LIBRARY}"
        )
    for text in (*found.named.values(), *found.more_special):
        if text not in added:
            raise UserError(
                f"{path}: the special token {text!r} is not in the vocabulary, and its id only guessed; {USE_LIBRARY}"
            )
    if prefix is None:  # no file says; so the flag does, as in transformers
        bos = found.special("bos_token")
        prefix = [bos] if found.config.get("add_bos_token") and bos is not None else []
    found.vocabulary_tokens = tuple(added)
    special = {text: token["id"] for text, token in added.items() if token.get("special")}
    ordinary = {text: token["id"] for text, token in added.items() if not token.get("special")}
    end = found.document_end(lambda text: text in added)
    return Tokenizer(
        merges,
        special,
        pattern,
        vocab,
        ignore_merges,
        normalization,
        prefix,
        end or END_OF_TEXT,
        added_tokens=ordinary,
        folder=found,
    )


def _pattern(path: Path, pre_tokenizer: Any) -> str:
    """The name of a pre-tokenizer's pattern."""
    kind = (pre_tokenizer or {}).get("type")
    steps = pre_tokenizer["pretokenizers"] if kind == "Sequence" else [pre_tokenizer] if kind else []
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise UserError(f"{path}: pre-tokenizer {kind or 'none'} is not byte-level; {USE_LIBRARY}")
    if steps[-1].get("add_prefix_space"):
        raise UserError(f"{path}: a pre-tokenizer with add_prefix_space is not known; {USE_LIBRARY}")
    own = steps[-1].get("use_regex", True)
    match [step["type"] for step in steps[:-1]]:
        case [] if own:
            return "gpt2"
        case ["Digits"] if own and steps[0].get("individual_digits"):
            return "smollm2"
        case ["Split"] if not own and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            spelling = steps[0]["pattern"].get("Regex")
            known = SPELLINGS | {_export_pattern(name): name for name in PATTERNS}
            if spelling in known:
                return known[spelling]
            raise UserError(f"{path}: the pattern {spelling!r} of its pre-tokenizer is not known; {USE_LIBRARY}")
    names = ", ".join(step["type"] for step in steps)
    raise UserError(f"{path}: the pre-tokenizer {names} is not known; {USE_LIBRARY}")


def _prefix(path: Path, processor: Any) -> list[str]:
    """The special tokens that a post-processor puts before a text."""
    kind = (processor or {}).get("type")
    if kind in (None, "ByteLevel"):
        return []
    if kind == "Sequence":
        return [token for step in processor["processors"] for token in _prefix(path, step)]
    if kind != "TemplateProcessing" or "Sequence" not in processor["single"][-1]:
        raise UserError(
            f"{path}: the post-processor {kind} is not known, or puts something after a text; {USE_LIBRARY}"
        )
    return [step["SpecialToken"]["id"] for step in processor["single"][:-1]]


def _merges(path: Path, rows: list[Any]) -> list[tuple[bytes, bytes]]:
    out = []
    for number, row in enumerate(rows):
        left, right = (_bytes(x) for x in (row.split(" ") if isinstance(row, str) else row))
        if left is None or right is None:
            raise UserError(f"{path}: merge {number} ({row!r}) is not byte-level; {USE_LIBRARY}")
        out.append((left, right))
    return out


def to_letters(token: bytes) -> str:
    """GPT-2's printable letters for a token's bytes."""
    letters = _byte_letters()
    return "".join(letters[b] for b in token)


def is_letter_of_a_byte(character: str) -> bool:
    """Whether a character is one of GPT-2's printable letters."""
    return character in _letter_bytes()


def _bytes(token: str) -> bytes | None:
    """The bytes that a token's printable letters stand for, or None."""
    numbers = _letter_bytes()
    return bytes(numbers[x] for x in token) if all(x in numbers for x in token) else None


@functools.cache
def _letter_bytes() -> dict[str, int]:
    return {letter: b for b, letter in _byte_letters().items()}


@functools.cache
def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: printable Latin-1 stands for itself, the rest is numbered from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {b: chr(b) for b in printable}
    for n, b in enumerate(b for b in range(256) if b not in letters):
        letters[b] = chr(256 + n)
    return letters

"""A byte-level BPE tokenizer in plain Python, to be read.

Text is cut by a regular expression into words (a word keeps its leading space), each word becomes its UTF-8 bytes, and
training merges the most frequent pair of neighbouring tokens, over and over. Encoding replays the merges in the order
they were learned. Any text can be encoded, and decoding gives it back (a lone surrogate, which is not text, becomes "?").

Sources: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; the byte-level form is GPT-2's (Radford et al. 2019).
"""

import hashlib
import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import regex

from llm_common.errors import UserError

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3 and cl100k: at most three digits together, contractions in capitals too, newlines apart
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}
END_OF_TEXT = "<|endoftext|>"
FORMAT = 1
FILE_NAME = "bpe.json"

Pair = tuple[int, int]


class Tokenizer:
    """Byte-level BPE. Ids: 0 to 255 the bytes, then the merges in order, then the special tokens.

    `vocab` (id -> bytes) may be given to use a foreign numbering, such as GPT-2's own files.
    """

    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        pattern: str = "gpt2",
        vocab: dict[int, bytes] | None = None,
    ) -> None:
        if pattern not in PATTERNS:
            raise UserError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
        self.merges, self.pattern = list(merges), pattern
        if vocab is None:
            vocab = dict(enumerate([bytes([b]) for b in range(256)] + [a + b for a, b in self.merges]))
        self.vocab = dict(vocab)
        self._id = {token: i for i, token in self.vocab.items()}
        self.special_tokens: dict[str, int] = {}
        for text in special_tokens:
            if not text:
                raise UserError("a special token must have at least one character")
            if text.encode() not in self._id:
                i = max(self.vocab) + 1
                self.vocab[i], self._id[text.encode()] = text.encode(), i
            self.special_tokens[text] = self._id[text.encode()]
        missing = [b for b in range(256) if bytes([b]) not in self._id]
        if missing:
            raise UserError(f"vocabulary lacks the single byte {missing[0]:#04x}: some text could not be encoded")
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._words = regex.compile(PATTERNS[pattern])
        # longest first, so that of two special tokens with a common start the longer one is found
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._specials = (
            regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")") if longest_first else None
        )
        self._cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: what an embedding table needs."""
        return max(self.vocab) + 1

    @property
    def end_of_text(self) -> int | None:
        """The id of <|endoftext|>, which separates documents, or None."""
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return () if self.end_of_text is None else (self.end_of_text,)

    # --- encode and decode

    def _pieces(self, text: str) -> Iterator[str]:
        """The special tokens and words of a text, in order; joined they are the text."""
        for part in self._specials.split(text) if self._specials else [text]:
            if part in self.special_tokens:
                yield part
            else:
                yield from self._words.findall(part)

    def _encode_piece(self, piece: str, remember: bool = True) -> list[int]:
        return [self.special_tokens[piece]] if piece in self.special_tokens else self._encode_word(piece, remember)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written out in it become their ids."""
        return [i for piece in self._pieces(text) for i in self._encode_piece(piece)]

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of the concatenation of `texts`, lazily; equal to `encode("".join(texts))`.

        Memory does not grow with the text: words are not remembered, which makes it five times slower than `encode`.
        The end of a chunk may cut a special token or a word in two, so what more text could change is held back: where
        a special token may have begun, and the two words before that (more text can join "'", "ll" to "'ll").
        """
        reserve = max((len(s) for s in self.special_tokens), default=1) - 1
        held = ""
        for text in texts:
            held += text
            limit = len(held) - reserve  # a special token that starts before it would be complete
            pieces, position, words, settled = [], 0, 0, 0
            for piece in self._pieces(held):
                is_special = piece in self.special_tokens
                if position >= limit or (not is_special and position + len(piece) > limit):
                    break
                pieces.append(piece)
                position += len(piece)
                words = 0 if is_special else words + 1
                settled = max(settled, len(pieces) - min(words, 2))
            for piece in pieces[:settled]:
                yield from self._encode_piece(piece, remember=False)
            held = held[sum(map(len, pieces[:settled])) :]
        for piece in self._pieces(held):
            yield from self._encode_piece(piece, remember=False)

    def _encode_word(self, word: str, remember: bool = True) -> list[int]:
        if word in self._cache:
            return self._cache[word]
        parts = [bytes([b]) for b in word.encode("utf-8", errors="replace")]
        # Linked list of parts and a heap of the known pairs: n log n, also for a very long "word" of spaces.
        following = list(range(1, len(parts) + 1))
        previous = list(range(-1, len(parts) - 1))
        alive = [True] * len(parts)
        heap: list[tuple[int, int, bytes, bytes]] = []

        def push(i: int) -> None:
            j = following[i]
            if j < len(parts) and (rank := self._rank.get((parts[i], parts[j]))) is not None:
                heapq.heappush(heap, (rank, i, parts[i], parts[j]))

        for i in range(len(parts) - 1):
            push(i)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = following[i] if alive[i] else len(parts)
            if j >= len(parts) or parts[i] != left or parts[j] != right:
                continue  # one of the two was merged with another neighbour meanwhile
            parts[i] += parts[j]
            alive[j] = False
            following[i] = following[j]
            if following[i] < len(parts):
                previous[following[i]] = i
            push(i)
            if previous[i] >= 0:
                push(previous[i])
        ids = [self._id[part] for part, is_alive in zip(parts, alive, strict=True) if is_alive]
        if remember and len(word) <= 64:  # long "words" are rare and would only fill the memory
            if len(self._cache) > 500_000:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some ids; a prefix of a text may end in the middle of a character."""
        try:
            return b"".join(self.vocab[int(i)] for i in ids)
        except KeyError as error:
            raise UserError(f"token id {error.args[0]} is not in the vocabulary of {len(self.vocab)} tokens") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8, and ids without a token, become U+FFFD."""
        replacement = "\ufffd".encode()
        return b"".join(self.vocab.get(int(i), replacement) for i in ids).decode("utf-8", errors="replace")

    def encode_prompt(self, text: str) -> list[int]:
        """The ids from which a model continues a text; this tokenizer puts nothing before it."""
        return self.encode(text)

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 (vocab_size,); 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for i, token in self.vocab.items():
            lengths[i] = len(token)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    # --- files

    def to_json(self) -> str:
        """The contents of the file that `save` writes."""
        content = {
            "format": FORMAT,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "merges": [f"{a.hex()} {b.hex()}" for a, b in self.merges],
            "vocab": {i: token.hex() for i, token in self.vocab.items()},
        }
        return json.dumps(content, indent=0)

    def fingerprint(self) -> str:
        """sha256 of what `save` writes: by it token files and checkpoints recognise their tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write one JSON file; bytes are written as hexadecimal digits."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a file written by `save`. Raises UserError if it is missing, damaged or of a newer format."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer; make one with scripts/train_tokenizer.py")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise UserError(f"{path}: tokenizer format {content['format']!r}, but this version reads {FORMAT}")
            merges = [(bytes.fromhex(a), bytes.fromhex(b)) for a, b in (line.split(" ") for line in content["merges"])]
            vocab = {int(i): bytes.fromhex(token) for i, token in content["vocab"].items()}
            return cls(merges, content["special_tokens"], content["pattern"], vocab)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not a tokenizer file ({type(error).__name__}: {error})") from error


class HasVocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...


def check_vocabulary(tokenizer: HasVocabulary, vocab_size: int) -> None:
    """Raise UserError if a model with `vocab_size` embeddings has none for some of the tokenizer's ids."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"ModelConfig.vocab_size = {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}: "
            "use a larger model vocabulary or train a smaller tokenizer"
        )


# --- training


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = (END_OF_TEXT,), pattern: str = "gpt2"
) -> Tokenizer:
    """Learn merges from `texts` until the vocabulary, special tokens included, has `vocab_size` entries.

    Of pairs with the same count the one with the lexicographically greater bytes is merged first. Training stops early
    when no pair is left. Special tokens separate texts and are never merged.
    """
    texts = [texts] if isinstance(texts, str) else texts
    special_tokens = list(dict.fromkeys(special_tokens))
    if vocab_size < 256 + len(special_tokens):
        raise UserError(f"vocab_size = {vocab_size} is too small: 256 bytes + {len(special_tokens)} special tokens")
    splitter = Tokenizer([], special_tokens, pattern)  # it only lends its way of cutting a text
    word_counts: Counter[str] = Counter()
    for text in texts:
        word_counts.update(piece for piece in splitter._pieces(text) if piece not in splitter.special_tokens)
    if not word_counts:
        raise UserError("no text to train a tokenizer on")

    vocab = [bytes([b]) for b in range(256)]
    words = [list(word.encode("utf-8", errors="replace")) for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for w, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += count
            words_with[pair].add(w)

    # A max-heap of (count, bytes of the pair). Entries go stale when counts change: they are checked when popped.
    def entry(pair: Pair):
        return _Greatest(pair_counts[pair], vocab[pair[0]], vocab[pair[1]], pair)

    heap = [entry(pair) for pair in pair_counts]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while len(vocab) < vocab_size - len(special_tokens) and heap:
        best = heapq.heappop(heap)
        if pair_counts[best.pair] != best.count or best.count == 0:
            continue
        left, right = best.pair
        merges.append((vocab[left], vocab[right]))
        new = len(vocab)
        vocab.append(vocab[left] + vocab[right])
        changed: set[Pair] = set()
        for w in words_with.pop(best.pair):
            old_word = words[w]
            words[w] = word = _merge(old_word, best.pair, new)
            for pair in itertools.pairwise(old_word):
                pair_counts[pair] -= counts[w]
                changed.add(pair)
            for pair in itertools.pairwise(word):
                pair_counts[pair] += counts[w]
                words_with[pair].add(w)
                changed.add(pair)
        del pair_counts[best.pair]
        for pair in changed - {best.pair}:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, entry(pair))
    return Tokenizer(merges, special_tokens, pattern)


class _Greatest:
    """A heap entry that sorts the greatest (count, left bytes, right bytes) first."""

    __slots__ = ("count", "pair", "rank")

    def __init__(self, count: int, left: bytes, right: bytes, pair: Pair) -> None:
        self.count, self.pair, self.rank = count, pair, (count, left, right)

    def __lt__(self, other: "_Greatest") -> bool:
        return self.rank > other.rank


def _merge(word: list[int], pair: Pair, new: int) -> list[int]:
    merged: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged

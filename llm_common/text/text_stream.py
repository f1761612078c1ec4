"""Text out of a stream of token ids: only whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Protocol

CONTEXT = 8  # ids of the prompt, at least, that the first new ones are decoded with
REPLACEMENT = "\ufffd"  # what an incomplete character decodes to


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], /) -> str: ...


class TextStream:
    """Takes the ids of one text as they are drawn and gives its text as soon as it is certain.

    prompt: the ids that the text continues; some tokenizers write a word's space only if something stands before it.
    Held back are the bytes of an unfinished character and what may be the beginning of a stop string. The first stop
    string to be complete ends the text and is not part of it. `text` is what was given out so far; `stopped` says
    whether a stop string came.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = _context(tokenizer, list(prompt))
        # decoding begins at _start; the text up to _settled is in _pending, given out, or the prompt's
        self._start, self._settled = 0, len(self._ids)
        self._pending = ""
        self.text, self.stopped = "", False

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that these ids complete; `last` gives out what was held back."""
        if self.stopped:
            return ""
        for i in ids:
            self._ids.append(i)
            # decoded with a few tokens before, since a token's text may depend on its neighbour; never all of the text
            before = self._tokenizer.decode(self._ids[self._start : self._settled])
            now = self._tokenizer.decode(self._ids[self._start :])
            if len(now) > len(before) and not now.endswith(REPLACEMENT):
                self._pending += now[len(before) :]
                self._start, self._settled = self._settled, len(self._ids)
        if last:
            before = self._tokenizer.decode(self._ids[self._start : self._settled])
            self._pending += self._tokenizer.decode(self._ids[self._start :])[len(before) :]
            self._start = self._settled = len(self._ids)
        # the stop string that is complete first, however many characters came at once; of two, the longer
        found = [(at + len(stop), at) for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            out, self._pending, self.stopped = self._pending[: min(found)[1]], "", True
        else:
            held = 0 if last else self._held()
            out, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        self.text += out
        return out

    def _held(self) -> int:
        """The length of the longest end of the pending text that a stop string begins with."""
        for n in range(min(len(self._pending), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(self._pending[-n:]) for stop in self._stop):
                return n
        return 0


def _context(tokenizer: Decoder, prompt: list[int]) -> list[int]:
    """The end of a prompt that may be decoded by itself: one that begins inside a character may not be. Tokenizers that
    fall back to bytes take all bytes in a row for broken if the first of them is.
    """
    size = CONTEXT
    while size < len(prompt) and REPLACEMENT in tokenizer.decode(prompt[-size:]):
        size *= 2
    return prompt[-size:]

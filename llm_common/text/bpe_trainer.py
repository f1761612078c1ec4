"""Learning the merges of byte-level BPE, fast and in bounded memory. What it computes: `bpe_reference.train`.

Words are counted first; from there on time and memory depend on how many distinct words there are, not on the corpus.
The distinct words lie one after the other in one flat array of ids, a gap before and after each. A token of several
bytes keeps its id in the first and in the last of its bytes' places, so that both neighbours of a token are found
without links.

We index only pairs with count >= floor: where they are, how often they occur, and a heap for the most frequent. Counts
only fall until the floor is lowered, so a heap entry can be too high but never too low; it is corrected when popped.
When no pair is left, the floor is lowered and the array is read again.
"""

import heapq
import itertools
import multiprocessing
import queue
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from llm_common.errors import UserError
from llm_common.processes import end_with_parent
from llm_common.text.tokenizer import END_OF_TEXT, Tokenizer
from llm_common.text.tokenizer_json import is_letter_of_a_byte
from llm_common.text.words import PATTERNS, Words, clean, special_finder, stream_blocks

TIE_RULES = ("greater-bytes", "smaller-ids")
COUNTED_IDS = 1 << 16  # ids up to which NumPy sorts by counting
NUMPY_FROM_POSITIONS = 200  # positions from which NumPy is faster than a loop
FLOOR_DIVISOR = 8  # by which the floor falls
GAP = -1

Merge = tuple[bytes, bytes]
Groups = list[tuple[int, int, Any]]  # a neighbour's id, the sum of the weights, the positions


def count_words(
    blocks: Iterable[str], special_tokens: Iterable[str], pattern: str, processes: int = 1
) -> dict[bytes, int]:
    """How often each word, as UTF-8, occurs in texts that may be cut at their ends (`words.stream_blocks`).

    Special tokens are no words. processes: how many count; the result is the same for any number.
    """
    if processes <= 1:
        return _as_bytes(_count(blocks, tuple(special_tokens), pattern))
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(2 * processes), context.Queue()
    arguments = (todo, done, tuple(special_tokens), pattern)
    workers = [context.Process(target=_count_in_worker, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        for block in itertools.chain(blocks, [None] * processes):
            _while_alive(workers, lambda block=block: todo.put(block, timeout=1), queue.Full)
        total: Counter[bytes] = Counter()
        for _ in workers:
            total.update(_while_alive(workers, lambda: done.get(timeout=1), queue.Empty))
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    return total


def _while_alive(workers: list[Any], attempt: Callable[[], Any], not_yet: type[Exception]) -> Any:
    """What an attempt gives, tried again until it does not raise `not_yet`. Raises UserError if a worker has failed."""
    while True:
        try:
            return attempt()
        except not_yet:
            for worker in workers:
                if worker.exitcode not in (None, 0):
                    raise UserError(
                        f"process {worker.name} ended with code {worker.exitcode}, perhaps for lack of memory; "
                        "count with fewer processes"
                    ) from None


def _count(blocks: Iterable[str], special_tokens: tuple[str, ...], pattern: str) -> Counter[str]:
    words, finder, counts = Words(PATTERNS[pattern]), special_finder(special_tokens), Counter()
    for block in blocks:
        block = clean(block)
        if any(token in block for token in special_tokens) and finder is not None:
            for i, part in enumerate(finder.split(block)):
                if i % 2 == 0:  # between two special tokens
                    counts.update(words(part))
        else:
            counts.update(words(block))
    return counts


def _as_bytes(counts: Counter[str]) -> dict[bytes, int]:
    return {word.encode("utf-8"): n for word, n in counts.items()}


def _count_in_worker(todo: Any, done: Any, special_tokens: tuple[str, ...], pattern: str) -> None:
    end_with_parent()
    done.put(_as_bytes(_count(iter(todo.get, None), special_tokens, pattern)))


class _Pairs:
    """The words, and the pairs of neighbouring tokens that occur at least `floor` times."""

    def __init__(self, words: dict[bytes, int], tie_rule: str, many: int) -> None:
        self.many = many
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        starts = np.cumsum(lengths + 1) - lengths  # a gap before each word, and one after the last
        n = int(lengths.sum()) + len(words) + 1
        place = np.ones(n, bool)
        place[starts - 1] = place[n - 1] = False
        flat = np.full(n, GAP, np.int32)
        flat[place] = np.frombuffer(b"".join(words), np.uint8)
        weights = np.fromiter(words.values(), np.int64, len(words))
        # arrays that a loop reads fast, and NumPy's view of the same memory
        self.ids = array("i", flat.tobytes())
        self.weights = array("q", np.append(np.repeat(weights, lengths + 1), 0).tobytes())
        self.alive = bytearray(n)  # whether a token begins here
        self._ids, self._weights = np.frombuffer(self.ids, np.int32), np.frombuffer(self.weights, np.int64)
        self._alive = np.frombuffer(self.alive, np.uint8)
        self._alive[:] = 1
        self.tokens = [bytes([b]) for b in range(256)]
        self.sizes = [1] * 256
        # sorts the greater bytes first: every byte is turned round, and a character greater than all ends it
        self._order = None if tie_rule == "smaller-ids" else [_reversed(token) for token in self.tokens]
        self.floor = 0
        self.counts: dict[int, int] = {}
        self.where: dict[int, Any] = {}
        self._heap: list[Any] = []

    def push(self, key: int) -> None:
        order = self._order
        tie = key if order is None else order[key >> 32] + order[key & 0xFFFFFFFF]
        heapq.heappush(self._heap, (-self.counts[key], tie, key))

    def most_frequent(self) -> int | None:
        """The next pair to merge, as left id << 32 | right id; None if there is none."""
        while True:
            while self._heap:
                count, tie, key = self._heap[0]
                now = self.counts.get(key, 0)
                if now == -count:
                    heapq.heappop(self._heap)
                    return key
                if now >= self.floor:
                    heapq.heapreplace(self._heap, (-now, tie, key))
                    continue
                heapq.heappop(self._heap)
                self.counts.pop(key, None)
                self.where.pop(key, None)
            if self.floor == 1:
                return None
            self.look_through()

    def look_through(self) -> None:
        """Write down all pairs that occur often enough, under a lower floor."""
        at = np.flatnonzero(self._alive)
        ids = self._ids[at]
        keep = (ids[:-1] >= 0) & (ids[1:] >= 0)
        at, left, right = at[:-1][keep], ids[:-1][keep], ids[1:][keep]
        if len(self.tokens) <= COUNTED_IDS:
            order = np.argsort(right.astype(np.uint16), kind="stable")
            order = order[np.argsort(left[order].astype(np.uint16), kind="stable")]
        else:
            order = np.lexsort((right, left))
        keys = (left[order].astype(np.int64) << 32) | right[order]
        at = at[order].astype(np.int32)
        borders = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
        sums = np.add.reduceat(self._weights[at], borders) if len(keys) else np.zeros(0, np.int64)
        top = int(sums.max(initial=0))
        self.floor = max(1, min(top, self.floor or top) // FLOOR_DIVISOR)
        ends = np.r_[borders[1:], len(keys)]
        for i in np.flatnonzero(sums >= self.floor).tolist():
            key = int(keys[borders[i]])
            self.counts[key] = int(sums[i])
            positions = at[borders[i] : ends[i]]
            self.where[key] = positions.copy() if len(positions) > self.many else positions.tolist()
            self.push(key)

    def merge(self, key: int) -> Merge:
        """Join a pair wherever it is, from left to right in every word; returns its two tokens."""
        a, b, new = key >> 32, key & 0xFFFFFFFF, len(self.tokens)
        self.tokens.append(self.tokens[a] + self.tokens[b])
        self.sizes.append(self.sizes[a] + self.sizes[b])
        if self._order is not None:
            self._order.append(_reversed(self.tokens[new]))
        del self.counts[key]
        positions = self.where.pop(key)
        left, right = (self._merge_many if len(positions) > self.many else self._merge_few)(a, b, new, positions)
        counts, floor, fresh = self.counts, self.floor, {}
        # In an occurrence with `p` before it and `n` after it, (p, a) and (b, n) become (p, new) and (new, n).
        for n, weight, where in right:
            old = b << 32 | n
            if old in counts:
                counts[old] -= weight
            fresh[new << 32 | n] = [weight, where]
        for p, weight, where in left:
            if p == new:  # the occurrence before it was merged just now: (new, a) was only there for a moment
                fresh[new << 32 | a][0] -= weight
            elif (old := p << 32 | a) in counts:
                counts[old] -= weight
            fresh[p << 32 | new] = [weight, where]
        for pair, (weight, where) in fresh.items():
            if weight >= floor:
                counts[pair], self.where[pair] = weight, where
                self.push(pair)
        return self.tokens[a], self.tokens[b]

    def _merge_few(self, a: int, b: int, new: int, positions: Any) -> tuple[Groups, Groups]:
        ids, sizes, alive, weights = self.ids, self.sizes, self.alive, self.weights
        size_a, size_b = sizes[a], sizes[b]
        left, right = {}, {}
        for i in positions if isinstance(positions, list) else positions.tolist():
            j = i + size_a
            if ids[i] != a or ids[j] != b or not alive[i]:
                continue  # one of the two was merged with another neighbour meanwhile
            end = j + size_b
            p, n = ids[i - 1], ids[end]
            alive[j] = 0
            ids[i] = ids[end - 1] = new
            if p != GAP:
                if p in left:
                    left[p].append(i - sizes[p])
                else:
                    left[p] = [i - sizes[p]]
            if n != GAP:
                if n in right:
                    right[n].append(i)
                else:
                    right[n] = [i]
        weight_of = weights.__getitem__
        weigh = lambda groups: [(x, sum(map(weight_of, where)), where) for x, where in groups.items()]
        return weigh(left), weigh(right)

    def _merge_many(self, a: int, b: int, new: int, positions: Any) -> tuple[Groups, Groups]:
        size_a, size_b = self.sizes[a], self.sizes[b]
        at = np.asarray(positions, np.int32)
        at = at[(self._ids[at] == a) & (self._ids[at + size_a] == b) & (self._alive[at] == 1)]
        if a == b and len(at):  # of a row of equal tokens every second pair
            first = np.r_[True, np.diff(at) != size_a]
            in_row = np.arange(len(at)) - np.flatnonzero(first)[np.cumsum(first) - 1]
            at = at[in_row % 2 == 0]
        end = at + (size_a + size_b)
        n = self._ids[end]  # before the next occurrence is merged, which then sees this one merged
        self._alive[at + size_a] = 0
        self._ids[at] = self._ids[end - 1] = new
        p = self._ids[at - 1]
        sizes = np.fromiter(map(self.sizes.__getitem__, p.tolist()), np.int32, len(p))  # of a gap: not used
        return self._group(p, at - sizes), self._group(n, at)

    def _group(self, neighbours: np.ndarray, at: np.ndarray) -> Groups:
        keep = neighbours != GAP
        neighbours, at = neighbours[keep], at[keep]
        if not len(at):
            return []
        order = np.argsort(neighbours, kind="stable")
        neighbours, at = neighbours[order], at[order]
        borders = np.flatnonzero(np.r_[True, neighbours[1:] != neighbours[:-1]])
        sums = np.add.reduceat(self._weights[at], borders).tolist()
        ends = [*borders[1:].tolist(), len(at)]
        cut = lambda i, j: at[i:j].copy() if j - i > self.many else at[i:j].tolist()
        rows = zip(neighbours[borders].tolist(), sums, borders.tolist(), ends, strict=True)
        return [(x, weight, cut(i, j)) for x, weight, i, j in rows]


def _reversed(token: bytes) -> str:
    """A text that sorts the opposite way to a token."""
    return "".join(chr(255 - b) for b in token) + chr(256)


def learn_merges(
    words: dict[bytes, int],
    n_merges: int,
    tie_rule: str = TIE_RULES[0],
    on_merge: Callable[[int], None] | None = None,
    many: int = NUMPY_FROM_POSITIONS,
) -> list[Merge]:
    """Up to n_merges merges, in order; fewer if no pair is left. words: how often each occurs.

    Of equally frequent pairs the one with the lexicographically greater bytes ("greater-bytes", the left token first)
    or with the smaller ids ("smaller-ids") is merged first. on_merge(how many) is called after each. many: of how many
    positions on NumPy merges, not a loop.
    """
    if tie_rule not in TIE_RULES:
        raise UserError(f"tie rule {tie_rule!r}; known: {', '.join(TIE_RULES)}")
    pairs, merges = _Pairs(words, tie_rule, many), []
    while len(merges) < n_merges and (key := pairs.most_frequent()) is not None:
        merges.append(pairs.merge(key))
        if on_merge is not None:
            on_merge(len(merges))
    return merges


def train_bpe(
    texts: Iterable[str | Iterable[str]],
    vocab_size: int,
    special_tokens: Iterable[str] = (END_OF_TEXT,),
    pattern: str = "gpt2",
    tie_rule: str = TIE_RULES[0],
    processes: int = 1,
    on_merge: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Learn merges from documents, whole or in pieces, until the vocabulary, special tokens included, has `vocab_size`
    entries.

    Training stops early when no pair is left. Special tokens separate words and are never merged. processes: how many
    count the words. Of equal pairs: see `learn_merges`. Raises UserError for a vocabulary too small and for no text.
    """
    special_tokens = check_special_tokens(special_tokens, vocab_size)
    if pattern not in PATTERNS:
        raise UserError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
    texts = [texts] if isinstance(texts, str) else texts
    stretches = (x for text in texts for x in stream_blocks([text] if isinstance(text, str) else text, special_tokens))
    words = count_words(stretches, special_tokens, pattern, processes)
    if not words:
        raise UserError("no text to train a tokenizer on")
    merges = learn_merges(words, vocab_size - 256 - len(special_tokens), tie_rule, on_merge)
    return Tokenizer(merges, special_tokens, pattern)


def check_special_tokens(special_tokens: Iterable[str], vocab_size: int) -> list[str]:
    """The special tokens. Raises UserError if one is there twice, is empty, or if the vocabulary has no room
    for them.
    """
    special_tokens = list(special_tokens)
    for token in special_tokens:
        if not token:
            raise UserError("a special token must have at least one character")
        if len(token.encode("utf-8", "surrogatepass")) == 1:
            raise UserError(f"special token {token!r}: a single byte is a token already; take a longer text")
        if len(token) == 1 and is_letter_of_a_byte(token):
            raise UserError(
                f"special token {token!r}: Hugging Face's files write a byte in this way; take a longer text"
            )
        if clean(token) != token:
            raise UserError(f"special token {token!r}: half of a surrogate pair is no text")
        if special_tokens.count(token) > 1:
            raise UserError(f"special token {token!r} is there twice; name it once")
    if vocab_size < 256 + len(special_tokens):
        raise UserError(
            f"vocab_size = {vocab_size} is too small: 256 bytes + {len(special_tokens)} special tokens "
            f"need at least {256 + len(special_tokens)}"
        )
    return special_tokens

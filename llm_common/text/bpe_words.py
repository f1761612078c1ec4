"""From a word to its ids: the merges of byte-level BPE, replayed in the order in which they were learned."""

import functools
import heapq
import importlib.util
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from llm_common.errors import UserError
from llm_common.text.words import PATTERNS, Words, without_possessive, write_out

NOT_MERGED = 1 << 60  # the rank of a pair that is not merged
LONG = 256  # bytes of a word from which looking for the smallest rank in all of it takes too long
REMEMBERED = 1 << 17  # words, of at most 64 characters
REMOVED = -1


class WordEncoder:
    """What `Tokenizer` is of one word. A subclass sets the fields and calls `_prepare_words`."""

    merges: list[tuple[bytes, bytes]]
    pattern: str
    ignore_merges: bool
    vocab: dict[int, bytes]
    _id: dict[bytes, int]  # of every token
    _plain: dict[bytes, int]  # of those that merges make
    _byte_ids: list[int]
    _lacks_bytes: bool

    def _prepare_words(self) -> None:
        self._rank: dict[tuple[int, int], int] = {}
        self._merged: list[int] = []  # by rank
        for rank, (a, b) in enumerate(self.merges):
            if a not in self._id or b not in self._id or a + b not in self._id:
                raise UserError(f"merge {rank} of {a!r} and {b!r}: not all of it is in the vocabulary")
            self._rank[self._id[a], self._id[b]] = rank
            self._merged.append(self._id[a + b])
        self._words = Words(PATTERNS[self.pattern])
        self._known_words = _KnownWords(self._encode_word)

    def _encode_plain(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._known_words.__getitem__, self._words(text))))

    def _encode_word(self, word: str) -> list[int]:
        token = word.encode("utf-8")
        if self.ignore_merges and token in self._plain:
            return [self._plain[token]]
        ids = list(map(self._byte_ids.__getitem__, token))
        if self._lacks_bytes:
            ids = [i for i in ids if i != REMOVED]
        return self._merge_short(ids) if len(ids) < LONG else self._merge_long(ids)

    def _merge_short(self, ids: list[int]) -> list[int]:
        """Replay the merges: the pair of the smallest rank, the leftmost of several, until there is none."""
        rank_of, merged = self._rank.get, self._merged
        ranks = list(map(rank_of, itertools.pairwise(ids), itertools.repeat(NOT_MERGED)))
        while ranks and (rank := min(ranks)) != NOT_MERGED:
            i = ranks.index(rank)
            ids[i] = joined = merged[rank]
            del ids[i + 1], ranks[i]
            if i < len(ranks):
                ranks[i] = rank_of((joined, ids[i + 1]), NOT_MERGED)
            if i:
                ranks[i - 1] = rank_of((ids[i - 1], joined), NOT_MERGED)
        return ids

    def _merge_long(self, ids: list[int]) -> list[int]:
        """The same in a time that grows with the length alone: a linked list, and for every rank the places where it
        is.
        """
        rank_of, merged, n = self._rank.get, self._merged, len(ids)
        following, previous = list(range(1, n + 1)), list(range(-1, n - 1))
        ranks = [*map(rank_of, itertools.pairwise(ids), itertools.repeat(NOT_MERGED)), NOT_MERGED]
        places: defaultdict[int, list[int]] = defaultdict(list)
        for i, rank in enumerate(ranks):
            places[rank].append(i)
        places.pop(NOT_MERGED)
        waiting = sorted(places)  # a heap
        while waiting:
            rank = heapq.heappop(waiting)
            todo, joined, smallest = sorted(places.pop(rank)), merged[rank], NOT_MERGED
            for at, i in enumerate(todo):
                if ranks[i] != rank:
                    continue  # one of the two was merged with another neighbour meanwhile
                j = following[i]
                k, p = following[j], previous[i]
                ids[i], ids[j], following[i], ranks[j] = joined, REMOVED, k, NOT_MERGED
                ranks[i] = new = rank_of((joined, ids[k]), NOT_MERGED) if k < n else NOT_MERGED
                if k < n:
                    previous[k] = i
                if new != NOT_MERGED:
                    if new not in places:
                        heapq.heappush(waiting, new)
                    places[new].append(i)
                    smallest = min(smallest, new)
                if p >= 0:
                    ranks[p] = new = rank_of((ids[p], joined), NOT_MERGED)
                    if new != NOT_MERGED:
                        if new not in places:
                            heapq.heappush(waiting, new)
                        places[new].append(p)
                        smallest = min(smallest, new)
                if smallest < rank:  # it goes first; merges that were learned never have it, foreign ones may
                    if rank not in places:
                        heapq.heappush(waiting, rank)
                    places[rank] += todo[at + 1 :]
                    break
        return [i for i in ids if i != REMOVED]

    @functools.cached_property
    def _tiktoken(self) -> Any:
        """tiktoken's encoder with our merges and pattern, or None: not installed, or it would not give the same ids."""
        ids = [self._id[a + b] for a, b in self.merges]
        if not self.merges or self.ignore_merges or self._lacks_bytes or importlib.util.find_spec("tiktoken") is None:
            return None
        # tiktoken knows no merges, only tokens: it joins two whenever they make a token, the one with the smallest id
        # first. That is the same if ids rise with the merges and every token's bytes, merged by themselves, make that
        # token: then wherever they stand side by side uncut, the merges inside go the same way.
        if any(a >= b for a, b in itertools.pairwise(ids)):
            return None
        if any(self._merge_short([self._byte_ids[b] for b in self.vocab[i]]) != [i] for i in ids):
            return None
        import tiktoken

        tokens = {bytes([b]): i for b, i in enumerate(self._byte_ids)} | {self.vocab[i]: i for i in ids}
        pattern = write_out(without_possessive(PATTERNS[self.pattern]))
        return tiktoken.Encoding(self.pattern, pat_str=pattern, mergeable_ranks=tokens, special_tokens={})


class _KnownWords(dict[str, tuple[int, ...]]):
    """Word -> ids, found out when it is asked for the first time."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._encode(word))
        if len(word) <= 64:  # longer ones are rare and would only fill the memory
            if len(self) >= REMEMBERED:
                self.clear()
            self[word] = ids
        return ids

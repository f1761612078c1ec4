"""Byte-level BPE by its definition, slow and short: the text to read, and what the fast one is tested against.

Text is cut by a pattern into words, each word becomes its UTF-8 bytes. Training merges the most frequent pair of
neighbouring tokens over and over; of equally frequent ones the greater in bytes, or the one with the smaller ids.
Encoding replays the merges in the order in which they were learned. It imports none of the packages and shares no line
with them.
"""

import itertools
from collections import Counter

import regex

WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's


def words_of(text, special, pattern=WORDS):
    """The words and special tokens of a text, in order."""
    pieces = []
    for part in regex.split("(" + regex.escape(special) + ")", text):
        pieces += [part] if part == special else regex.findall(pattern, part)
    return pieces


def train(texts, n_merges, special, pattern=WORDS, smaller_ids=False):
    """The first n_merges merges, as pairs of bytes."""
    words = Counter(word for text in texts for word in words_of(text, special, pattern) if word != special)
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    number = {bytes([b]): b for b in range(256)}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, tokens in split.items():
            for pair in itertools.pairwise(tokens):
                pairs[pair] += words[word]
        if not pairs:
            break
        if smaller_ids:
            best = min(pairs, key=lambda pair: (-pairs[pair], number[pair[0]], number[pair[1]]))
        else:
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        number[best[0] + best[1]] = 255 + len(merges)
        split = {word: merge(tokens, best) for word, tokens in split.items()}
    return merges


def merge(tokens, pair):
    """The tokens with every occurrence of a pair joined, from left to right."""
    out, i = [], 0
    while i < len(tokens):
        joined = tuple(tokens[i : i + 2]) == pair
        out.append(tokens[i] + tokens[i + 1] if joined else tokens[i])
        i += 2 if joined else 1
    return out


def encode(text, merges, special, pattern=WORDS):
    """Ids: the 256 bytes, then the merges in order, then the special token."""
    ids = []
    for word in words_of(text, special, pattern):
        if word == special:
            ids.append(256 + len(merges))
            continue
        tokens = [bytes([b]) for b in word.encode()]
        for pair in merges:
            tokens = merge(tokens, pair)
        number = {a + b: 256 + i for i, (a, b) in reversed(list(enumerate(merges)))}
        ids += [number[token] if len(token) > 1 else token[0] for token in tokens]
    return ids

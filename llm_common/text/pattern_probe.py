"""Whether a stranger's tokenizer cuts text in reasonable time: a program for `hf_tokenizer`, which gives it two
seconds.

Read from stdin is a tokenizer.json without its vocabulary. The exit code is 0 if texts made to provoke backtracking, of
the pattern's own characters among others, are cut; the library gives up, by a panic, only after ten million steps for
each place.
"""

import contextlib
import json
import resource
import sys

import tokenizers

MEMORY = 768 << 20


def main() -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    source = sys.stdin.read()
    tokenizer = tokenizers.Tokenizer.from_str(source)
    steps = json.dumps([json.loads(source).get(key) for key in ("normalizer", "pre_tokenizer")], ensure_ascii=False)
    own = sorted({c for c in steps if c.isalnum()})[:40]
    runs = ["a", "A", "1", " ", "\n", "'", ".", "é", "日", "aA", "a1", "a ", " \n", *own]
    for run in runs:
        for end in ("", "!", "\0", "b"):
            tokenizer.encode(run * (40 // len(run)) + end, add_special_tokens=False)


if __name__ == "__main__":
    main()

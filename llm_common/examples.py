"""Examples for fine-tuning: a prompt and an answer each, of which only the answer is learned.

The file is an `.npz` of plain arrays: all ids one after the other, where each example starts, and where its answer starts.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.data import Order, TokenDataset, host_rows, write_description
from llm_common.errors import UserError
from llm_common.hf_tokenizer import AnyTokenizer, HfTokenizer
from llm_common.shards import id_dtype
from llm_common.tensors import check_token_ids

Example = tuple[list[int], list[int]]  # the ids of the prompt and of the answer
IGNORED = -100


def read_examples(
    path: Path, prompt_field: str, answer_field: str, tokenizer: AnyTokenizer, chat: bool = False
) -> Iterator[Example]:
    """The examples of a JSONL file, by the names of two of its fields; with `chat`, in the tokenizer's chat template.

    Without a template the answer follows the prompt as it is, and the end-of-text token follows the answer. Raises UserError
    with the line's number for a line that is not an object with these two texts.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if chat and not isinstance(tokenizer, HfTokenizer):
        raise UserError("--chat needs the tokenizer of a Hugging Face folder with a chat template")
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(_lines(path, file), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path}, line {number}: not JSON") from None
            prompt, answer = (_text(row, field, f"{path}, line {number}") for field in (prompt_field, answer_field))
            if chat and isinstance(tokenizer, HfTokenizer):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                start = tokenizer.chat(messages[:1], add_generation_prompt=True)
                whole = tokenizer.chat(messages, add_generation_prompt=False)
                if not whole.startswith(start):
                    raise UserError("the chat template writes a conversation that does not begin with its own prompt")
                yield tokenizer.encode(start), tokenizer.encode(whole[len(start) :])
            else:
                yield tokenizer.encode_prompt(prompt), tokenizer.encode(answer) + end


def _text(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        known = f"it has {', '.join(map(repr, row))}" if isinstance(row, dict) else "it is not an object"
        raise UserError(f"{where}: no text in the field {field!r}; {known}")
    return text


def _lines(path: Path, file: Iterable[str]) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def write_examples(
    path: Path, examples: Iterable[Example], tokenizer: AnyTokenizer, max_length: int | None = None
) -> dict[str, Any]:
    """Write examples to an `.npz` file with a `.json` beside it, and return what the `.json` holds.

    Examples of more than max_length ids are left out and counted; so are those without an answer.
    """
    if path.suffix != ".npz":
        raise UserError(f"{path}: a file of examples must end in .npz")
    ids: list[int] = []
    starts, answers, left_out = [0], [], 0
    for prompt, answer in examples:
        if not answer or not prompt or (max_length is not None and len(prompt) + len(answer) > max_length):
            left_out += 1
            continue
        ids += prompt + answer
        answers.append(len(ids) - len(answer))
        starts.append(len(ids))
    if not answers:
        raise UserError(f"no examples to write ({left_out} left out: too long, or without prompt or answer)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, tokens=np.array(ids, id_dtype(tokenizer)), starts=np.array(starts), answers=np.array(answers))
    lengths = np.diff(starts)
    counts = {"examples": len(answers), "tokens": len(ids), "longest": int(lengths.max()), "left_out": left_out}
    return write_description(path, tokenizer, counts)


class ExampleDataset:
    """Batches of examples, one a row, padded on the right, in a new keyed order every epoch, as `TokenDataset` has it."""

    def __init__(
        self, path: Path | str, seq_len: int, batch_size: int, seed: int, vocab_size: int | None = None
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file of examples; make one with scripts/prepare_data.py --prompt-field")
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
                self.tokens, self.starts, self.answers = file["tokens"], file["starts"], file["answers"]
        except (ValueError, KeyError, EOFError, OSError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a file of examples ({error})") from None
        lengths = np.diff(self.starts)
        if (
            len(self.answers) != len(lengths)
            or len(lengths) == 0
            or self.starts[0] != 0
            or self.starts[-1] != len(self.tokens)
            or (self.answers <= self.starts[:-1]).any()
            or (self.answers >= self.starts[1:]).any()
        ):
            raise UserError(f"{path}: damaged: its examples do not fit its tokens; make it again")
        if lengths.max() > seq_len + 1:
            raise UserError(
                f"{path}: the longest example has {lengths.max()} tokens, so --seq-len must be at least {lengths.max() - 1}"
                f" (it is {seq_len}); or leave long ones out with scripts/prepare_data.py --max-length {seq_len + 1}"
            )
        if vocab_size is not None:
            check_token_ids(self.tokens, vocab_size, str(path))
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self._order = Order(len(lengths), seed)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records, so that a run cannot be resumed on other data unseen."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.starts, self.answers):
            digest.update(np.ascontiguousarray(array).tobytes())
        return {
            "examples": len(self.answers),
            "sha256": digest.hexdigest(),
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def batch(self, step: int, host: int = 0, n_hosts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a step, each int32 (B / n_hosts, T). Only the answers' tokens are counted targets."""
        numbers = host_rows(step, self.batch_size, host, n_hosts)
        inputs = np.zeros((len(numbers), self.seq_len), np.int32)
        targets = np.full((len(numbers), self.seq_len), IGNORED, np.int32)
        for row, number in enumerate(numbers):
            i = self._order(number)
            start, answer, end = self.starts[i], self.answers[i], self.starts[i + 1]
            inputs[row, : end - 1 - start] = self.tokens[start : end - 1]
            targets[row, answer - 1 - start : end - 1 - start] = self.tokens[answer:end]
        return inputs, targets


def open_dataset(
    path: Path, seq_len: int, batch_size: int, seed: int, vocab_size: int | None = None
) -> TokenDataset | ExampleDataset:
    """The dataset of a data file: `.npz` holds examples, `.npy` a stream of tokens."""
    cls = ExampleDataset if path.suffix == ".npz" else TokenDataset
    return cls(path, seq_len, batch_size, seed, vocab_size)

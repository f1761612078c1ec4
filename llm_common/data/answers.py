"""Examples for fine-tuning: a prompt and an answer each. Only the answer is learned.

The file is an `.npz` of plain arrays: all ids one after the other, where each example starts, and where its answer
starts.
"""

import functools
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.data.datasets import Order, TokenDataset, host_rows, write_described
from llm_common.data.sequences import AUTO, RULE, answer_encoder, encode_conversation, resolve_token
from llm_common.data.shards import NOT_AN_ARRAY, id_dtype
from llm_common.errors import UserError
from llm_common.tensors import check_token_ids
from llm_common.text.corpus import read_records
from llm_common.text.hf_tokenizer import AnyTokenizer
from llm_common.text.words import clean

Example = tuple[list[int], list[int]]  # the ids of the prompt and of the answer
IGNORED = -100
OTHER_ANSWER = "\u205c\u2058"  # begins as no answer does; shows where a template puts one
LARGEST_RATIO = 200  # of an archive's content to its size: more is a bomb, not data


@dataclass
class ExampleReader:
    """Turns pairs of a prompt and an answer into ids.

    chat: in the tokenizer's chat template; without it the answer follows the prompt as it is. turn_end: the token that
    ends an answer without a template, as for `sequences.answer_encoder`. parse_special: whether special tokens written
    out in the two texts are those tokens; as a rule they are text. The counts say what was met on the way.
    """

    tokenizer: AnyTokenizer
    chat: bool = False
    turn_end: str = AUTO
    parse_special: bool = False
    shortened: int = field(default=0, init=False)  # answers that the template left a part out of
    endless: int = field(default=0, init=False)  # answers after which no special token comes

    def __post_init__(self) -> None:
        if self.chat and (self.tokenizer.folder is None or self.tokenizer.folder.template is None):
            raise UserError("`chat` needs the tokenizer of a Hugging Face folder with a chat template")
        if self.chat and self.turn_end != AUTO:
            raise UserError("`turn_end` with `chat`: the template says what ends an answer; leave one of the two out")

    @functools.cached_property
    def _plain(self) -> Callable[[str, str], Example]:
        return answer_encoder(self.tokenizer, self.turn_end, self.parse_special)

    def __call__(self, prompt: str, answer: str) -> Example:
        prompt, answer = clean(prompt), clean(answer)
        if not self.chat:
            return self._plain(prompt, answer)
        whole, at = self._conversation(prompt, answer)
        self.shortened += answer.strip() not in whole[at:]
        head, tail = encode_conversation(self.tokenizer, self._conversation, (prompt, answer), self.parse_special)
        self.endless += not any(i in self._ending for i in tail)
        return head, tail

    @functools.cached_property
    def _ending(self) -> set[int]:
        return {*self.tokenizer.special_tokens.values(), *self.tokenizer.eos_ids}

    def _conversation(self, prompt: str, answer: str) -> tuple[str, int]:
        """A conversation in the template, and where what is to be learned begins.

        That is where the generation prompt ends, if the conversation begins with it; else (the generation prompts of
        R1's distillations open a thought that no conversation has) as far as it goes, but never within the answer.
        """
        messages = lambda text: [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        start = self.tokenizer.chat(messages("")[:1], add_generation_prompt=True)
        whole = self.tokenizer.chat(messages(answer), add_generation_prompt=False)
        if whole.startswith(start):
            return whole, len(start)
        other = self.tokenizer.chat(messages(OTHER_ANSWER), add_generation_prompt=False)
        return whole, next(
            (i for i, letters in enumerate(zip(whole, start, other, strict=False)) if len(set(letters)) > 1), 0
        )

    def describe(self) -> dict[str, Any]:
        """What a data file records of how it was made."""
        given = self.turn_end != AUTO
        end = resolve_token(self.tokenizer, self.turn_end, "`turn_end`") if given else self.tokenizer.turn_end
        return {
            "rule": RULE,
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.tokenizer.vocab_size,
            "chat": self.chat,
            "turn_end": end,
            "special_tokens_in_text": self.parse_special,
        }


def read_pairs(path: Path, prompt_field: str, answer_field: str) -> Iterator[tuple[str, str]]:
    """The prompts and answers of a file of records (JSONL, JSON or CSV, also with .gz), by the names of two fields.

    Raises UserError with the place for a record that has not both as text.
    """
    for where, record in read_records(path, prompt_field):
        prompt, answer = (_text(record, name, where) for name in (prompt_field, answer_field))
        yield prompt, answer


def read_examples(
    path: Path, prompt_field: str, answer_field: str, tokenizer: AnyTokenizer, chat: bool = False
) -> Iterator[Example]:
    """The examples of a file of records; see `read_pairs` and `ExampleReader`."""
    reader = ExampleReader(tokenizer, chat)
    return (reader(prompt, answer) for prompt, answer in read_pairs(path, prompt_field, answer_field))


def _text(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        known = f"it has {', '.join(map(repr, row))}"[:300] if isinstance(row, dict) else "it is not an object"
        raise UserError(f"{where}: no text in the field {field!r}; {known}")
    return text


def write_examples(
    path: Path,
    examples: Iterable[Example],
    reader: ExampleReader | AnyTokenizer,
    max_length: int | None = None,
    held_out: float = 0.0,
) -> dict[str, Any]:
    """Write examples to an `.npz` file with a `.json` beside it, and return what the `.json` holds.

    Examples of more than max_length ids are left out and counted; so are those without a prompt or an answer.
    """
    if path.suffix != ".npz":
        raise UserError(f"{path}: a file of examples must end in .npz")
    reader = reader if isinstance(reader, ExampleReader) else ExampleReader(reader)
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
    file = io.BytesIO()
    dtype = id_dtype(reader.tokenizer)
    np.savez(file, tokens=np.array(ids, dtype), starts=np.array(starts), answers=np.array(answers))
    lengths = np.diff(starts)
    counts = {"examples": len(answers), "tokens": len(ids), "longest": int(lengths.max()), "left_out": left_out}
    return write_described(path, file.getvalue(), {**counts, "held_out": held_out, **reader.describe()})


def load_examples(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of all examples, where each starts (and the last ends), and where its answer starts.

    Raises UserError for a file that is none, is damaged, or unpacks to much more than it is.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of examples; make one with one-model prepare-data --prompt-field")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > max(LARGEST_RATIO * path.stat().st_size, 64 << 20):
            raise UserError(f"{path}: unpacks to {size:,} bytes, which is no data; it is not read")
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            tokens, starts, answers = file["tokens"], file["starts"], file["answers"]
    except UserError:
        raise
    except (*NOT_AN_ARRAY, KeyError, AttributeError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a file of examples ({str(error)[:200]})") from None
    for array in (tokens, starts, answers):
        if not isinstance(array, np.ndarray) or array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{path}: damaged: its arrays are not flat ones of integers; make it again")
    lengths = np.diff(starts)
    if (
        len(answers) != len(lengths)
        or len(lengths) == 0
        or starts[0] != 0
        or starts[-1] != len(tokens)
        or (answers <= starts[:-1]).any()
        or (answers >= starts[1:]).any()
    ):
        raise UserError(f"{path}: damaged: its examples do not fit its tokens; make it again")
    return tokens, starts, answers


def example_row(tokens: np.ndarray, start: int, answer: int, end: int, inputs: np.ndarray, targets: np.ndarray) -> None:
    """Write an example into a row of inputs and targets, (T,) each. Only the answer's tokens are counted targets."""
    inputs[: end - 1 - start] = tokens[start : end - 1]
    targets[answer - 1 - start : end - 1 - start] = tokens[answer:end]


class ExampleDataset:
    """Batches of examples, one a row, padded on the right, in a new keyed order every epoch, as `TokenDataset`
    has it.
    """

    def __init__(
        self, path: Path | str, seq_len: int, batch_size: int, seed: int, vocab_size: int | None = None
    ) -> None:
        path = Path(path)
        self.tokens, self.starts, self.answers = load_examples(path)
        lengths = np.diff(self.starts)
        if lengths.max() > seq_len + 1:
            raise UserError(
                f"{path}: the longest example has {lengths.max()} tokens, so `seq_len` must be at least "
                f"{lengths.max() - 1}"
                f" (it is {seq_len}); or leave long ones out with one-model prepare-data --max-length {seq_len + 1}"
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
            example_row(self.tokens, self.starts[i], self.answers[i], self.starts[i + 1], inputs[row], targets[row])
        return inputs, targets


def open_dataset(
    path: Path, seq_len: int, batch_size: int, seed: int, vocab_size: int | None = None
) -> TokenDataset | ExampleDataset:
    """The dataset of a data file: `.npz` holds examples, `.npy` a stream of tokens."""
    cls = ExampleDataset if path.suffix == ".npz" else TokenDataset
    return cls(path, seq_len, batch_size, seed, vocab_size)

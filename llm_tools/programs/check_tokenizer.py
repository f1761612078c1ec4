"""Are the ids of a tokenizer's folder, as this program reads it, those of transformers? With and without the
`tokenizers` library.

    one-model check-tokenizer my_llama/ models/smollm2

Compared are texts, prompts, and conversations in the chat template, if there is one. The exit code is 0 if all ids are
the same, 1 if some are not or a folder cannot be read at all.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_common.data.answers import ExampleReader
from llm_common.errors import UserError, first_line, require_package
from llm_common.text.hf_tokenizer import AnyTokenizer, HfTokenizer
from llm_common.text.tokenizer_json import read_hf_folder
from llm_tools.flags import make_parser

TEXTS = (
    "Hello world",
    " leading and trailing ",
    "a\n\nb\r\n  c\t\td   ",
    "I'LL we've 1 22 333 4444!",
    "日本語 🙂👩‍👩‍👧 e\u0301 Ελλάδα",
    "x▁y </s> <|im_end|> <|eot_id|> <|endoftext|> [PAD]",
    "",
)
PAIRS = (("Say four", "Four"), (" a ", "\n b\n"), ("日本?", "é🙂 12345"), ("<b>", "`x = 1`\n\n"), ("", "empty"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("check-tokenizer", __doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args(argv)
    require_package("transformers", "dev")
    warnings.simplefilter("ignore")
    different = 0
    for folder in args.folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        read_so_far = 0
        for name, read in (("through tokenizers", HfTokenizer), ("in Python", read_hf_folder)):
            try:
                found = differences(folder, read(folder))
            except UserError as error:
                print(f"{folder}, {name}: not read ({error})")
                continue
            read_so_far += 1
            print(f"{folder}, {name}: {found or 'the same ids'}")
            different += bool(found)
        different += not read_so_far
    return 1 if different else 0


def differences(folder: Path, tokenizer: AnyTokenizer) -> str:
    """The first text with other ids than transformers gives, or nothing."""
    import transformers

    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for what, ours, wanted in (
            ("text", tokenizer.encode(text), theirs(text, add_special_tokens=False).input_ids),
            ("prompt", tokenizer.encode_prompt(text), theirs(text).input_ids),
        ):
            # after a text some tokenizers put an end, which would end a prompt before it is continued
            if ours != wanted[: len(ours)] or (what == "text" and len(ours) != len(wanted)):
                return f"{what} {text!r}: {ours}, transformers {wanted}"
    if theirs.chat_template is None:
        return ""
    reader = ExampleReader(tokenizer, chat=True, parse_special=True)
    for prompt, answer in PAIRS:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        wanted = attempt(lambda m=messages: theirs.apply_chat_template(m, tokenize=True, return_dict=True)["input_ids"])
        ours = attempt(lambda p=prompt, a=answer: [i for part in reader(p, a) for i in part])
        if ours != wanted and not (isinstance(ours, str) and isinstance(wanted, str)):
            return f"chat {prompt!r}, {answer!r}: {ours}, transformers {wanted}"
    return ""


def attempt(make: Callable[[], list[int]]) -> list[int] | str:
    try:
        return make()
    except Exception as error:  # a template may refuse a conversation: both must
        return first_line(error)

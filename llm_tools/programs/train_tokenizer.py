"""Train a byte-level BPE tokenizer.

    one-model train-tokenizer --out data/bpe.json
    one-model train-tokenizer --input my_texts/ more.jsonl.gz --vocab-size 32768 --pattern llama3 --out my_tokenizer/
    one-model train-tokenizer --input my_texts/ --special-tokens "<|endoftext|>" "<|user|>" "<|assistant|>"

Input: UTF-8 text in which <|endoftext|> separates documents, or JSONL, either of them also as .gz; a folder stands for
its .txt, .md and .jsonl files. Memory depends on how many different words there are, not on how much text. --out
FILE.json writes one file; --out FOLDER/ writes Hugging Face's tokenizer.json and tokenizer_config.json beside it.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llm_common.errors import UserError, counted, notice, write_whole
from llm_common.run.progress import reading_bar
from llm_common.text.bpe_trainer import TIE_RULES, check_special_tokens, train_bpe
from llm_common.text.hf_tokenizer import companions
from llm_common.text.tokenizer import END_OF_TEXT, FILE_NAME, Tokenizer
from llm_common.text.words import PATTERNS
from llm_tools.flags import add_corpus_flags, at_least_one, check_processes, cores, make_parser, open_corpus

WORTH_A_PROCESS = 32 << 20  # bytes of text for each: to start one takes as long as to count ten


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("train-tokenizer", __doc__)
    parser.add_argument("--out", type=Path, default=Path("data/bpe.json"), help="a .json file, or a folder")
    parser.add_argument(
        "--input",
        "--data",
        type=Path,
        nargs="+",
        default=[],
        help="files and folders (default: Python's documentation)",
    )
    add_corpus_flags(parser, "count words")
    parser.add_argument("--vocab-size", type=int, default=2048, help="256 bytes + merges + special tokens")
    parser.add_argument("--pattern", choices=list(PATTERNS), default="gpt2", help="how text is cut into words")
    parser.add_argument(
        "--special-tokens", nargs="*", default=[END_OF_TEXT], metavar="TEXT", help=f"default: {END_OF_TEXT}"
    )
    parser.add_argument(
        "--tie-rule", choices=TIE_RULES, default=TIE_RULES[0], help="which of equally frequent pairs is merged first"
    )
    args = parser.parse_args(argv)
    at_least_one(args, "processes")
    check_processes(args.processes)
    check_special_tokens(args.special_tokens, args.vocab_size)
    if args.out.suffix and args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: a .json file, or a folder")
    refuse_to_overwrite(args.out)
    with reading_bar(Console()) as show:
        corpus = open_corpus(args.input, args, show, "reading")
        wanted = args.vocab_size - 256 - len(args.special_tokens)
        tokenizer = train_bpe(
            corpus.stretches(),
            args.vocab_size,
            args.special_tokens,
            args.pattern,
            args.tie_rule,
            args.processes or max(1, min(cores(), corpus.size // WORTH_A_PROCESS)),
            lambda n: show("merging", n, wanted) if n % 100 == 0 else None,
        )
    if args.out.suffix:
        tokenizer.save(args.out)
    else:
        for name, content in companions(tokenizer).items():
            write_whole(args.out / name, content)
    size = f", from {corpus.size / 1e6:.1f} MB" if corpus.files else ""
    print(f"{args.out}: {counted(len(tokenizer.merges), 'merge')}, {tokenizer.vocab_size} ids{size}")
    if len(tokenizer.merges) < wanted:
        print(
            f"no pair was left after {len(tokenizer.merges)} of {wanted} merges: every word is one token. "
            f"The vocabulary is smaller than --vocab-size {args.vocab_size}; more text would fill it"
        )


def refuse_to_overwrite(out: Path) -> None:
    """Raise UserError if something other than a tokenizer of this program stands where one is to go."""
    own = out if out.suffix else out / FILE_NAME
    if own.exists():
        try:
            Tokenizer.load(own)
            notice(f"{own} is replaced; token files that were made with it no longer fit")
        except UserError:
            raise UserError(
                f"--out {own}: is there already, and is no tokenizer of this program; give another name"
            ) from None
    elif not out.suffix and (out / "tokenizer.json").exists():
        raise UserError(f"--out {out}: holds somebody's tokenizer.json; give another folder")

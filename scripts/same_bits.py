"""Whether two checkouts compute the same bits: trained weights, losses, held-out losses, texts, and JAX's programs.

    python scripts/same_bits.py HEAD~1                       # a revision against this working tree
    python scripts/same_bits.py v0.4 main --rows torch       # two revisions, or two folders; only some rows
    python scripts/same_bits.py main --parity                # also every figure of `parity run` and `parity sharded`

A refactor changes no result: its commit message says on how many rows this held. Every row trains a small model for 20
steps through `train.py` and draws three texts through `generate.py`, so that the code may move as it likes behind the
programs. Exit code 0: the same bits on every row.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

STEPS, LENGTH, POSITIONS = 20, 24, 64
PROMPTS = ("The low", "wide é", "newest of ")
DTYPES = ("float64", "float32", "bfloat16")
BASE = {
    "model_type": "llama", "vocab_size": 301, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "window": {"model_type": "mistral", "sliding_window": 6},
    "llama 3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 20}},
}
FEATURES: dict[str, list[Any]] = {
    "plain": [],
    "reference attention": ["--attention-backend", "reference"],
    "document mask": ["--document-mask"],
    "remat full": ["--remat", "full"],
    "remat dots": ["--remat", "dots"],
    "accumulation": ["--gradient-accumulation-steps", 4],
    "chunked loss": ["--loss-chunks", 4],
    "scan": ["--scan-layers"],
    "all of them": ["--document-mask", "--remat", "full", "--gradient-accumulation-steps", 2, "--loss-chunks", 3],
}
# Every feature on one model, every model plain, and where a feature meets another model's mask, head or norms.
CASES = [("llama", feature) for feature in FEATURES] + [(model, "plain") for model in MODELS if model != "llama"]
CASES += [("window", "document mask"), ("tied", "chunked loss"), ("tied", "accumulation"), ("qwen3", "all of them")]
TRAIN = [
    "--device", "cpu", "--batch-size", 8, "--seq-len", LENGTH, "--total-steps", STEPS,
    "--warmup-steps", 3, "--lr-max", 0.01,
    "--log-every", 1, "--eval-every", 10, "--seed", 7,
]  # fmt: skip
DRAW = ["--device", "cpu", "--max-new-tokens", 24, "--temperature", 0.8, "--top-k", 40, "--top-p", 0.95, "--seed", 3]


def names_of_rows(words: list[str]) -> list[tuple[str, str, str, str]]:
    """Framework, dtype, model and feature of every row with one of some words in its name, or of all."""
    rows = [(f, dtype, *case) for f in ("jax", "torch") for dtype in DTYPES for case in CASES]
    return [row for row in rows if not words or any(word in ":".join(row) for word in words)]


# --- in a process of one checkout


def call(name: str, *arguments: object) -> str:
    """What a program of the checkout that is the current folder prints."""
    argv, out = sys.argv, io.StringIO()
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_path(f"scripts/{name}.py", run_name="__main__")
    finally:
        sys.argv = argv
    return out.getvalue()


def prepare(folder: Path) -> None:
    """A text, a tokenizer and token files, which every row trains on."""
    words = ["low", "lower", "lowest", "new", "newer", "wide", "wider", "widest,", "naïve", "café", "你好", "of", "the"]
    rng = np.random.default_rng(5)
    documents = [" ".join(rng.choice(words, rng.integers(4, 20))) for _ in range(160)]
    (folder / "text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    call("train_tokenizer", "--data", folder / "text.txt", "--vocab-size", 301, "--out", folder / "bpe.json")
    call("prepare_data", "--tokenizer", folder / "bpe.json", "--data", folder / "text.txt", "--out", folder / "t.npy",
         "--validation", 0.2)  # fmt: skip
    for model, changes in MODELS.items():
        (folder / f"{model}.json").write_text(json.dumps(BASE | changes), encoding="utf-8")


def measure(folder: Path, words: list[str]) -> None:
    """Every row's figures to `rows.jsonl`, as they come."""
    prepare(folder)
    for number, (framework, dtype, model, feature) in enumerate(names_of_rows(words)):
        out, programs = folder / f"run-{number}", folder / f"programs-{number}"
        if framework == "jax":
            import jax

            jax.clear_caches()
            jax.config.update("jax_dump_ir_to", str(programs))
        common = [
            "--data",
            folder / "t.npy",
            "--tokenizer",
            folder / "bpe.json",
            "--model-config",
            folder / f"{model}.json",
        ]
        call(
            "train",
            "--framework",
            framework,
            "--out",
            out,
            "--compute-dtype",
            dtype,
            *common,
            *TRAIN,
            *FEATURES[feature],
        )
        prompts = [x for text in PROMPTS for x in ("--prompt", text)]
        texts = [
            call("generate", "--framework", framework, "--checkpoint", out, "--compute-dtype", dtype, *prompts, *flags)
            for flags in (DRAW, [*DRAW, "--temperature", 0])
        ]
        row = {"name": f"{framework}:{dtype}:{model}:{feature}", "texts": texts, **figures(out)}
        if framework == "jax":
            row["programs"] = sorted(programs_in(programs))
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def figures(run: Path) -> dict[str, Any]:
    """The files of a run's last checkpoint, and every number of its log that is not a time."""
    last = max(run.glob("step-*"))
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    kept = ("loss", "grad_norm", "lr", "skipped", "step", "perplexity", "tokens", "bytes", "bits_per_byte")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = [{key: row[key] for key in kept if key in row} for row in log if "loss" in row]
    return {name: digest(last / f"{name}.safetensors") for name in ("model", "optimizer")} | {"log": numbers}


def programs_in(folder: Path) -> Iterator[str]:
    """A digest of every StableHLO program of some size, with its name; without locations, functions numbered as they
    come.
    """
    for path in folder.rglob("*.mlir"):
        text = re.sub(r"\s*loc\((?:[^()\"]|\"[^\"]*\"|\([^()]*\))*\)|^#loc.*\n", "", path.read_text(), flags=re.M)
        if text.count("\n") < 50:  # an operation by itself
            continue
        names = dict.fromkeys(re.findall(r"@[\w.<>-]+", text))
        numbers = {function: f"@{i}" for i, function in enumerate(names)}
        text = re.sub(r"@[\w.<>-]+", lambda match, numbers=numbers: numbers[match[0]], text)
        name = re.sub(r"^.*?(jit_\w+?)_compile\w*$|^jax_ir\d+_", r"\1", path.stem)
        yield f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


# --- two checkouts side by side


@contextlib.contextmanager
def checkout(name: str) -> Iterator[Path]:
    """The folder of this name, or a revision's files in a folder that lasts as long as this is open."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", name], capture_output=True, check=False)
        if archive.returncode:
            sys.exit(f"{name}: neither a folder nor a revision ({archive.stderr.decode().strip()})")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def run_in(root: Path, *command: object) -> None:
    """Run Python in a checkout; what it says is shown if it fails."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'scripts'}",  # where programs had their libraries before llm_tools
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{root}: {' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")


def rows_of(root: Path, words: list[str]) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run_in(root, Path(__file__).resolve(), "--measure", folder, "--rows", *words)
        lines = (Path(folder) / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def parity_of(root: Path) -> dict[str, dict[str, Any]]:
    """Every figure of the ladder and of the meshes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for command in ("run", "sharded"):
            run_in(root, "-m", "parity", command, "--out", folder)
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
            for row in report["rows"]:
                name = f"parity {command}: {row['check']}: {row['item']}: {row['dtype']}"
                found[name] = {"measured": str(row["measured"]), "allowed": str(row["allowed"])}
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of a row is not the same."""
    found = []
    for key in before.keys() | after.keys():
        a, b = before.get(key), after.get(key)
        if a == b:
            continue
        if key == "log" and a and b:
            at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
            found.append(f"log from line {at + 1} on: {a[at : at + 1]} and {b[at : at + 1]}")
        elif key == "programs" and a is not None and b is not None:
            found.append(f"programs: {sorted(set(a) - set(b))} and {sorted(set(b) - set(a))}")
        else:
            found.append(key)
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="a revision or a folder")
    parser.add_argument("head", nargs="?", default=".", help="a revision or a folder (default: this one)")
    parser.add_argument(
        "--rows", nargs="*", default=[], metavar="WORD", help="only rows with one of these words in their name"
    )
    parser.add_argument(
        "--parity", action="store_true", help="also `parity run` and `parity sharded`, figure by figure"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure, args.rows)
        return 0
    if args.base is None or not names_of_rows(args.rows):
        parser.error(
            "a revision or folder to compare with is needed" if args.base is None else f"no row has {args.rows}"
        )
    with contextlib.ExitStack() as stack:
        roots = [stack.enter_context(checkout(name)) for name in (args.base, args.head)]
        with ThreadPoolExecutor(2) as pool:
            before, after = pool.map(lambda root: rows_of(root, args.rows), roots)
        if args.parity:
            for rows, root in zip((before, after), roots, strict=True):
                rows.update(parity_of(root))
    wrong = 0
    for name in sorted(before.keys() | after.keys()):
        found = differences(before.get(name, {}), after.get(name, {}))
        wrong += bool(found)
        if found:
            print(f"{name}: {'; '.join(found)}")
    print(f"{len(before) - wrong} of {len(before)} rows have the same bits in {args.base} and {args.head}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

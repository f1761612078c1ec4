"""Killing programs at any moment, damaging files, and what must hold after it."""

import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.data.answers import load_examples, write_examples
from llm_common.data.datasets import check_data, open_tokens, write_tokens
from llm_common.data.shards import prepare
from llm_common.errors import UserError
from llm_common.files.export import export
from llm_common.run.checkpoint import load_checkpoint, load_weights, save_checkpoint
from llm_common.text.hf_tokenizer import load_tokenizer
from llm_tools.soak_kinds import CFG, DOCUMENTS, KINDS, RARE, SMALL, SPAN, TOKENIZER, state_of


def kill_once(name: str, folder: Path, rng: random.Random) -> str | None:
    """Let a kind work in a process, kill it at a random moment, and look; returns what is wrong, or None."""
    kind = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            kind.work(folder)
        except BaseException:
            (folder / "raised").write_text(traceback.format_exc())
        os._exit(1)
    time.sleep(SPAN[name] * rng.random())
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return f"ended by itself: {(folder / 'raised').read_text().strip().splitlines()[-1]}"
    until = time.monotonic() + 20
    while (left := processes_of(child)) and time.monotonic() < until:
        time.sleep(0.02)
    if left:
        return f"processes are left: {left}"
    try:
        kind.check(folder)
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def processes_of(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def kills(names: list[str], count: int, seed: int, progress: Callable[[int], None]) -> tuple[Counter, list[str]]:
    """Kill so many times; how often each kind was, and what was wrong."""
    rng, done, wrong = random.Random(seed), Counter(), []
    often = [name for name in names if name not in RARE] or names
    with tempfile.TemporaryDirectory() as place:
        for i in range(count):
            name = rng.choice(often)
            rare = [x for x in names if x in RARE and i % RARE[x] == RARE[x] - 1]
            name = rare[0] if rare else name
            folder = Path(place) / f"{name}-{done[name] // 40}"  # begun anew now and then
            problem = kill_once(name, folder, rng)
            done[name] += 1
            if problem is not None:
                wrong.append(f"{name}, kill {i}: {problem}")
                shutil.rmtree(folder, ignore_errors=True)
            progress(i + 1)
    return done, wrong


def corrupt(path: Path, rng: random.Random) -> str:
    """Change a file in some way; returns what was done."""
    content = bytearray(path.read_bytes())
    ways = ["flip", "flip", "flip", "zeros", "swap", "cut", "append", "delete", "insert"]
    way, at = rng.choice(ways), rng.randrange(max(1, len(content)))
    if way == "delete" or not content:
        path.unlink()
        return f"{path.name}: deleted"
    if way == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif way == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif way == "swap":
        other = rng.randrange(len(content))
        content[at], content[other] = content[other], content[at]
    elif way == "cut":
        del content[at:]
    elif way == "append":
        content += bytes([rng.randrange(256)])
    else:
        content.insert(at, rng.randrange(256))
    path.write_bytes(content)
    return f"{path.name}: {way} at {at}"


def read_checkpoint(folder: Path) -> Any:
    cfg, state, settings = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    parts = [{name: x.tobytes() for name, x in part.items()} for part in (state.weights, state.mu, state.nu)]
    return cfg, parts, state.step, state.adam_count, settings, None if tokenizer is None else tokenizer.fingerprint()


def read_model(folder: Path) -> Any:
    cfg, weights = load_weights(folder)
    tokenizer = load_tokenizer(folder)
    return (
        cfg,
        {name: x.tobytes() for name, x in weights.items()},
        None if tokenizer is None else tokenizer.encode("ab c"),
    )


def read_data(folder: Path) -> Any:
    description, tokens = check_data(folder / "t.npy", TOKENIZER), open_tokens(folder / "t.npy")
    return description, np.array(tokens[: len(tokens)]).tobytes()


def read_questions(folder: Path) -> Any:
    return check_data(folder / "e.npz", TOKENIZER), [x.tobytes() for x in load_examples(folder / "e.npz")]


def read_shards(folder: Path) -> Any:
    description, tokens = check_data(folder, TOKENIZER), open_tokens(folder)
    return description, np.array(tokens[: len(tokens)]).tobytes()


def make_all(place: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """One of everything that is saved, and how it is read."""
    rng = np.random.default_rng(0)
    random_state = state_of(7)
    for part in (random_state.weights, random_state.mu, random_state.nu):
        for name, x in part.items():
            x[...] = rng.standard_normal(SMALL[name])
    saved = save_checkpoint(place / "run", CFG, random_state, {"evaluation": {"loss": 2.5}, "seed": 1}, TOKENIZER)
    export(place / "model", CFG, random_state.weights, TOKENIZER, shard_bytes=60_000)
    (place / "tokens").mkdir()
    write_tokens(place / "tokens" / "t.npy", DOCUMENTS, TOKENIZER)
    (place / "examples").mkdir()
    write_examples(place / "examples" / "e.npz", [([1, 2, i % 9], [3, 4]) for i in range(50)], TOKENIZER)
    TOKENIZER.save(place / "bpe.json")
    prepare(DOCUMENTS, place / "data", place / "bpe.json", processes=1, part_size=9000)
    return {
        "checkpoint": (saved, read_checkpoint),
        "tokens": (place / "tokens", read_data),
        "examples": (place / "examples", read_questions),
        "shards": (place / "data" / "train", read_shards),
        "hugging face": (place / "model", read_model),
    }


def corruptions(count: int, seed: int, progress: Callable[[int], None]) -> tuple[dict[str, Counter], list[str]]:
    """Corrupt so many times; what came of it for each kind, and what was wrong. A Hugging Face folder has no checksums:
    there a change that is no error of form cannot be seen.
    """
    rng, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        everything = make_all(place)
        expected = {name: read(folder) for name, (folder, read) in everything.items()}
        outcomes = {name: Counter() for name in everything}
        for i in range(count):
            name = rng.choice(list(everything))
            folder, read = everything[name]
            copy = place / "copy" / folder.name
            shutil.rmtree(copy.parent, ignore_errors=True)
            shutil.copytree(folder, copy)
            what = corrupt(rng.choice(sorted(path for path in copy.rglob("*") if path.is_file())), rng)
            try:
                found = read(copy)
                outcome = (
                    "as saved" if found == expected[name] else "not to be seen" if name == "hugging face" else "WRONG"
                )
            except UserError as error:
                outcome = "refused" if "\n" not in str(error) else "NOT ONE LINE"
            except Exception as error:
                outcome, what = "RAISED", f"{what}: {type(error).__name__}: {error}"
            outcomes[name][outcome] += 1
            if outcome.isupper():
                wrong.append(f"{name}, {what}: {outcome}")
            progress(i + 1)
    return outcomes, wrong

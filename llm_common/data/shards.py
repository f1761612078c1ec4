"""Token data of any size: shards of encoded documents, and a manifest that says what they are.

    FOLDER/train/manifest.json    dtype, counts, rule, the tokenizer's hash, each shard's size and sha256
    FOLDER/train/00000.npy        the ids of some documents, as `sequences.DocumentEncoder` makes them
    FOLDER/validation/...         the documents held out, chosen by the hash of their text

Documents are taken in parts of about `part_size` characters; a part becomes one shard of each side, written by one of
several processes. A part that is done leaves a record, so that after a kill only the others are encoded; the manifests
come last, and without them the folder is no data.
"""

import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_common.data.sequences import AUTO, DocumentEncoder
from llm_common.errors import UserError, has_its_checksum, read_json, sha256_of, with_checksum, write_whole
from llm_common.processes import end_with_parent
from llm_common.text.hf_tokenizer import AnyTokenizer, open_tokenizer

FORMAT = 2  # 1: nothing before a document, and no checksum of the manifest
MANIFEST = "manifest.json"
# What NumPy raises for a file whose header is not one: it is parsed as Python, so it may nest too deeply or claim too
# much.
NOT_AN_ARRAY = (ValueError, EOFError, OSError, TypeError, SyntaxError, RecursionError, MemoryError, OverflowError)
PART = 16 << 20  # characters
SIDES = ("train", "validation")


def id_dtype(tokenizer: AnyTokenizer) -> type:
    """The smallest unsigned dtype for a tokenizer's ids."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def is_held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the share held out: by its text, so that it stays there however the corpus
    grows.
    """
    digest = int.from_bytes(hashlib.sha256(document.encode("utf-8", "replace")).digest()[:8], "big")
    return digest < share * 2**64


def prepare(
    documents: Iterable[str],
    folder: Path,
    tokenizer_path: Path,
    validation: float = 0.0,
    processes: int = 1,
    part_size: int = PART,
    document_end: str = AUTO,
    parse_special: bool = False,
) -> dict[str, dict[str, Any]]:
    """Encode documents to shards in a folder; returns the manifests of "train" and, with a share held out,
    "validation".

    document_end, parse_special: as for `DocumentEncoder`. Raises UserError for a folder with other data, for no
    documents, and for a side that would be empty.
    """
    settings = (tokenizer_path, document_end, parse_special)
    encoder = _encoder(*settings)
    made_by = {key: x for key, x in encoder.describe().items() if key != "document_ends_inside"}
    plan = {"format": FORMAT, **made_by, "validation": validation, "part_size": part_size}
    records, parts = folder / "parts", _parts(documents, part_size)
    if any((folder / side / MANIFEST).exists() for side in SIDES):
        raise UserError(f"{folder}: holds finished data already; remove it, or give another `out`")
    if (records / "plan.json").is_file() and read_json(records / "plan.json") != plan:
        raise UserError(
            f"{folder}: was begun with another tokenizer or other settings; remove it, or give another `out`"
        )
    for leftover in folder.glob("*/.*.npy.*"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    write_whole(records / "plan.json", json.dumps(plan).encode())
    done: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _open, settings) as pool:
        waiting: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        for number, part in enumerate(parts):
            digest = _digest(part)
            found = _record(folder, number, digest)
            if found is not None:
                done.append(found)
                continue
            while len(waiting) >= 2 * processes:  # so that the documents of few parts are in memory
                done.append(_result(waiting.pop(min(waiting))))
            waiting[number] = pool.submit(_encode_part, part, number, digest, folder, validation)
        done += [_result(future) for future in waiting.values()]
    if not done:
        raise UserError("the corpus is empty: nothing to write")
    return _finish(folder, sorted(done, key=lambda record: record["number"]), encoder, validation)


def _result(future: concurrent.futures.Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "a process ended, perhaps for lack of memory; what is done is kept: run again with fewer `processes`"
        ) from None


def _finish(
    folder: Path, records: list[dict[str, Any]], encoder: DocumentEncoder, validation: float
) -> dict[str, dict[str, Any]]:
    manifests = {}
    for side in SIDES[: 2 if validation else 1]:
        shards = [record[side] for record in records if side in record]
        if not shards:
            raise UserError(f"`validation` {validation}: of so few documents none is left for {side}")
        manifests[side] = {
            "format": FORMAT,
            "dtype": np.dtype(id_dtype(encoder.tokenizer)).name,
            **encoder.describe(),
            **{
                key: sum(shard[key] for shard in shards)
                for key in ("tokens", "documents", "bytes", "document_ends_inside")
            },
            "shards": shards,
        }
    for side, manifest in manifests.items():
        for partial in (folder / side).glob(".*.npy.*"):  # of a process that was killed
            partial.unlink()
        write_whole(folder / side / MANIFEST, (json.dumps(with_checksum(manifest), indent=1) + "\n").encode())
    shutil.rmtree(folder / "parts")
    return manifests


def _parts(documents: Iterable[str], part_size: int) -> Iterator[list[str]]:
    part, size = [], 0
    for document in documents:
        part.append(document)
        size += len(document)
        if size >= part_size:
            yield part
            part, size = [], 0
    if part:
        yield part


def _digest(part: list[str]) -> str:
    digest = hashlib.sha256()
    for document in part:
        content = document.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _record(folder: Path, number: int, digest: str) -> dict[str, Any] | None:
    """What an earlier run wrote down of a part, if it was of the same documents and its shards are there whole."""
    path = folder / "parts" / f"{number:05}.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("digest") != digest:
        return None
    for side in SIDES:
        shard = record.get(side)
        if shard is not None and _damage(folder / side / shard["file"], shard):
            return None
    return record


_worker: DocumentEncoder | None = None  # of a worker


def _encoder(path: Path, document_end: str, parse_special: bool) -> DocumentEncoder:
    return DocumentEncoder(open_tokenizer(path), document_end, parse_special)


def _open(*settings: Any) -> None:
    global _worker
    end_with_parent()
    _worker = _encoder(*settings)


def _encode_part(part: list[str], number: int, digest: str, folder: Path, validation: float) -> dict[str, Any]:
    assert _worker is not None
    record: dict[str, Any] = {"number": number, "digest": digest}
    held_out = [bool(validation) and is_held_out(document, validation) for document in part]
    for side, wanted in zip(SIDES, (False, True), strict=True):
        texts = [document for document, out in zip(part, held_out, strict=True) if out is wanted]
        if texts:
            record[side] = _write_shard(folder / side / f"{number:05}.npy", texts, _worker)
    write_whole(folder / "parts" / f"{number:05}.json", json.dumps(record).encode())
    return record


def _write_shard(path: Path, texts: list[str], encoder: DocumentEncoder) -> dict[str, Any]:
    encoder.ends_inside = 0
    ids = np.concatenate([np.array(encoder(text), id_dtype(encoder.tokenizer)) for text in texts])
    file = io.BytesIO()
    np.save(file, ids, allow_pickle=False)
    content = file.getvalue()
    write_whole(path, content)
    return {
        "file": path.name,
        "tokens": len(ids),
        "largest": int(ids.max(initial=0)),
        "documents": len(texts),
        "bytes": sum(len(text.encode("utf-8", "replace")) for text in texts),
        "document_ends_inside": encoder.ends_inside,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _damage(path: Path, shard: dict[str, Any], whole: bool = False) -> str | None:
    """What is wrong with a shard: it is missing, has another size or, if all of it is read, another sha256."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != shard["size"]:
        return f"{size:,} bytes, of {shard['size']:,}"
    return "another sha256 than the manifest says" if whole and sha256_of(path) != shard["sha256"] else None


def find_manifest(path: Path) -> Path | None:
    """The manifest of a folder of shards, or of the `train` in it; None if there is none."""
    for found in (path / MANIFEST, path / "train" / MANIFEST):
        if found.is_file():
            return found
    return None


class ShardedTokens:
    """The shards of a manifest as one row of ids: it has a length, a dtype, a smallest and a largest id, and gives
    slices.

    Raises UserError, naming the shard, for one that is missing or cut off; `check` also reads all of them.
    """

    def __init__(self, manifest: Path) -> None:
        self.manifest, self.folder = read_json(manifest), manifest.parent
        try:
            if self.manifest["format"] != FORMAT:
                raise UserError(
                    f"{manifest}: format {self.manifest['format']!r}, but this version reads {FORMAT}; "
                    "make it again with one-model prepare-data"
                )
            if not has_its_checksum(self.manifest):
                raise UserError(
                    f"{manifest}: damaged (its checksum is not that of its content); make it again with "
                    "one-model prepare-data"
                )
            self.shards, self.dtype = self.manifest["shards"], np.dtype(self.manifest["dtype"])
            self.starts = np.cumsum([0, *(shard["tokens"] for shard in self.shards)])
            self._largest = max(shard["largest"] for shard in self.shards)
            damage = [(shard["file"], _damage(self.folder / shard["file"], shard)) for shard in self.shards]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{manifest}: not a manifest of token shards ({type(error).__name__}: {error})") from None
        self._refuse(damage)
        self._open: dict[int, np.ndarray] = {}

    def _refuse(self, damage: list[tuple[str, str | None]]) -> None:
        for name, what in damage:
            if what is not None:
                raise UserError(f"{self.folder / name}: {what}; copy it again, or run one-model prepare-data again")

    def check(self, on_shard: Callable[[str], None] = lambda name: None) -> None:
        """Read every shard and compare its sha256."""
        for shard in self.shards:
            self._refuse([(shard["file"], _damage(self.folder / shard["file"], shard, whole=True))])
            on_shard(shard["file"])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def min(self) -> int:
        return 0  # the dtype is unsigned

    def max(self) -> int:
        return self._largest

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("only slices of neighbouring ids")
        parts, i = [np.zeros(0, self.dtype)], int(np.searchsorted(self.starts, start, "right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[i + 1]))
            parts.append(self._shard(i)[start - self.starts[i] : end - self.starts[i]])
            start, i = end, i + 1
        return np.concatenate(parts)

    def _shard(self, i: int) -> np.ndarray:
        if i not in self._open:
            if len(self._open) >= 256:  # files held open
                self._open.clear()
            path = self.folder / self.shards[i]["file"]
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except NOT_AN_ARRAY as error:
                raise UserError(
                    f"{path}: not a shard of tokens ({type(error).__name__}); run one-model prepare-data again"
                ) from None
            if array.dtype != self.dtype or array.shape != (self.shards[i]["tokens"],):
                raise UserError(f"{path}: holds {array.dtype} {array.shape}, not what the manifest says")
            self._open[i] = array
        return self._open[i]

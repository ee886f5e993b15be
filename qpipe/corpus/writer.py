"""Writing a token store so that it is whole or not there.

Everything is built in the folder `.partial` inside the store's folder. When all files are complete and on disk, an
older manifest is removed, then the files are renamed into place, the manifest last. Whatever is killed in between
leaves a folder without manifest, which no reader takes for a store and the next attempt clears.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qpipe.corpus.store import MANIFEST, SPLITS, TOKENIZER
from qpipe.errors import QpipeError

SHARD_TOKENS = 1 << 27
"""Tokens per shard (256 MiB as uint16)."""

_PARTIAL = ".partial"


class SplitWriter:
    """Appends tokens to the shards of one split."""

    def __init__(self, folder: Path, name: str, shard_tokens: int) -> None:
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.documents = self.text_bytes = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._room = 0

    def append(self, tokens: NDArray[Any], documents: int, text_bytes: int) -> None:
        """Append token ids, shape (n,), that belong to `documents` documents with `text_bytes` bytes of text."""
        self.tokens += len(tokens)
        self.documents += documents
        self.text_bytes += text_bytes
        while len(tokens):
            if not self._room:
                self._next_shard()
            part, tokens = tokens[: self._room], tokens[self._room :]
            data = part.tobytes()
            assert self._file is not None
            self._file.write(data)
            self._digest.update(data)
            self.shards[-1]["tokens"] += len(part)
            self._room -= len(part)

    def close(self) -> None:
        """Finish the last shard and wait until it is on disk."""
        if self._file is not None:
            flush_to_disk(self._file)
            self._file.close()
            self._file = None
            self.shards[-1]["sha256"] = self._digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return the split's part of the manifest."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }

    def _next_shard(self) -> None:
        self.close()
        name = f"{self.name}-{len(self.shards):05d}.bin"
        self._file = (self.folder / name).open("wb")
        self._digest = hashlib.sha256()
        self.shards.append({"file": name, "tokens": 0, "sha256": ""})
        self._room = self.shard_tokens


@contextlib.contextmanager
def partial_store(out: Path) -> Iterator[Path]:
    """Give an empty folder to build a store in; clear the remains of a killed attempt before, and the folder after.

    Raises
    ------
    QpipeError
        `out` is a file, or another process is writing this store.
    """
    if out.exists() and not out.is_dir():
        raise QpipeError(f"{out} is a file; the token store needs a folder")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        partial = out / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, out: Path, tokenizer: str, manifest: Mapping[str, Any]) -> None:
    """Turn the finished shards in `partial` into the store `out`, replacing an older one."""
    _write(partial / TOKENIZER, tokenizer)
    _write(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (out / MANIFEST).unlink(missing_ok=True)
    _sync_folder(out)
    for old in (path for name in SPLITS for path in out.glob(f"{name}-*.bin")):
        old.unlink()
    for path in sorted(partial.iterdir()):
        if path.name != MANIFEST:
            path.replace(out / path.name)
    _sync_folder(out)
    (partial / MANIFEST).replace(out / MANIFEST)
    _sync_folder(out)


def flush_to_disk(file: Any) -> None:
    """Wait until everything written to `file` is on disk."""
    file.flush()
    os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        flush_to_disk(file)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder; it vanishes with the process, so nothing is left to clean up."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QpipeError(f"{folder}: another process is writing this token store; wait for it to end") from None
        except OSError:  # file systems without locks
            pass
        yield
    finally:
        os.close(descriptor)


def merge_tokens(tokens: NDArray[Any], lengths: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[Any]:
    """Return the tokens of the chosen documents: `tokens` (sum of lengths,), `lengths` and `chosen` (documents,)."""
    return tokens if chosen.all() else tokens[np.repeat(chosen, lengths)]

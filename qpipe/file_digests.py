"""SHA-256 digests of files, remembered so that a file is read once and not at every call.

The workflow asks for the digests of a study's files each time it is parsed, also in every cluster job. A digest is
remembered by path, size, modification and change time in a small JSON file; deleting that file only costs time.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qpipe.files import write_text

DIGEST_CACHE = Path(".qpipe/digests.json")
"""Where digests are remembered, relative to the working folder (the workflow's)."""

_RACY_SECONDS = 2.0  # a file this young may change again without a new timestamp, so its digest is not remembered


class FileDigests:
    """SHA-256 of files, remembered by (path, size, modification and change time) across processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new: dict[str, list[Any]] = {}
        self.known = self._load()

    def __call__(self, files: Sequence[Path]) -> list[list[Any]]:
        """Return `[size in bytes, sha256]` of each file, in order; unknown files are read, several at a time."""
        names = [str(path.resolve()) for path in files]
        stats = [path.stat() for path in files]
        stamps = [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats]
        stale = [i for i, name in enumerate(names) if self.known.get(name, [])[:3] != stamps[i]]
        with ThreadPoolExecutor(max_workers=max(1, min(8, len(stale)))) as pool:
            digests = dict(zip(stale, pool.map(_sha256, (files[i] for i in stale)), strict=True))
        for i in stale:
            self.known[names[i]] = [*stamps[i], digests[i]]
            if time.time() - stats[i].st_mtime > _RACY_SECONDS:
                self.new[names[i]] = self.known[names[i]]
        return [[stat.st_size, self.known[name][3]] for name, stat in zip(names, stats, strict=True)]

    def save(self) -> None:
        """Write what was learned, atomically. A place that cannot be written only costs time at the next call."""
        if not self.new:
            return
        with contextlib.suppress(OSError):
            merged = {**self._load(), **self.new}  # another process may have written meanwhile
            write_text(self.path, json.dumps(merged))

    def _load(self) -> dict[str, list[Any]]:
        try:
            loaded = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent or damaged: digests are computed again
            return {}
        return (
            {k: v for k, v in loaded.items() if isinstance(v, list) and len(v) == 4} if isinstance(loaded, dict) else {}
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Reading what figures and report are made of; every file's digest is kept, and every defect named."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe.errors import QpipeError
from qpipe.report.subject import Capacity, capacities_from


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file (errors: it cannot be read)."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise QpipeError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file (errors: it cannot be read, it is not JSON)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QpipeError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise QpipeError(f"{path}: not JSON ({error})") from error


def read_capacities(paths: Iterable[Path]) -> dict[str, Capacity]:
    """Return capacities by representation from files of `qpipe capacity --json` (errors: all defective files)."""
    entries: list[Mapping[str, Any]] = []
    problems: list[str] = []
    for path in paths:
        content = read_json(path)
        if isinstance(content, list) and all(isinstance(e, dict) and "representation" in e for e in content):
            entries += content
        else:
            problems.append(f"{path}: not a list of capacities; write it with qpipe capacity REPRESENTATION --json")
    if problems:
        raise QpipeError(problems)
    return capacities_from(entries)


def inside(paths: Sequence[Path], name: str) -> list[Path]:
    """Return files: each path itself, or the file `name` in it when it is a folder."""
    return [path / name if path.is_dir() else path for path in paths]

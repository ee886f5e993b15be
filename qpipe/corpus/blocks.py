"""Blocks of raw text, and the documents inside one.

The reading process does as little as possible: it decompresses, cuts at a separator, and counts lines. A block is what
it hands to a worker: some hundred kilobytes that hold whole documents. The worker decodes and parses them here, so
that this work too runs on all cores, and every complaint can name file and line.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from qpipe.errors import QpipeError, nearest


@dataclass(frozen=True)
class Block:
    """A few whole documents in their raw form.

    Attributes
    ----------
    kind
        `jsonl`: bytes, one JSON object a line; `txt`: bytes, documents between separators; `texts`: strings already
        (a list, or an Arrow array of strings).
    name
        File or data set, for messages.
    first
        Line (jsonl, txt) or row (texts) where the block begins, counted from 1.
    field
        Key or column that holds the text, for jsonl and for messages.
    separator
        What stands between documents of a txt block; empty when the block is one document.
    position
        How far the source has been read when this block ends, in its own unit of progress.
    """

    kind: Literal["jsonl", "txt", "texts"]
    name: str
    first: int
    data: Any
    field: str = ""
    separator: bytes = b""
    position: int = 0

    @property
    def size(self) -> int:
        """Approximate memory of the data (bytes)."""
        if self.kind == "texts":
            return getattr(self.data, "nbytes", 0) or sum(map(len, self.data))
        return len(self.data)


def documents(block: Block) -> Iterator[str]:
    """Yield the texts of the documents in a block; documents of white space only are left out.

    Raises
    ------
    QpipeError
        Undecodable bytes, invalid JSON, a missing or non-text field; the message names file and line.
    """
    parse: dict[str, Callable[[Block], Iterator[str]]] = {"jsonl": _jsonl, "txt": _txt, "texts": _texts}
    return (text for text in parse[block.kind](block) if not text.isspace() and text)


def document_hash(text: str) -> int:
    """Return 64 bits of BLAKE2b of the text with every run of white space taken as one space.

    The same number decides on which side of the train/validation split a document falls and whether it was seen
    before, so two documents that differ in white space only can never be on both sides.
    """
    return int.from_bytes(blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def _jsonl(block: Block) -> Iterator[str]:
    for number, line in enumerate(block.data.split(b"\n"), start=block.first):
        if not line or line.isspace():
            continue
        where = f"{block.name}, line {number}"
        decoded = _decode(line, block.name, number)
        try:
            record = json.loads(decoded)
        except ValueError as error:
            raise QpipeError(f"{where}: not JSON ({error}); .jsonl files hold one JSON object a line") from None
        if not isinstance(record, dict):
            raise QpipeError(
                f"{where}: a JSON {type(record).__name__} where an object with '{block.field}' is expected"
            )
        if block.field not in record:
            raise QpipeError(missing_field(where, block.field, list(record)))
        yield _text(record[block.field], where, block.field)


def _txt(block: Block) -> Iterator[str]:
    parts = block.data.split(block.separator) if block.separator else [block.data]
    line = block.first
    for part in parts:
        yield _decode(part, block.name, line)
        line += part.count(b"\n") + block.separator.count(b"\n")


def _texts(block: Block) -> Iterator[str]:
    values = block.data if isinstance(block.data, list) else block.data.to_pylist()
    for number, value in enumerate(values, start=block.first):
        yield _text(value, f"{block.name}, row {number}", block.field)


def missing_field(where: str, field: str, found: list[str]) -> str:
    """Return the message for a record without the text field."""
    listed = ", ".join(sorted(map(str, found))[:12]) or "nothing"
    return f"{where}: no field '{field}'{nearest(field, found)}; found {listed}; set corpus.text_field"


def _text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise QpipeError(f"{where}: field '{field}' holds {type(value).__name__} where text is expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(value[error.start]):04X} at character {error.start + 1}"
        raise QpipeError(
            f"{where}: field '{field}' holds half of a surrogate pair ({found}); repair the file"
        ) from None
    return value


def _decode(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")  # a byte order mark may open a file
    except UnicodeDecodeError as error:
        before = data[: error.start]
        number, column = line + before.count(b"\n"), error.start - (before.rfind(b"\n") + 1) + 1
        raise QpipeError(
            f"{name}, line {number}, byte {column}: 0x{data[error.start]:02x} is not UTF-8 ({error.reason}); "
            "convert the file to UTF-8"
        ) from None

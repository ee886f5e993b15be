"""Local files, read as a stream of blocks: .txt and .jsonl (plain, gzip, zstandard) and Parquet.

Memory stays bounded by the block size and the longest document, whatever the size of a file. A compressed file that
ends early is an error, never a short corpus: both decompressors are driven by hand to see that their last frame ended.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from qpipe.corpus.blocks import Block, missing_field
from qpipe.corpus_config import FilesCorpus, file_format
from qpipe.errors import QpipeError

BLOCK_BYTES = 1 << 19
"""Blocks hold about this much text: large enough to hide the cost of handing it over, small enough to balance cores."""

MAX_DOCUMENT_BYTES = 1 << 28
"""The longest document that is read (bytes); a longer one is nearly always a missing separator."""

_READ_BYTES = 1 << 17
_PARQUET_ROWS = 128


class _Damaged(Exception):
    """A compressed stream is broken or ends early."""


def file_blocks(path: Path, corpus: FilesCorpus) -> Iterator[Block]:
    """Yield the blocks of one file in order; `Block.position` counts bytes of the file on disk.

    Raises
    ------
    QpipeError
        Truncated or damaged files, over-long documents, missing columns; the message names file and line.
    """
    kind, compression = file_format(path)
    if kind == "parquet":
        yield from _parquet_blocks(path, corpus.text_field)
        return
    if kind == "jsonl":
        yield from _byte_blocks(path, compression, b"\n", Block("jsonl", str(path), 1, b"", field=corpus.text_field))
        return
    separator = (corpus.separator or "").encode()
    yield from _byte_blocks(path, compression, separator, Block("txt", str(path), 1, b"", separator=separator))


def _byte_blocks(path: Path, compression: str, separator: bytes, like: Block) -> Iterator[Block]:
    """Cut a byte stream after separators into blocks of at least `BLOCK_BYTES`; without separator, into one block."""
    buffer, line, position, searched = bytearray(), 1, 0, 0
    chunks = _chunks(path, compression)
    try:
        for data, position in _unix_newlines(chunks) if like.kind == "txt" else chunks:
            buffer += data
            if len(buffer) < BLOCK_BYTES:
                continue
            cut = _last_cut(buffer, separator, searched)
            searched = len(buffer)
            if not cut:
                _check_length(len(buffer), path, line)
                continue
            # The separator at the cut is left out: it belongs to neither side.
            yield _block(like, line, bytes(buffer[: cut - len(separator)]), position)
            line += buffer.count(b"\n", 0, cut)
            del buffer[:cut]
            searched = 0
    except _Damaged as error:
        raise QpipeError(
            f"{path}: {error} after line {line + buffer.count(10)}; copy or download the file again"
        ) from None
    yield _block(like, line, bytes(buffer), position)


def _last_cut(buffer: bytearray, separator: bytes, searched: int) -> int:
    """Return the place after the last separator, 0 for none; before `searched` there is none.

    Separators are matched from the left, as `str.split` does: a search from the right would cut `\\n\\n\\n` elsewhere.
    """
    if not separator:
        return 0
    start = max(0, searched - len(separator) + 1)
    parts = bytes(buffer[start:]).split(separator)
    return len(buffer) - len(parts[-1]) if len(parts) > 1 else 0


def _block(like: Block, line: int, data: bytes, position: int) -> Block:
    return Block(like.kind, like.name, line, data, like.field, like.separator, position)


def _check_length(size: int, path: Path, line: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise QpipeError(
            f"{path}, line {line}: a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB; if the file holds several "
            "documents, say what separates them (corpus.separator for .txt, one line each in .jsonl)"
        )


def _chunks(path: Path, compression: str) -> Iterator[tuple[bytes, int]]:
    """Yield `(data, bytes of the file read so far)`."""
    with path.open("rb") as file:
        if compression == "gz":
            yield from _decompressed(file, lambda: zlib.decompressobj(wbits=31))
        elif compression == "zst":
            yield from _decompressed(file, lambda: zstandard.ZstdDecompressor().decompressobj())
        else:
            position = 0
            while data := file.read(_READ_BYTES):
                position += len(data)
                yield data, position


def _decompressed(file: BinaryIO, start_frame: Callable[[], Any]) -> Iterator[tuple[bytes, int]]:
    """Decompress a file of one or more frames (gzip members); the last one must be complete."""
    frame, position = None, 0
    while raw := file.read(_READ_BYTES):
        position += len(raw)
        while raw:
            frame = frame or start_frame()
            try:
                data = frame.decompress(raw)
            except (zlib.error, zstandard.ZstdError) as error:
                raise _Damaged(f"damaged compressed data ({error})") from None
            if data:
                yield data, position
            raw = frame.unused_data.lstrip(b"\0") if frame.eof else b""  # gzip files may be padded with zeros
            frame = None if frame.eof else frame
    if frame is not None:
        raise _Damaged("the compressed data ends too early (truncated file)")


def _unix_newlines(chunks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Turn CR LF into LF, also where the pair is cut by a chunk border."""
    held, position = b"", 0
    for data, position in chunks:
        joined = held + data
        held = b"\r" if joined.endswith(b"\r") else b""
        yield joined[: len(joined) - len(held)].replace(b"\r\n", b"\n"), position
    if held:
        yield held, position


def _parquet_blocks(path: Path, field: str) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise QpipeError(missing_field(str(path), field, schema.names))
            _check_text_column(path, schema.field(field))
            row, size = 1, path.stat().st_size
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                column = batch.column(0).cast(pa.large_string())
                position = size * (row - 1 + len(column)) // max(1, file.metadata.num_rows)
                yield Block("texts", str(path), row, column, field=field, position=position)
                row += len(column)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise QpipeError(f"{path}: not a readable Parquet file ({error}); copy or download it again") from None


def _check_text_column(path: Path, column: Any) -> None:
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise QpipeError(f"{path}: column '{column.name}' holds {column.type} where text is expected")

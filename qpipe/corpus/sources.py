"""The three sources of text, each as streams of blocks.

A source opens to one or more streams (a file each; a hub data set or the documentation strings are one stream) that can
be read more than once: the training of a tokenizer reads a share of each stream, the tokenization all of them in order.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qpipe.corpus.blocks import Block, missing_field
from qpipe.corpus.docstrings import gather
from qpipe.corpus.files import BLOCK_BYTES, file_blocks
from qpipe.corpus_config import CorpusConfig, DocstringsCorpus, FilesCorpus, HuggingFaceCorpus, ordered_files
from qpipe.errors import QpipeError


@dataclass(frozen=True)
class Stream:
    """One readable part of a corpus: `open` starts it from the beginning, `size` is its last position if known."""

    open: Callable[[], Iterator[Block]]
    size: int | None


def open_streams(corpus: CorpusConfig, base: Path, digest_cache: Path) -> list[Stream]:
    """Open the source that `corpus` describes.

    Raises
    ------
    QpipeError
        Missing files or packages, or a data set that cannot be opened.
    """
    if isinstance(corpus, DocstringsCorpus):
        texts = list(gather(corpus.packages))  # some twenty megabytes
        return [Stream(partial(_text_blocks, "documentation strings", texts, ""), sum(map(len, texts)))]
    if isinstance(corpus, FilesCorpus):
        files = ordered_files(corpus, base, digest_cache)
        return [Stream(partial(file_blocks, path, corpus), path.stat().st_size) for path in files]
    return [Stream(partial(_dataset_blocks, corpus, base), None)]


def all_blocks(streams: Iterable[Stream]) -> Iterator[Block]:
    """Yield the blocks of all streams in order; positions run on from stream to stream."""
    before = 0
    for stream in streams:
        position = 0
        for block in stream.open():
            position = block.position
            yield replace(block, position=before + position)
        before += position if stream.size is None else stream.size


def _text_blocks(name: str, rows: Iterable[Any], field: str) -> Iterator[Block]:
    """Pack single texts into blocks; positions count characters."""
    batch: list[Any] = []
    first, size, position = 1, 0, 0
    for row in rows:
        batch.append(row)
        size += len(row) if isinstance(row, str) else 0
        if size >= BLOCK_BYTES:
            position += size
            yield Block("texts", name, first, batch, field, position=position)
            first, size, batch = first + len(batch), 0, []
    if batch:
        yield Block("texts", name, first, batch, field, position=position + size)


def _dataset_blocks(corpus: HuggingFaceCorpus, base: Path) -> Iterator[Block]:
    name = " ".join(filter(None, ("data set", corpus.dataset, corpus.config, corpus.split)))
    return _text_blocks(name, _dataset_rows(corpus, base, name), corpus.text_field)


def _dataset_rows(corpus: HuggingFaceCorpus, base: Path, name: str) -> Iterator[Any]:
    """Yield the text column of a streamed data set, row by row."""
    rows = _open_dataset(corpus, base, name)
    if rows.features is not None:
        if corpus.text_field not in rows.features:
            raise QpipeError(missing_field(name, corpus.text_field, list(rows.features)))
        rows = rows.select_columns([corpus.text_field])  # columnar files then skip the others
    for number, row in enumerate(rows, start=1):
        if corpus.text_field not in row:
            raise QpipeError(missing_field(f"{name}, row {number}", corpus.text_field, list(row)))
        yield row[corpus.text_field]


def _open_dataset(corpus: HuggingFaceCorpus, base: Path, name: str) -> Any:
    import datasets

    local = base / Path(corpus.dataset).expanduser()
    try:
        return datasets.load_dataset(
            str(local) if local.is_dir() else corpus.dataset,
            corpus.config,
            split=corpus.split,
            revision=corpus.revision,
            streaming=True,
        )
    except (OSError, ValueError) as error:  # not found, gated, no network; unknown configuration or split
        raise QpipeError(
            f"{name} cannot be opened ({' '.join(str(error).split())[:300]}); check corpus.dataset, config, split and "
            "revision, the network and, for gated data, HF_TOKEN"
        ) from None

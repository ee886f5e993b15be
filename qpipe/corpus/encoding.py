"""What a worker process does: a block of raw text in, token ids out.

Each worker holds one single-threaded tokenizer, so as many workers as cores keep all cores busy without the library's
own threads; decoding, JSON, hashing and the conversion to arrays run in parallel too. A worker watches the process that
started it and leaves when that one is gone, however it died.
"""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qpipe.corpus.blocks import Block, document_hash, documents
from qpipe.corpus.vocabulary import PIECE_CHARACTERS, Vocabulary, open_tokenizer, pieces
from qpipe.corpus.words import WordEncoder


@dataclass(frozen=True)
class EncodedBlock:
    """The documents of one block, in order.

    Attributes
    ----------
    tokens
        Ids of all documents, each followed by the end-of-document token; shape (tokens,).
    lengths, text_bytes, hashes
        Tokens of each document (with the end token), bytes of its UTF-8 text, and its hash; shape (documents,).
    position
        Progress of the source after this block.
    """

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    position: int


class Encoder:
    """Turns blocks into token ids."""

    def __init__(self, vocabulary: Vocabulary, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.end = np.array([vocabulary.eos], dtype).tobytes()
        self.words = WordEncoder(open_tokenizer(vocabulary.json), dtype)

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode the documents of a block."""
        texts = list(documents(block))
        parts: list[bytes] = []
        lengths = np.ones(len(texts), np.int64)  # the end token
        for batch in _batches(texts):
            encoded = self.words([piece for _, piece, _ in batch])
            for (index, _, last), ids in zip(batch, encoded, strict=True):
                lengths[index] += len(ids) // self.dtype.itemsize
                parts += [ids, self.end] if last else [ids]
        return EncodedBlock(
            tokens=np.frombuffer(b"".join(parts), self.dtype),
            lengths=lengths,
            text_bytes=np.array([len(text.encode()) for text in texts], np.int64),
            hashes=np.array([document_hash(text) for text in texts], np.uint64),
            position=block.position,
        )


def _batches(texts: list[str]) -> Iterator[list[tuple[int, str, bool]]]:
    """Yield lists of `(document, piece, is its last piece)`; a list holds about `PIECE_CHARACTERS`, to bound memory."""
    batch: list[tuple[int, str, bool]] = []
    size = 0
    for index, text in enumerate(texts):
        cut = list(pieces(text))
        for number, piece in enumerate(cut):
            if size + len(piece) > PIECE_CHARACTERS and batch:
                yield batch
                batch, size = [], 0
            batch.append((index, piece, number == len(cut) - 1))
            size += len(piece)
    if batch:
        yield batch


_encoder: Encoder


def start_worker(vocabulary: Vocabulary, dtype: np.dtype[Any]) -> None:
    """Prepare this process for `encode`; the process pool calls it once per worker."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    _encoder = Encoder(vocabulary, dtype)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def encode(block: Block) -> EncodedBlock:
    """Encode one block in a worker."""
    return _encoder(block)


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()  # returns when the parent is gone, also after kill -9
        os._exit(1)

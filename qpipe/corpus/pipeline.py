"""From a corpus to a token store, on all cores, in bounded memory.

One process reads and writes, the others tokenize:

    reader --blocks--> workers --ids--> duplicates dropped, split --> shards

Blocks come back in the order they were read, so the store does not depend on the number of workers. Only a bounded
window of blocks is under way at any time; beyond that the memory grows by 8 bytes per kept document, for finding
duplicates.

What is kept: a document whose text, up to white space, was not met before. The first one stays, later ones are dropped
from both splits. A document is held out when its 64-bit hash, as a number in [0, 1), is below the validation
fraction. As equal texts have equal hashes, no text can be in both splits, whatever else is added or reordered.
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from qpipe.corpus import writer
from qpipe.corpus.blocks import Block, document_hash, documents
from qpipe.corpus.encoding import EncodedBlock, encode, start_worker
from qpipe.corpus.seen import SeenHashes
from qpipe.corpus.sources import Stream, all_blocks, open_streams
from qpipe.corpus.store import FORMAT, FORMAT_VERSION, SPLITS, TokenStore, content_digest, token_dtype
from qpipe.corpus.vocabulary import TRAINING_BYTES, Vocabulary, make_vocabulary
from qpipe.corpus_config import DIGEST_CACHE, CorpusConfig, TokenizerConfig, corpus_identity
from qpipe.errors import QpipeError

_WINDOW_BLOCKS = 4  # per worker: enough that none ever waits
_WINDOW_BYTES = 1 << 28

SPLIT_RULE = "validation if the 64-bit BLAKE2b of the white-space-normalized text, / 2^64, is below the fraction"


def tokenize_corpus(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    out: Path,
    *,
    base: Path,
    workers: int | None = None,
    progress: bool = True,
    digest_cache: Path = DIGEST_CACHE,
) -> TokenStore:
    """Write the token store of a corpus into folder `out` and open it.

    Parameters
    ----------
    base
        Folder that relative paths start from.
    workers
        Tokenizing processes; default: one per core this process may use. The result does not depend on it.
    progress
        Show a progress bar on stderr.
    digest_cache
        Where digests of local files are remembered; see `qpipe.corpus_config.corpus_identity`.

    Raises
    ------
    QpipeError
        Anything wrong with the text, the tokenizer or the folder. `out` then is as it was before.
    """
    identity = corpus_identity(corpus, tokenizer, base, digest_cache)
    with writer.partial_store(out) as partial:
        streams = open_streams(corpus, base, digest_cache)
        texts = _training_texts(streams, corpus, progress)
        vocabulary = make_vocabulary(tokenizer, base, texts)
        dtype = token_dtype(tokenizer.vocab_size)
        sink = _Sink.create(corpus, partial)
        total = _sum(stream.size for stream in streams)
        with (
            closing(_encode_all(all_blocks(streams), vocabulary, dtype, workers or _cores())) as encoded,
            _bar("tokenizing", total, progress) as bar,
        ):
            for block in encoded:
                full = sink.add(block)
                bar.update(block.position - bar.n)
                bar.set_postfix(tokens=f"{sink.tokens:,}", refresh=False)
                if full:
                    break
        sink.finish()
        manifest = _manifest(identity, vocabulary, tokenizer.vocab_size, sink)
        writer.publish(partial, out, vocabulary.json, manifest)
    return TokenStore.open(out)


def _encode_all(
    blocks: Iterable[Block], vocabulary: Vocabulary, dtype: np.dtype[Any], workers: int
) -> Generator[EncodedBlock]:
    """Encode blocks in worker processes and yield them in order, with a bounded number under way."""
    waiting: deque[tuple[int, Future[EncodedBlock]]] = deque()
    under_way = 0
    # spawn, not fork: this process may hold threads (of the tokenizer library, of Arrow) that a fork would break
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (vocabulary, dtype))
    try:
        for block in blocks:
            while waiting and (len(waiting) >= _WINDOW_BLOCKS * workers or under_way + block.size > _WINDOW_BYTES):
                size, future = waiting.popleft()
                yield future.result()
                under_way -= size
            waiting.append((block.size, pool.submit(encode, block)))
            under_way += block.size
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Sink:
    """Drops duplicates, applies the caps, and deals documents to the two splits."""

    writers: dict[str, writer.SplitWriter]
    threshold: np.uint64
    fraction: float
    max_bytes: int | None
    max_documents: int | None
    seen: SeenHashes = field(default_factory=SeenHashes)
    duplicates: int = 0
    duplicate_bytes: int = 0

    @classmethod
    def create(cls, corpus: CorpusConfig, folder: Path) -> "_Sink":
        return cls(
            writers={name: writer.SplitWriter(folder, name, writer.SHARD_TOKENS) for name in SPLITS},
            threshold=split_threshold(corpus.validation_fraction),
            fraction=corpus.validation_fraction,
            max_bytes=corpus.max_bytes,
            max_documents=corpus.max_documents,
        )

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.writers.values())

    def add(self, block: EncodedBlock) -> bool:
        """Take a block; return whether a cap is reached."""
        fresh = self.seen.add(block.hashes)
        end = self._end(fresh, block.text_bytes)
        kept = fresh & (np.arange(len(fresh)) < end)
        dropped = ~fresh[:end]
        self.duplicates += int(dropped.sum())
        self.duplicate_bytes += int(block.text_bytes[:end][dropped].sum())
        held_out = block.hashes < self.threshold
        for name, chosen in (("train", kept & ~held_out), ("validation", kept & held_out)):
            tokens = writer.merge_tokens(block.tokens, block.lengths, chosen)
            self.writers[name].append(tokens, int(chosen.sum()), int(block.text_bytes[chosen].sum()))
        return end < len(fresh) or self.max_documents == sum(split.documents for split in self.writers.values())

    def _end(self, fresh: NDArray[np.bool_], text_bytes: NDArray[np.int64]) -> int:
        """Return how many of a block's documents lie before the first one that would exceed a cap."""
        ends = [len(fresh)]
        for cap, sizes, before in (
            (self.max_bytes, text_bytes * fresh, sum(split.text_bytes for split in self.writers.values())),
            (self.max_documents, fresh, sum(split.documents for split in self.writers.values())),
        ):
            if cap is not None:
                ends.append(int(np.searchsorted(np.cumsum(sizes, dtype=np.int64), cap - before, side="right")))
        return min(ends)

    def finish(self) -> None:
        """Complete the shards; both splits must hold something."""
        for split in self.writers.values():
            split.close()
        documents = {name: split.documents for name, split in self.writers.items()}
        total = sum(documents.values())
        if not total:
            raise QpipeError("the corpus holds no text: every document is empty or beyond the caps; check corpus")
        for name, remedy in (("validation", "raise"), ("train", "lower")):
            if not documents[name]:
                raise QpipeError(
                    f"none of the corpus's {total:,} documents fell into the {name} split at validation_fraction "
                    f"{self.fraction:g}; {remedy} corpus.validation_fraction, add documents, or, if one .txt file "
                    "holds many, say what separates them with corpus.separator"
                )


def split_threshold(fraction: float) -> np.uint64:
    """Return the hash below which a document is held out for validation."""
    return np.uint64(int(fraction * 2**64))


def _training_texts(streams: list[Stream], corpus: CorpusConfig, progress: bool) -> Iterator[str]:
    """Yield training documents for a tokenizer, an equal share of each stream; held-out documents never take part."""
    budget = min(TRAINING_BYTES, corpus.max_bytes or TRAINING_BYTES)
    capped = corpus.max_bytes is not None or corpus.max_documents is not None
    share = budget if capped else max(1, budget // len(streams))  # a capped corpus is read from its beginning only
    threshold = int(split_threshold(corpus.validation_fraction))
    used = number = 0
    with _bar("reading for the tokenizer", budget, progress) as bar:
        for stream in streams:
            stop = min(budget, used + share)
            for text in (text for block in stream.open() for text in documents(block)):
                if used >= stop or number == corpus.max_documents:
                    break
                if document_hash(text) >= threshold:
                    number += 1
                    used += len(text.encode())
                    bar.update(used - bar.n)
                    yield text


def _manifest(identity: dict[str, Any], vocabulary: Vocabulary, vocab_size: int, sink: _Sink) -> dict[str, Any]:
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "identity": identity,
        "dtype": token_dtype(vocab_size).str,
        "vocab_size": vocab_size,
        "eos": vocabulary.eos,
        "tokenizer": {"sha256": vocabulary.digest, "ids": vocabulary.size},
        "splits": {name: split.describe() for name, split in sink.writers.items()},
        "split_rule": SPLIT_RULE,
        "dropped_duplicates": {"documents": sink.duplicates, "text_bytes": sink.duplicate_bytes},
        "written_with": {name: version(name) for name in ("tokenizers", "numpy")},
    }
    return {**manifest, "digest": content_digest(manifest)}


def _bar(what: str, total: int | None, progress: bool) -> "tqdm[Any]":
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not progress, mininterval=0.5)


def _sum(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

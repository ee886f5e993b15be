"""Batches as a pure function of (seed, step) and the token store.

The training split is cut into windows of context + 1 tokens that do not overlap: each yields `context` inputs and as
many targets. One epoch visits every window once in a random order (sampling without replacement); further epochs use
other orders. The order is computed, not stored: position p of epoch e is sent to its window by a keyed permutation of
0 ... windows - 1, so any step's batch is found at once, however large the corpus and wherever training resumes.

Neither the representation nor the number of devices enters: runs that share corpus, context, batch and seed see the
same tokens in the same order, and each of R processes reads its slice of the same global batch.
"""

import functools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpipe.corpus.store import TokenSplit
from qpipe.errors import QpipeError

Words = NDArray[np.uint64]

_ROUNDS = 12
_PLACES_AT_ONCE = 8192
"""Places of the order that are worked out at a time, which takes some 8 ms."""

_PREFETCHED = 16
"""Batches read ahead: they last while the next places are worked out, even for steps of 1 ms."""


@dataclass(frozen=True)
class Batches:
    """The training batches of a run.

    Attributes
    ----------
    split
        Tokens to train on.
    context
        Inputs per sequence (tokens).
    size
        Sequences per optimizer step over all processes.
    seed
        Seed of the order.
    """

    split: TokenSplit
    context: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise QpipeError(
                f"the training split has {len(self.split):,} tokens, one sequence needs {self.context + 1:,}; "
                "tokenize a larger corpus"
            )

    @property
    def windows(self) -> int:
        """Sequences in one epoch (count)."""
        return len(self.split) // (self.context + 1)

    def epochs(self, steps: int) -> float:
        """Return how often `steps` steps go through the training split."""
        return steps * self.size / self.windows

    def order(self, step: int) -> NDArray[np.int64]:
        """Return the windows of a step, shape (size,)."""
        steps = max(1, _PLACES_AT_ONCE // self.size)
        return _orders(self.windows, self.size, self.seed, step - step % steps, steps)[step % steps]

    def read(self, step: int, rank: int = 0, processes: int = 1) -> NDArray[np.int32]:
        """Return the token ids of a step, shape (size / processes, context + 1), of one of several processes."""
        length = self.context + 1
        mine = self.order(step).reshape(processes, -1)[rank]
        tokens = np.empty((len(mine), length), np.int32)
        for row, window in zip(tokens, mine.tolist(), strict=True):
            row[:] = self.split.read(window * length, length)
        return tokens


@functools.lru_cache(maxsize=2)
def _orders(windows: int, size: int, seed: int, first: int, steps: int) -> NDArray[np.int64]:
    """Return the windows of `steps` steps from `first` on, shape (steps, size); many cost little more than one."""
    place = np.arange(first * size, (first + steps) * size, dtype=np.uint64)
    epoch, position = np.divmod(place, np.uint64(windows))
    # Mixed twice, (seed, epoch) pairs stay apart: seed + 1 in epoch 0 is not seed in epoch 1.
    key = mix(mix(np.full_like(epoch, seed)) + epoch)
    return permute(position, windows, key).astype(np.int64).reshape(steps, size)


def permute(position: Words, size: int, key: Words) -> Words:
    """Return a keyed permutation of 0 ... size - 1 at some positions.

    A Feistel network permutes the smallest square power of two that holds `size`; results beyond `size` are sent
    through again until they fall inside (cycle walking), which keeps it one-to-one.

    Parameters
    ----------
    position
        Places, each below `size`, shape (n,).
    size
        Number of elements that are permuted.
    key
        Key per position; equal keys belong to one permutation, shape (n,).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    result = _feistel(position, half_bits, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, key[outside])
    return result


def _feistel(value: Words, half_bits: int, key: Words) -> Words:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (mix(right + mix(key + np.uint64(number))) & mask)
    return (left << shift) | right


def mix(words: Words) -> Words:
    """Scramble 64-bit words, one-to-one (the output function of SplitMix64; Steele et al., OOPSLA 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass
class BatchStream:
    """Iterates over the batches of steps `start` ... `stop` - 1 as tensors, the way a Lightning loader does.

    With `prefetch` a thread reads ahead into pinned memory, so that a GPU never waits for the disk; without, batches
    are read when asked for (a CPU has better things to do than to feed itself).

    Attributes
    ----------
    waited
        Time spent waiting for batches that were not there when asked for (seconds).
    """

    batches: Batches
    start: int
    stop: int
    rank: int = 0
    processes: int = 1
    prefetch: bool = False
    waited: float = field(default=0.0, init=False)

    def __iter__(self) -> Iterator[Tensor]:
        if self.prefetch:
            yield from self._ahead()
            return
        for step in range(self.start, self.stop):
            begin = time.perf_counter()
            batch = self._tensor(step)
            self.waited += time.perf_counter() - begin
            yield batch

    def _tensor(self, step: int) -> Tensor:
        tokens = torch.from_numpy(self.batches.read(step, self.rank, self.processes))
        return tokens.pin_memory() if self.prefetch else tokens

    def _ahead(self) -> Iterator[Tensor]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
            pending: deque[Future[Tensor]] = deque()
            for step in range(self.start, self.stop):
                pending.append(reader.submit(self._tensor, step))
                if len(pending) > _PREFETCHED:
                    yield self._arrived(pending.popleft())
            while pending:
                yield self._arrived(pending.popleft())

    def _arrived(self, batch: Future[Tensor]) -> Tensor:
        if batch.done():
            return batch.result()
        begin = time.perf_counter()
        tokens = batch.result()
        self.waited += time.perf_counter() - begin
        return tokens

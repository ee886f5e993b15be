"""The validation loss: every token of the split exactly once, in a fixed order, summed in float64.

The split is cut into windows of `context` predictions that follow each other, each window reading its inputs from its
own start. The first token of the split has nothing before it, all others are predicted once. The last window starts
early enough to be full, and only the tokens that no window before it has counted are counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpipe.corpus.store import TokenSplit
from qpipe.errors import QpipeError
from qpipe.model import Decoder
from qpipe.train.seeds import seed_device


@dataclass(frozen=True)
class Windows:
    """Windows of a split.

    Attributes
    ----------
    starts
        First input token of each window, shape (n,).
    counted
        How many of the window's last predictions count (tokens), shape (n,).
    """

    starts: NDArray[np.int64]
    counted: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Predictions that count, over all windows."""
        return int(self.counted.sum())


def all_windows(tokens: int, context: int) -> Windows:
    """Return the windows that predict each of a split's tokens but the first exactly once (error: too short)."""
    if tokens < context + 1:
        raise QpipeError(
            f"the validation split has {tokens:,} tokens, one sequence needs {context + 1:,}; "
            "raise the corpus's validation_fraction or tokenize a larger corpus"
        )
    predictions = tokens - 1
    starts = np.arange(0, predictions, context)
    counted = np.minimum(context, predictions - starts)
    return Windows(np.minimum(starts, predictions - context), counted)


def some_windows(windows: Windows, count: int) -> Windows:
    """Return about `count` windows spread evenly over all of them."""
    chosen = np.unique(np.linspace(0, len(windows.starts) - 1, min(count, len(windows.starts))).round().astype(int))
    return Windows(windows.starts[chosen], windows.counted[chosen])


@dataclass(frozen=True)
class Validation:
    """A validation split and how it goes through a model.

    Attributes
    ----------
    split
        Held-out tokens.
    context
        Inputs per sequence (tokens).
    batch
        Sequences that go through the model together.
    precision
        `bf16` runs matmuls in bfloat16 on every device, as training does.
    seed
        Seed of the random numbers that a representation may draw.
    """

    split: TokenSplit
    context: int
    batch: int
    precision: str
    seed: int

    @property
    def windows(self) -> Windows:
        """All windows of the split."""
        return all_windows(len(self.split), self.context)

    @torch.no_grad()
    def loss(self, model: Decoder, windows: Windows, tick: Callable[[int, int], None] | None = None) -> float:
        """Return the mean loss over windows (nats/token); `tick(done, all)` is called after each batch."""
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        seed_device(device, self.seed)
        model.eval()
        batches = -(-len(windows.starts) // self.batch)
        for number in range(batches):
            inputs, targets, counts = self._batch(windows, number)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                losses = model.token_losses(inputs.to(device), targets.to(device))
            total += (losses.double() * counts.to(device)).sum()
            if tick:
                tick(number + 1, batches)
        model.train()
        return total.item() / windows.tokens

    def _batch(self, windows: Windows, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets and weights (0 or 1), each (batch, context).

        The last batch is filled up with its last window, uncounted: compiled models keep one shape.
        """
        chosen = np.arange(number * self.batch, (number + 1) * self.batch)
        real = chosen < len(windows.starts)
        chosen = np.minimum(chosen, len(windows.starts) - 1)
        rows = [self.split.read(int(windows.starts[index]), self.context + 1) for index in chosen]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        uncounted = self.context - np.where(real, windows.counted[chosen], 0)
        weights = torch.from_numpy((np.arange(self.context) >= uncounted[:, None]).astype(np.float64))
        return tokens[:, :-1], tokens[:, 1:], weights


def diverged(loss: float, vocab_size: int) -> bool:
    """Whether a loss is no result any more: not finite, or twice that of guessing uniformly among all tokens."""
    return not loss <= 2 * math.log(vocab_size)

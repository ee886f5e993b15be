"""Which tokens are used for what: calibration, selection and evaluation never meet.

Calibration and selection windows come from the training split of the token store, in a seeded random order without
overlap: first the selection windows (which of several quantizations is kept), then those of calibration round 1, 2, ...
Losses that are reported come from the validation split, which no decision has seen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.ptq.network import Network
from qpipe.train.validation import Validation, Windows, all_windows, some_windows

_SELECTION_TOKENS = 8192
_LONGEST = 2048
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}
_ACTIVATION_BYTES = 2**33
"""Memory for what a forward pass keeps for its backward pass."""


@dataclass(frozen=True)
class Text:
    """Windows of a token store for one network.

    Attributes
    ----------
    store
        Where tokens come from.
    context
        Tokens per sequence.
    starts
        First token of each window of the training split in the order of use, shape (n,).
    device
        Where batches go.
    batch
        Sequences that go through the network together.
    held_out
        Sequences for selection (count): the first of `starts`.
    """

    store: TokenStore
    context: int
    starts: np.ndarray
    device: torch.device
    batch: int
    held_out: int

    def calibration(self, round_: int, count: int) -> list[Tensor]:
        """Return the sequences of a round (from 0) in batches, each (at most `batch`, context)."""
        first = self.held_out + round_ * count
        rows = [self.store.train.read(int(s), self.context) for s in self.starts[first : first + count]]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64)).to(self.device)
        return list(tokens.split(self.batch))

    def selection(self, network: Network) -> float:
        """Return the loss on the selection windows (nats/token)."""
        chosen = self.starts[: self.held_out]
        windows = Windows(chosen, np.full(len(chosen), self.context))
        return self._validation(network, training_split=True).loss(network, windows)  # type: ignore[arg-type]

    def selection_batches(self) -> list[Tensor]:
        """Return the selection sequences in batches."""
        rows = [self.store.train.read(int(s), self.context) for s in self.starts[: self.held_out]]
        return list(torch.from_numpy(np.stack(rows).astype(np.int64)).to(self.device).split(self.batch))

    def evaluation_windows(self, tokens: int | None) -> Windows:
        """Return all windows of the validation split, or about `tokens` tokens of it, spread evenly."""
        windows = all_windows(len(self.store.validation), self.context)
        return windows if tokens is None else some_windows(windows, max(1, tokens // self.context))

    def evaluate(self, network: Network, windows: Windows) -> float:
        """Return the loss on windows of the validation split (nats/token)."""
        return self._validation(network, training_split=False).loss(network, windows)  # type: ignore[arg-type]

    def _validation(self, network: Network, training_split: bool) -> Validation:
        return Validation(
            split=self.store.train if training_split else self.store.validation,
            context=self.context,
            batch=self.batch,
            precision="bf16" if network.bf16 and self.device.type == "cuda" else "fp32",
            seed=0,
        )


def choose_text(store: TokenStore, network: Network, calibration: int, seed: int) -> Text:
    """Plan the use of a token store.

    Parameters
    ----------
    store
        Tokens of the network's own vocabulary.
    network
        Decides context and batch.
    calibration
        Calibration sequences over all rounds (count).
    seed
        Of the choice of windows.

    Raises
    ------
    QpipeError
        Another vocabulary, or a text too short: both at once.
    """
    context = min(network.context, _LONGEST)
    windows = (len(store.train) - 1) // context
    held_out = min(64, max(4, _SELECTION_TOKENS // context))
    needed = held_out + calibration
    problems = []
    if store.vocab_size > network.vocab_size:
        problems.append(
            f"the token store has ids up to {store.vocab_size:,}, the model's embedding {network.vocab_size:,} rows; "
            "tokenize the text with the model's own tokenizer"
        )
    if windows < needed:
        problems.append(
            f"calibration text too short: {needed} sequences of {context} tokens are needed ({held_out} for "
            f"selection, {calibration} for calibration), the training split holds {windows}; "
            "lower `sequences` or `iterations`, or tokenize more text"
        )
    if len(store.validation) < context + 1:
        problems.append(
            f"the validation split has {len(store.validation):,} tokens, one sequence needs {context + 1:,}"
        )
    if problems:
        raise QpipeError(problems)
    order = np.random.default_rng(seed).permutation(windows)[:needed]
    batch = max(1, tokens_at_once(network) // context)
    return Text(store, context, order * context, network.device, batch, held_out)


def activation_bytes(network: Network) -> int:
    """Return about what a token leaves behind for a backward pass: inputs and outputs of all block linears (bytes)."""
    return sum(4 * (linear.in_features + linear.out_features) for linear in network.linears().values())


def tokens_at_once(network: Network) -> int:
    """Return how many tokens go through a network together: enough to keep the device busy, few enough to fit."""
    most = _TOKENS_AT_ONCE.get(network.device.type, _TOKENS_AT_ONCE["cuda"])
    return min(most, _ACTIVATION_BYTES // activation_bytes(network))

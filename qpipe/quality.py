"""Quality beyond the validation loss: log-probabilities of any text under any model, and the perplexity made of them.

A model is a run's output folder or a folder of a Hugging Face Llama-type model. A run's tokenizer lies in its token
store, a Hugging Face model's beside its weights. Perplexities of two models compare only if they count the same units:
tokens of one tokenizer, or else bits per byte, which count no tokens at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qpipe.corpus.store import MANIFEST, TOKENIZER
from qpipe.errors import QpipeError
from qpipe.huggingface import load_decoder, read_shape
from qpipe.memory import sequences_at_once
from qpipe.model import Decoder
from qpipe.train.evaluate import load_model
from qpipe.train.results import RECORD
from qpipe.train.validation import all_windows

_AT_ONCE = 16


@dataclass(frozen=True)
class Scorer:
    """A model with its tokenizer.

    Attributes
    ----------
    model
        On the device where it is to run, in evaluation mode.
    tokenizer
        Of the text that it was trained on.
    name
        Run id, or the folder's name.
    bf16
        Whether products run in bfloat16.
    """

    model: Decoder
    tokenizer: Any
    name: str
    bf16: bool

    @property
    def context(self) -> int:
        """Longest sequence (tokens)."""
        return self.model.shape.context

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without any that mark its ends."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    @torch.no_grad()
    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return each token's log-probability (nats) given those before it in its sequence.

        Parameters
        ----------
        sequences
            At most `context` + 1 tokens each; a sequence of k tokens gives k - 1 numbers.
        """
        device = next(self.model.parameters()).device
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))  # alike lengths waste no padding
        found: dict[int, Tensor] = {}
        size = sequences_at_once(self.model.shape, _AT_ONCE)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows = [torch.tensor(sequences[i]) for i in chosen]
            # Padding comes after the text, where a causal model cannot see it.
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                losses = self.model.token_losses(tokens[:, :-1], tokens[:, 1:])
            found |= {i: -row[: len(sequences[i]) - 1].cpu() for i, row in zip(chosen, losses, strict=True)}
        return [found[i] for i in range(len(sequences))]

    @torch.no_grad()
    def greedy(self, sequence: Sequence[int], count: int) -> bool:
        """Whether each of the last `count` tokens is the likeliest one given those before it."""
        device = next(self.model.parameters()).device
        tokens = torch.tensor(sequence, device=device)[None]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            likeliest = self.model(tokens[:, :-1]).argmax(-1)
        return bool((likeliest[0, -count:] == tokens[0, -count:]).all())


def load_scorer(folder: Path, tokens: Path | None = None, context: int | None = None) -> Scorer:
    """Load a model with its tokenizer.

    Parameters
    ----------
    folder
        Output folder of a run, or a Hugging Face model.
    tokens
        A run's token store; not needed for Hugging Face models.
    context
        Sequence length for a Hugging Face model (tokens), 2048 or its longest by default; a run has its own.

    Raises
    ------
    QpipeError
        No model, no tokenizer, or one with more tokens than the model's embedding has rows.
    """
    if (folder / RECORD).is_file():
        model, record = load_model(folder)
        if tokens is None:
            raise QpipeError(f"{folder} is a run, whose tokenizer lies in its token store: name that with --tokens")
        place, name = (tokens.parent if tokens.name == MANIFEST else tokens), record.id
        bf16 = record.run.training.precision == "bf16"
    else:
        shape = read_shape(folder)
        model = load_decoder(folder, read_shape(folder, context or min(shape.context, 2048)))
        place, name, bf16 = folder, folder.resolve().name, True
    tokenizer = _read_tokenizer(place / TOKENIZER)
    if tokenizer.get_vocab_size() > model.shape.vocab_size:
        raise QpipeError(
            f"{place / TOKENIZER} has {tokenizer.get_vocab_size():,} tokens, the embedding of {name} "
            f"{model.shape.vocab_size:,} rows; give the model's own tokenizer"
        )
    cuda = torch.cuda.is_available()
    return Scorer(model.to("cuda" if cuda else "cpu").eval(), tokenizer, name, bf16 and cuda)


def _read_tokenizer(path: Path) -> Any:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises its own bare Exception
        raise QpipeError(f"{path} cannot be read as a tokenizer: {error}") from None


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    name: str
    tokens: int
    """predictions (count)"""
    loss: float
    """nats/token"""
    perplexity: float
    """e^loss"""
    bits_per_byte: float
    """of the text's UTF-8 bytes"""


def perplexity(scorer: Scorer, text: str) -> Perplexity:
    """Return the perplexity of a text in windows of the model's context, each token but the first predicted once.

    Windows follow each other as in the validation loss; the last one starts early enough to be full (error: a text of
    fewer than two tokens).
    """
    ids = scorer.encode(text)
    if len(ids) < 2:
        raise QpipeError(f"a text of {len(ids)} tokens; a perplexity needs two or more")
    windows = all_windows(len(ids), min(scorer.context, len(ids) - 1))
    length = min(scorer.context, len(ids) - 1) + 1
    found = scorer.log_probabilities([ids[start : start + length] for start in windows.starts.tolist()])
    counted = zip(found, windows.counted.tolist(), strict=True)
    loss = -sum(float(row[len(row) - count :].double().sum()) for row, count in counted) / windows.tokens
    size = len(text.encode()) / len(ids)
    return Perplexity(scorer.name, windows.tokens, loss, math.exp(loss), loss / math.log(2) / size)

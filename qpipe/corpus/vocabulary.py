"""The tokenizer of a token store: a byte-level BPE trained here, or any Hugging Face tokenizer.

Both end up as one `tokenizers.Tokenizer` serialized to JSON, which is all a worker process needs. Three settings are
forced on either kind, since a corpus is not a prompt: no tokens are added at the beginning or end, nothing is
truncated or padded, and text that looks like a special token (`</s>` in a web page) is encoded as ordinary text, so
that the end-of-document token only stands where a document ends.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qpipe.corpus_config import PretrainedTokenizer, TokenizerConfig, TrainedTokenizer, local_tokenizer
from qpipe.errors import QpipeError

END_OF_DOCUMENT = "<|endoftext|>"
"""The end-of-document token of a tokenizer trained here; it has id 0."""

TRAINING_BYTES = 1 << 26
"""A BPE is trained on about this much text (bytes): counts of frequent pairs hardly move beyond it, and the memory of
the training grows with the number of distinct words."""

PIECE_CHARACTERS = 1 << 20
"""Longer documents are encoded in pieces of at most this many characters, which bounds the memory of a worker (the
library needs about 100 bytes per token)."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer ready for the workers.

    Attributes
    ----------
    json
        The serialized tokenizer.
    eos
        Id of the token that ends a document.
    size
        Largest id + 1 (count); the embedding may have more rows.
    """

    json: str
    eos: int
    size: int

    @property
    def digest(self) -> str:
        """SHA-256 of the serialized tokenizer (hex)."""
        return sha256(self.json.encode()).hexdigest()


def make_vocabulary(config: TokenizerConfig, base: Path, training_texts: Iterable[str]) -> Vocabulary:
    """Train or load the tokenizer that `config` describes; `training_texts` is only read for training.

    Raises
    ------
    QpipeError
        The tokenizer cannot be loaded, has no end-of-document token, or has ids beyond `vocab_size`.
    """
    if isinstance(config, TrainedTokenizer):
        return train_bpe(training_texts, config.vocab_size)
    tokenizer, eos = _load(config, base)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > config.vocab_size:
        raise QpipeError(
            f"tokenizer '{config.name}' has ids up to {size - 1:,}, but vocab_size is {config.vocab_size:,}; "
            f"set tokenizer.vocab_size to at least {size}"
        )
    eos_id = tokenizer.token_to_id(eos)
    if eos_id is None:
        raise QpipeError(f"tokenizer '{config.name}' has no token '{eos}'; set tokenizer.eos to one of its tokens")
    return _finish(tokenizer, eos_id, size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """Train a byte-level BPE (Sennrich et al. 2016, over bytes with the splitting rule of GPT-2, Radford et al. 2019).

    The result depends on the texts only, not on their order, the number of threads or the machine.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(map(pieces, texts)), trainer=trainer)
    return _finish(tokenizer, eos=0, size=tokenizer.get_vocab_size())  # special tokens come first


def open_tokenizer(serialized: str) -> Tokenizer:
    """Return the tokenizer of a `Vocabulary`, set to take every text as ordinary text."""
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.encode_special_tokens = True  # not part of the serialized form
    return tokenizer


def pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `PIECE_CHARACTERS`, after a line end where there is one, else after a space.

    Tokens that would span a cut are encoded differently than in one go: at most one place per million characters.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        cuts = (text.rfind(mark, start + PIECE_CHARACTERS // 2, stop) + 1 for mark in "\n ")
        cut = next((cut for cut in cuts if cut > start), stop)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _finish(tokenizer: Tokenizer, eos: int, size: int) -> Vocabulary:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Vocabulary(tokenizer.to_str(pretty=True), eos, size)


def _load(config: PretrainedTokenizer, base: Path) -> tuple[Tokenizer, str]:
    """Return the tokenizer and the text of its end-of-document token."""
    local = local_tokenizer(config, base)
    if local is not None and local.is_file():
        tokenizer, eos = _load_file(local), config.eos
    else:
        tokenizer, eos = _load_transformers(config, str(local or config.name))
    if eos is None:
        raise QpipeError(f"tokenizer '{config.name}' does not say which token ends a sequence; set tokenizer.eos")
    return tokenizer, eos


def _load_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise QpipeError(f"tokenizer {path}: not a tokenizer.json that `tokenizers` can read ({error})") from None


def _load_transformers(config: PretrainedTokenizer, source: str) -> tuple[Tokenizer, str | None]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError, ImportError) as error:
        raise QpipeError(
            f"tokenizer '{config.name}' cannot be loaded ({_first_line(error)}); check the name, the network and, for "
            "gated ones, that HF_TOKEN is set"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise QpipeError(
            f"tokenizer '{config.name}' ({type(loaded).__name__}) has no fast form; convert it to a tokenizer.json"
        )
    return Tokenizer.from_str(backend.to_str()), config.eos or loaded.eos_token


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

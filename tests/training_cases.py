"""Small runs and token stores for the tests of training."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from qpipe.corpus.store import FORMAT, FORMAT_VERSION, TokenStore, content_digest, token_dtype
from qpipe.corpus.writer import SplitWriter, partial_store, publish
from qpipe.formats import resolve
from qpipe.identity import digest
from qpipe.recipe import TINY, ModelShape, Training
from qpipe.runs import Run

VOCABULARY = 64
IDENTITY = {"corpus": "Markov chain"}


def small_shape(**changes: Any) -> ModelShape:
    fields = {
        "layers": 2,
        "width": 32,
        "heads": 2,
        "kv_heads": 2,
        "feed_forward": 64,
        "vocab_size": VOCABULARY,
        "context": 16,
    }
    return ModelShape(**{**fields, **changes})


def small_run(representation: str = "dense", steps: int = 60, seed: int = 0, **changes: Any) -> Run:
    """A run that takes a second; `changes` go to its shape or its training policy, whichever has the field."""
    resolved = resolve(representation)
    in_training = {key: value for key, value in changes.items() if key in Training.model_fields}
    in_shape = {key: value for key, value in changes.items() if key not in in_training}
    training = TINY.training("10k").model_copy(update={"batch_sequences": 8, **in_training})
    return Run(
        size="10k",
        representation_name=resolved.name,
        tokens_per_parameter=1.0,
        shape=small_shape(**in_shape),
        training=training,
        steps=steps,
        representation=resolved.canonical(),
        corpus=digest(IDENTITY, 12),
        seed=seed,
    )


def markov_tokens(count: int, vocab_size: int = VOCABULARY, seed: int = 0) -> np.ndarray:
    """A chain in which each token is followed by one of four: entropy ln 4 per token, so there is much to learn."""
    generator = np.random.default_rng(seed)
    followers = np.random.default_rng(0).integers(0, vocab_size, (vocab_size, 4))
    choices = generator.integers(0, 4, count)
    tokens = np.zeros(count, token_dtype(vocab_size))
    for place in range(1, count):
        tokens[place] = followers[tokens[place - 1], choices[place]]
    return tokens


def make_store(
    folder: Path, train: int = 5000, validation: int = 700, vocab_size: int = VOCABULARY, shard: int = 1800
) -> TokenStore:
    """Write a token store of Markov tokens, cut into shards that sequences cross."""
    with partial_store(folder) as partial:
        splits = {}
        for seed, (name, count) in enumerate({"train": train, "validation": validation}.items()):
            writer = SplitWriter(partial, name, shard)
            writer.append(markov_tokens(count, vocab_size, seed), 1, 4 * count)
            writer.close()
            splits[name] = writer.describe()
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dtype": token_dtype(vocab_size).str,
            "vocab_size": vocab_size,
            "eos": 0,
            "identity": IDENTITY,
            "tokenizer": {"sha256": hashlib.sha256(b"{}").hexdigest()},
            "splits": splits,
        }
        publish(partial, folder, "{}", {**manifest, "digest": content_digest(manifest)})
    return TokenStore.open(folder, verify=True)

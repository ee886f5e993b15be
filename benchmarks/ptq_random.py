"""Models and text of random numbers, for timing `benchmarks/ptq.py speed` without training anything."""

import hashlib
from pathlib import Path

import numpy as np

from qpipe.corpus.store import FORMAT, FORMAT_VERSION, content_digest, token_dtype
from qpipe.corpus.writer import SplitWriter, partial_store, publish
from qpipe.model import Decoder
from qpipe.recipe import QUEST, ModelShape
from qpipe.record import Record
from qpipe.runs import Run
from qpipe.train.results import file_digest, weights

SHAPES = {
    "30M": QUEST.shape("30M", 32000),
    "100M": QUEST.shape("100M", 32000),
    "800M": QUEST.shape("800M", 32000),
    "1B": ModelShape(layers=20, width=2048, heads=16, kv_heads=16, feed_forward=5632, vocab_size=32000, context=2048),
}


def random_run(folder: Path, size: str) -> Path:
    """Save a decoder as training leaves one, with initial weights."""
    import safetensors.torch

    shape = SHAPES[size]
    run = Run(size=size, representation_name="dense", tokens_per_parameter=1, shape=shape, steps=1, seed=0, corpus="0",
              training=QUEST.training("800M"), representation={})  # fmt: skip
    if not (folder / "record.json").exists():
        model = Decoder(shape, run.format_spec)
        model.initialize(0)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(weights(model), folder / "model.safetensors")
        count, total = run.parameters, run.bits_per_weight()[1]
        Record(id=run.id, status="ok", loss=1.0, bits_per_byte=None, train_loss=None, validation_tokens=1, steps=1,
               n=count.non_embedding, n_compressed=0, n_embedding=count.embedding, d=run.tokens, flops=run.flops,
               bits_per_weight=total, payload_bits=total, tokens_digest="0", run=run,
               weights_digest=file_digest(folder / "model.safetensors")).write(folder / "record.json")  # fmt: skip
    return folder


def random_store(folder: Path) -> Path:
    """Write a token store of random ids."""
    if (folder / "manifest.json").exists():
        return folder
    generator = np.random.default_rng(0)
    with partial_store(folder) as partial:
        splits = {}
        for name, count in (("train", 1_000_000), ("validation", 20_000)):
            writer = SplitWriter(partial, name, 2_000_000)
            writer.append(generator.integers(0, 32000, count).astype(token_dtype(32000)), 1, 4 * count)
            writer.close()
            splits[name] = writer.describe()
        manifest = {"format": FORMAT, "version": FORMAT_VERSION, "dtype": token_dtype(32000).str, "vocab_size": 32000,
                    "eos": 0, "tokenizer": {"sha256": hashlib.sha256(b"{}").hexdigest()}, "splits": splits}  # fmt: skip
        publish(partial, folder, "{}", {**manifest, "digest": content_digest(manifest)})
    return folder

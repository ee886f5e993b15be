"""Turn a study's corpus into a token store: memory-mapped shards of token ids, the tokenizer, and a manifest.

The store is whole or not there: it is built aside and its manifest.json comes last. A second call writes it anew. All
cores tokenize; the result does not depend on their number.

example:
  qpipe tokenize config/demo.yaml results/demo/tokens/
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qpipe.corpus import TokenStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="study file with corpus and tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the token store")
    parser.add_argument("--workers", type=int, metavar="K", help="tokenizing processes (default: one per core)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print the manifest's summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Tokenize and print a summary."""
    from qpipe.corpus import tokenize_corpus
    from qpipe.errors import QpipeError
    from qpipe.study import load_study

    if args.workers is not None and args.workers < 1:
        raise QpipeError(f"--workers {args.workers}: at least one process is needed")
    study = load_study(args.study)
    store = tokenize_corpus(
        study.corpus,
        study.tokenizer,
        args.out,
        base=Path.cwd(),
        workers=args.workers,
        progress=not args.no_progress,
    )
    print(json.dumps(_summary(store), indent=1) if args.json else _text(store))
    return 0


def _summary(store: "TokenStore") -> dict[str, object]:
    splits = {
        split.name: {"tokens": len(split), "documents": split.documents, "text_bytes": split.text_bytes}
        for split in (store.train, store.validation)
    }
    return {
        "path": str(store.path),
        "digest": store.digest,
        "vocab_size": store.vocab_size,
        "eos": store.eos,
        "bytes_per_token": store.bytes_per_token,
        "splits": splits,
        "dropped_duplicates": store.manifest["dropped_duplicates"],
    }


def _text(store: "TokenStore") -> str:
    lines = [
        f"{split.name:<10} {len(split):>15,} tokens  {split.documents:>11,} documents  {split.text_bytes:>15,} bytes"
        for split in (store.train, store.validation)
    ]
    dropped = store.manifest["dropped_duplicates"]
    lines.append(f"{'dropped':<10} {dropped['documents']:,} duplicate documents ({dropped['text_bytes']:,} bytes)")
    lines.append(
        f"vocabulary {store.vocab_size:,}, {store.bytes_per_token:.3f} bytes/token, digest {store.digest[:16]}"
    )
    return "\n".join(lines)

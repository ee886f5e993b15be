"""Text in, tokens out: read a corpus, tokenize it on all cores, keep it as memory-mapped shards.

    docstrings | files | huggingface --blocks--> worker processes --tokens--> shards + manifest

`tokenize_corpus` writes a token store, `TokenStore` reads one. The parts: `sources` cuts a corpus into blocks of about
a megabyte, `blocks` turns one block into documents, `vocabulary` trains or loads the tokenizer, `encoding` is what a
worker does with a block, `writer` and `store` hold the format on disk.
"""

from qpipe.corpus.pipeline import tokenize_corpus
from qpipe.corpus.store import TokenSplit, TokenStore

__all__ = ["TokenSplit", "TokenStore", "tokenize_corpus"]

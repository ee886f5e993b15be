"""Opening the token store of a run."""

from pathlib import Path

from qpipe.corpus.store import MANIFEST, TokenStore
from qpipe.errors import QpipeError
from qpipe.identity import digest
from qpipe.runs import Run


def open_store(run: Run, tokens: Path) -> TokenStore:
    """Open the token store that a run is to be trained or evaluated on.

    Parameters
    ----------
    run
        The run.
    tokens
        Folder of the store, or its manifest (error: no store, or one of another corpus, tokenizer or vocabulary).
    """
    store = TokenStore.open(tokens.parent if tokens.name == MANIFEST else tokens)
    remedy = "plan the run again for this corpus or give its own token store"
    problems = []
    if store.vocab_size != run.shape.vocab_size:
        problems.append(
            f"run {run.id} has an embedding of {run.shape.vocab_size:,} rows, the tokens in {tokens} come from a "
            f"vocabulary of {store.vocab_size:,}; {remedy}"
        )
    if (found := digest(store.manifest.get("identity"), len(run.corpus))) != run.corpus:
        problems.append(f"run {run.id} belongs to corpus {run.corpus}, {tokens} holds corpus {found}; {remedy}")
    if problems:
        raise QpipeError(problems)
    return store

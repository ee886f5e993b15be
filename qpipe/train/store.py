"""Opening the token store of a run."""

from pathlib import Path

from qpipe.corpus.store import MANIFEST, TokenStore
from qpipe.errors import QpipeError
from qpipe.runs import Run


def open_store(run: Run, tokens: Path) -> TokenStore:
    """Open the token store that a run is to be trained or evaluated on.

    Parameters
    ----------
    run
        The run.
    tokens
        Folder of the store, or its manifest (error: no store, or another vocabulary than the model's).
    """
    store = TokenStore.open(tokens.parent if tokens.name == MANIFEST else tokens)
    if store.vocab_size != run.shape.vocab_size:
        raise QpipeError(
            f"run {run.id} has an embedding of {run.shape.vocab_size:,} rows, the tokens in {tokens} come from a "
            f"vocabulary of {store.vocab_size:,}; plan the run again for this corpus or give its own token store"
        )
    return store

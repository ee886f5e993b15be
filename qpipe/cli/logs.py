"""Log lines on stderr, for verbs that take long."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def logged_to_stderr(name: str) -> Iterator[None]:
    """Show a logger's lines from INFO up, each with its time of day: plain lines, fit for a file."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)

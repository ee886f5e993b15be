"""Log lines on stderr, for verbs that take long."""

import logging


def log_to_stderr(name: str) -> None:
    """Show a logger's lines from INFO up, each with its time of day: plain lines, fit for a file."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

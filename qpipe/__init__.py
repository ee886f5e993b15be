"""qpipe: what are compressed language models worth? Train the grid, fit the law, read the multiplier."""

from qpipe.errors import QpipeError

__version__ = "0.1.0"
__all__ = ["QpipeError", "__version__"]

"""One BLAS thread for fits: thousands of tiny matrix products only lose time to thread hand-over.

Measured on a 240-point fit, a scipy loop costs nine times the CPU with BLAS threads left on. numpy's wheels bundle
OpenBLAS; its thread count is set through the loaded library and restored afterwards. Where no OpenBLAS is found
(other BLAS, other operating systems) nothing is changed.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_SUFFIXES = ("64_", "_64", "")
_PREFIXES = ("scipy_", "")


@cache
def _openblas() -> tuple[Any, Any] | None:
    """Return OpenBLAS's functions to get and to set its number of threads, or None."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.exists():
        return None
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    for path in dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "openblas" in line):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for prefix in _PREFIXES:
            for suffix in _SUFFIXES:
                getter = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
                setter = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
                if getter is not None and setter is not None:
                    return getter, setter
    return None


@contextlib.contextmanager
def single_blas_thread() -> Iterator[None]:
    """Run the body with one BLAS thread."""
    functions = _openblas()
    if functions is None:
        yield
        return
    getter, setter = functions
    before = int(getter())
    setter(1)
    try:
        yield
    finally:
        setter(before)

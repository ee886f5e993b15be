"""Launching kernels of our own, or, in a rehearsal, only having them compiled, many at a time.

A kernel is compiled when it is first launched: half a second on one core, and a step has about twenty of them, one
after the other. A step that is rehearsed calls all its functions, but kernels inside are handed to a pool of threads
that compile them (most of that time is spent outside of Python) instead of being launched. What a rehearsed function
returns is whatever was in memory; only shapes and types are right.

Imported only where there is a GPU.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

_THREADS = 8

_now: list["Rehearsal"] = []
"""The rehearsal that is under way, if any: autograd calls backward functions from a thread of its own."""


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Run a kernel's programs, `grid` of them: `kernel[grid](*args, **options)`."""
    if _now:
        _now[-1].compile(kernel, args, options)
    else:
        kernel[grid](*args, **options)


class Rehearsal:
    """While it lasts kernels are not launched; at its end all that would have been are compiled.

    Parameters
    ----------
    device
        For which GPU.

    Kernels are compiled for tensors that begin at a multiple of 16 bytes, as whole ones do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._jobs: dict[object, Future[object]] = {}

    def __enter__(self) -> Self:
        threads = min(_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(self.device,))
        _now.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _now.remove(self)
        self._pool.shutdown(cancel_futures=error[0] is not None)
        for job in self._jobs.values() if error[0] is None else ():
            job.result()

    def compile(self, kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> None:
        """Have a kernel compiled for such arguments, once."""
        kinds = tuple(arg.dtype if isinstance(arg, Tensor) else arg for arg in args)
        key = kernel, kinds, tuple(options.items())
        if key not in self._jobs:
            _ = kernel.device_caches[self.device.index]  # made here: two threads would make one each
            self._jobs[key] = self._pool.submit(_ready, kernel, kinds, options)


def _ready(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> object:
    """Compile a kernel and load it."""
    return kernel.warmup(*args, grid=(1,), **options).run

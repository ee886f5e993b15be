"""GPUs of one machine, shared out to trainers without collision.

Schedulers such as Slurm give each job its GPUs. On a plain machine nobody does, so a trainer takes a lease: a lock on
one of `runs per GPU` places of one GPU. The locks are the kernel's (`flock`): a trainer that dies, however it dies,
gives its place back, and two workflows on one machine see each other. Places are filled one per GPU before any GPU is
shared.
"""

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from qpipe.errors import QpipeError

RUNS_PER_GPU = "QPIPE_RUNS_PER_GPU"
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def leased_gpu() -> Iterator[str | None]:
    """Hold a place on a GPU and make that GPU the only visible one; wait while all places are taken.

    Does nothing, and yields None, where the environment does not ask for it (`QPIPE_RUNS_PER_GPU`, runs that share a
    GPU). To be entered before CUDA is used.

    Raises
    ------
    QpipeError
        `QPIPE_RUNS_PER_GPU` is no count, or the machine has no GPU.
    """
    text = os.environ.get(RUNS_PER_GPU)
    if not text:
        yield None
        return
    if not text.isdigit() or int(text) < 1:
        raise QpipeError(f"{RUNS_PER_GPU}={text}: give the number of runs that share a GPU, 1 or more")
    with _place(visible_gpus(), int(text)) as gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        yield gpu


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that may be used: CUDA_VISIBLE_DEVICES, else all of the machine (error: none)."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        ids = [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        ids = re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE)
    else:
        ids = []
    if not ids:
        raise QpipeError(f"{RUNS_PER_GPU} is set and no GPU is visible (CUDA_VISIBLE_DEVICES, nvidia-smi -L); unset it")
    return ids


@contextlib.contextmanager
def _place(gpus: list[str], per_gpu: int) -> Iterator[str]:
    folder = Path(tempfile.gettempdir()) / f"qpipe-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    places = {
        folder / f"{re.sub(r'[^0-9A-Za-z-]', '_', gpu)}.{place}": gpu
        for place, gpu in itertools.product(range(per_gpu), gpus)
    }
    with first_free(places) as taken:
        yield places[taken]


@contextlib.contextmanager
def first_free(places: Iterable[Path]) -> Iterator[Path]:
    """Hold the lock of the first place that nobody holds; wait while all are held."""
    waiting = list(places)
    while True:
        for place in waiting:
            with Path(f"{place}.lock").open("w") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield place
                return
        time.sleep(_POLL_SECONDS)

"""Warm workers: processes that train one run after another, so that short runs do not pay for start-up each time.

Importing torch and Lightning, creating a CUDA context and tuning kernels take seconds; a small run takes no longer.
With `QPIPE_WARM` set, `qpipe train` does nothing of that: it hands its arguments, environment, working folder, standard
output and standard error to a worker that has everything loaded, and waits for the exit code. To whoever called it,
Snakemake above all, nothing changes: one run, one command, one log, one exit code.

A worker serves one client at a time. Clients choose theirs by a lock on a place (on a GPU where leases are used, see
`qpipe.leases`), so there are as many workers as commands at a time; the first client of a place starts it, and it ends
after `IDLE_SECONDS` without work, or after `RUNS` runs. Workers of other code, another interpreter or another number of
threads are never used. A client that goes away stops its run (with a checkpoint); a worker that dies fails its client's
run, and the next client starts a new worker.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qpipe.errors import QpipeError
from qpipe.identity import digest
from qpipe.leases import RUNS_PER_GPU, first_free, leased_gpu

WARM = "QPIPE_WARM"
IDLE_SECONDS = 30.0
RUNS = 200
START_SECONDS = 120.0
"""A worker listens before it imports anything heavy; this long only where the machine is swamped."""

_LENGTH = struct.Struct("!I")


def asked_for() -> bool:
    """Whether this process is to hand its work to a warm worker."""
    return os.environ.get(WARM, "") not in ("", "0")


def run_in_worker(arguments: list[str]) -> int:
    """Have a worker run `qpipe ARGUMENTS` here and now; return the exit code (1 if the worker dies)."""
    with _place() as address, _connected(address) as connection:
        environment = {key: value for key, value in os.environ.items() if key not in (WARM, RUNS_PER_GPU)}
        request = {"arguments": arguments, "folder": str(Path.cwd()), "environment": environment}
        body = json.dumps(request).encode()
        socket.send_fds(connection, [_LENGTH.pack(len(body))], [1, 2])
        connection.sendall(body)
        worker = int(json.loads(receive(connection))["pid"])
        for one in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(one, lambda number, _: os.kill(worker, number))
        try:
            return int(json.loads(receive(connection))["code"])
        except EOFError:
            print(f"qpipe: warm worker {worker} died; the run resumes when it is started again", file=sys.stderr)
            return 1


def receive(connection: socket.socket) -> bytes:
    """Return one message (EOFError: the other side is gone)."""
    return exactly(connection, _LENGTH.unpack(exactly(connection, _LENGTH.size))[0])


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one message."""
    body = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a client's request and its standard output and error as file descriptors (EOFError: it is gone)."""
    head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 2)
    if len(head) < _LENGTH.size or len(descriptors) < 2:
        raise EOFError
    return json.loads(exactly(connection, _LENGTH.unpack(head)[0])), list(descriptors)


def exactly(connection: socket.socket, count: int) -> bytes:
    """Return `count` bytes (EOFError: the other side is gone before)."""
    parts: list[bytes] = []
    while count:
        try:
            part = connection.recv(count)
        except ConnectionError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """Hold a place and yield the address of its worker: a socket named after all that must agree."""
    folder = Path(tempfile.gettempdir()) / f"qpipe-warm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with leased_gpu():
        same = [sys.executable, _code(), *(os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))]
        kind = digest(same)
        with first_free(folder / f"{kind}.{number}" for number in range(1000)) as lock:
            yield lock.with_suffix(lock.suffix + ".socket")


def _code() -> list[Any]:
    package = Path(__file__).parent
    return [str(package), max(path.stat().st_mtime_ns for path in package.rglob("*.py"))]


@contextlib.contextmanager
def _connected(address: Path) -> Iterator[socket.socket]:
    """Connect to the worker at an address, starting it if none answers (error: it does not start)."""
    with socket.socket(socket.AF_UNIX) as connection:
        process = None
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                connection.connect(str(address))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                process = process or _start(address)
            if process.poll() is not None or time.monotonic() > end:
                raise QpipeError(f"no warm worker could be started, see {address}.log; or unset {WARM}")
            time.sleep(0.02)
        yield connection


def _start(address: Path) -> subprocess.Popen[bytes]:
    address.unlink(missing_ok=True)
    with Path(f"{address}.log").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "qpipe", "worker", str(address)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for the client; the worker stops its run when the client is gone
        )

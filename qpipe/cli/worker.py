"""Train runs back to back in one warm process, for `qpipe train` commands that ask for it (QPIPE_WARM=1).

Started by the first such command and ended when there is no more work; nobody needs to call it. How it works and when
it pays is told in qpipe/warm.py.

example:
  QPIPE_WARM=1 qpipe train out/run.yaml results/tokens/1f3a9c2e5b7d/ out/     (starts: qpipe worker SOCKET)
"""

import argparse
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from qpipe import warm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("address", type=Path, metavar="SOCKET", help="where to listen")


def run(args: argparse.Namespace) -> int:
    """Serve clients one after the other."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(args.address))
        server.listen(1)
        server.settimeout(warm.IDLE_SECONDS)
        try:
            for _ in range(warm.RUNS):
                connection, _ = server.accept()
                with connection, contextlib.suppress(EOFError, BrokenPipeError):
                    connection.settimeout(None)
                    _serve(connection)
        except TimeoutError:
            pass  # no work: the next client starts another worker
        finally:
            args.address.unlink(missing_ok=True)
    return 0


def _serve(connection: socket.socket) -> None:
    """Run one client's command with its output, environment and folder."""
    request, (out, err) = warm.receive_request(connection)
    own = os.dup(1), os.dup(2)
    for descriptor, standard in ((out, 1), (err, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    warm.send(connection, {"pid": os.getpid()})
    finished = threading.Event()
    threading.Thread(target=_stop_if_gone, args=(connection, finished), daemon=True).start()
    code = _command(request["arguments"])
    finished.set()
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, standard in zip(own, (1, 2), strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    warm.send(connection, {"code": code})
    _forget()


def _stop_if_gone(connection: socket.socket, finished: threading.Event) -> None:
    """Ask the run to stop when its client goes away; a client says nothing more while it waits."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    if not finished.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _command(arguments: list[str]) -> int:
    from qpipe.cli import main

    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _forget() -> None:
    """Drop what a run leaves in the process: its tensors, and graphs that would count against the next run's limit."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

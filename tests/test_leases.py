"""GPU leases between real processes on simulated devices."""

import collections
import os
import signal
import subprocess
import sys
import time

import pytest

from qpipe.errors import QpipeError
from qpipe.leases import leased_gpu

HOLD = """
import os, sys, time
from qpipe.leases import leased_gpu
with leased_gpu() as gpu:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu
    print("+", gpu, time.monotonic(), flush=True)
    time.sleep(float(sys.argv[1]))
    print("-", gpu, time.monotonic(), flush=True)
"""


def start(seconds: float, temporary, per_gpu: int) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,GPU-8a/7", "TMPDIR": str(temporary)}
    environment["QPIPE_RUNS_PER_GPU"] = str(per_gpu)
    command = [sys.executable, "-c", HOLD, str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("per_gpu", [1, 2])
def test_never_more_runs_on_a_gpu_than_allowed(tmp_path, per_gpu):
    holders = [start(0.4, tmp_path, per_gpu) for _ in range(12)]
    events = [line.split() for one in holders for line in one.communicate(timeout=60)[0].splitlines()]
    assert len(events) == 24
    held, most = collections.Counter(), collections.Counter()
    for sign, gpu, _ in sorted(events, key=lambda event: float(event[2])):
        held[gpu] += 1 if sign == "+" else -1
        most[gpu] = max(most[gpu], held[gpu])
    assert set(most) == {"0", "1", "GPU-8a/7"}
    assert max(most.values()) <= per_gpu


def test_gpus_are_filled_evenly_and_a_killed_holder_gives_its_place_back(tmp_path):
    first = [start(60, tmp_path, 2) for _ in range(3)]
    try:
        assert {one.stdout.readline().split()[1] for one in first} == {"0", "1", "GPU-8a/7"}
        rest = [start(60, tmp_path, 2) for _ in range(3)]
        first += rest
        assert all(one.stdout.readline() for one in rest)  # six places for six runs
        waiting = start(0, tmp_path, 2)
        time.sleep(1.0)
        assert waiting.poll() is None
        first[0].send_signal(signal.SIGKILL)
        assert len(waiting.communicate(timeout=30)[0].splitlines()) == 2
    finally:
        for one in first:
            one.kill()
            one.wait()


def test_refusals(monkeypatch):
    with leased_gpu() as gpu:
        assert gpu is None  # not asked for
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("QPIPE_RUNS_PER_GPU", "1")
    with pytest.raises(QpipeError, match="no GPU is visible"), leased_gpu():
        pass
    monkeypatch.setenv("QPIPE_RUNS_PER_GPU", "many")
    with pytest.raises(QpipeError, match="number of runs"), leased_gpu():
        pass

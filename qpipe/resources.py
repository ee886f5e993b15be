"""What a training run asks of a scheduler: memory and time, from its size, its tokens and its representation.

Host memory is what Python, torch and the two nested Snakemakes of a Slurm job need, plus 20 bytes per parameter
(weights, gradients, two Adam moments and a copy of the weights on their way to disk, float32), plus, without a GPU,
the activations of one micro-batch. Time is FLOPs over the sustained rate of the site, plus what launching a step costs,
longer for compressed steps, twice over, plus start-up. Both are estimates with room: a retry asks for more memory and
more time, and a run that reaches its time limit is requeued and goes on from its checkpoint.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qpipe.errors import QpipeError
from qpipe.formats import Representation
from qpipe.leases import RUNS_PER_GPU
from qpipe.runs import Run
from qpipe.warm import WARM

PROCESS_MB = 1500
"""Resident memory of a trainer before it builds a model (0.7 GB on CPU) and of the Snakemakes around it (MB)."""
GPU_PROCESS_MB = 4000
"""The same with a CUDA context, compiler workers and pinned buffers (MB)."""
DEVICES = "QPIPE_DEVICES"
"""Environment: devices of each node that train one run together."""
NODES = "QPIPE_NODES"
"""Environment: nodes that train one run together, where srun starts a process per device."""
SHARD = "QPIPE_SHARD"
"""Environment: 1 if each of these devices is to hold a part of the model instead of all of it."""
BYTES_PER_PARAMETER = 20
FLOATS_PER_FEATURE = 60
"""Floats kept for backward per token, layer and feature of width: 34 of a Llama block, the rest of the quantizers."""
STEP_SECONDS = 0.02
WEIGHTS_COST, ACTIVATIONS_COST = 1.2, 1.5
"""How much longer a step takes where weights are compressed, and where activations are too: above what was measured
(docs/performance.md: 1.00 to 1.17 and 1.09 to 1.37)."""
START_MINUTES = 15


@dataclass(frozen=True)
class Site:
    """What the profile says about the machine that trains (`set-resources: train:`)."""

    gpu: bool = False
    """runs train on a GPU (the profile has `gpu_type`, `gpu` or `runs_per_gpu`)"""
    gpu_type: str = ""
    """Slurm's name of a GPU: gpu, gpu:h100"""
    tflops: float = 0.02
    """sustained rate of one device (TFLOP/s)"""
    longest: int = 1440
    """longest time a job may ask for (minutes); longer runs are requeued"""
    runs_per_gpu: int | None = None
    """runs that share a GPU on a machine without a scheduler, which then take leases (`qpipe.leases`)"""
    warm: bool = False
    """runs are trained by warm workers (`qpipe.warm`)"""
    devices_of: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(nodes, devices per node) that train a run together, by size; one device where a size is not named"""

    sharded: frozenset[str] = frozenset()
    """sizes whose devices hold a part of the model each"""

    @classmethod
    def from_profile(cls, resources: Mapping[str, Any]) -> "Site":
        """Read the profile's resources for training: the fields above, `devices` like '430M:4 800M:2x8',
        `sharded` like '800M'."""
        given = {name: str(getattr(value, "raw", value)).strip("'\"") for name, value in resources.items()}
        number = {name: _positive(name, given[name]) for name in ("tflops", "longest", "runs_per_gpu") if name in given}
        gpu = any(name in given for name in ("gpu_type", "gpu", "runs_per_gpu"))
        return cls(
            gpu=gpu,
            gpu_type=given.get("gpu_type", ""),
            tflops=number.get("tflops", 40.0 if gpu else cls.tflops),
            longest=int(number.get("longest", cls.longest)),
            runs_per_gpu=int(number["runs_per_gpu"]) if "runs_per_gpu" in number else None,
            warm=given.get("warm", "0") != "0",
            devices_of=_counts(given.get("devices", "")),
            sharded=frozenset(given.get("sharded", "").split()),
        )

    def devices(self, run: Run) -> tuple[int, int]:
        """Return (nodes, devices per node) that train a run together (error: its batch cannot be shared equally)."""
        nodes, per_node = self.devices_of.get(run.size, (1, 1))
        if run.training.batch_sequences % (nodes * per_node):
            raise QpipeError(
                f"profile, set-resources: train: devices: {run.size}:{_shown(nodes, per_node)}: run {run.id} has "
                f"{run.training.batch_sequences} sequences per step, not a multiple of {nodes * per_node}"
            )
        return nodes, per_node

    def gres(self, run: Run) -> str:
        """Return Slurm's request for a run's GPUs on each node, empty where the profile names no GPU type."""
        return f"{self.gpu_type}:{self.devices(run)[1]}" if self.gpu_type else ""

    def parallel(self, run: Run, threads: int) -> dict[str, Any]:
        """Return what the executor plugin for Slurm is asked for beyond one process on one device.

        A run on several devices is an MPI job to the plugin: it then leaves `srun` to the rule's command, which starts
        a process per device with it. `launch` is that call, empty for other runs; the rest is absent for them.
        """
        nodes, per_node = self.devices(run)
        if nodes * per_node == 1 or not self.gpu_type:
            return {"launch": ""}
        cores = max(1, threads // per_node)
        # Never both: the plugin refuses, and takes `tasks` for tasks per GPU unless that is said to be 0.
        tasks = {"tasks_per_node": per_node} if per_node > 1 else {"tasks": nodes, "tasks_per_gpu": 0}
        launch = (
            f"srun --nodes={nodes} --ntasks={nodes * per_node} --ntasks-per-node={per_node} --cpus-per-task={cores} "
            f"--gres={self.gres(run)} --kill-on-bad-exit=1"
        )
        return {"mpi": "srun", "nodes": nodes, "cpus_per_task": cores, "launch": launch, **tasks}

    def environment(self, run: Run, threads: int) -> str:
        """Return shell assignments that tell a trainer what it may use of the machine."""
        nodes, per_node = self.devices(run)
        settings = {"OMP_NUM_THREADS": max(1, threads // per_node), DEVICES: per_node, RUNS_PER_GPU: self.runs_per_gpu}
        if nodes * per_node > 1 and self.gpu_type:
            settings[NODES] = nodes
        if self.warm and nodes * per_node == 1:
            settings[WARM] = 1
        if run.size in self.sharded:
            if nodes * per_node == 1:
                raise QpipeError(
                    f"profile, set-resources: train: sharded: {run.size}: trains on one device; name several in devices"
                )
            settings[SHARD] = 1
        return " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)

    def share(self, threads: int) -> str:
        """Return shell assignments for a step beside training that uses at most one GPU."""
        leased = "" if self.runs_per_gpu is None else f" {RUNS_PER_GPU}={self.runs_per_gpu}"
        return f"OMP_NUM_THREADS={threads}{leased}"

    def memory_mb(self, run: Run, attempt: int) -> int:
        """Return the host memory a job asks for on each node (MB); each attempt asks for as much again."""
        parameters = run.parameters.total * BYTES_PER_PARAMETER
        need = (GPU_PROCESS_MB if self.gpu else PROCESS_MB) + (parameters + self._activations(run)) / 1e6
        return round(need * self.devices(run)[1] * attempt)

    def minutes(self, run: Run, attempt: int) -> int:
        """Return the time a job asks for (minutes), at most `longest`."""
        seconds = run.flops / (self.tflops * 1e12 * math.prod(self.devices(run))) + run.steps * STEP_SECONDS
        seconds *= _cost(run.format_spec)
        return min(self.longest, round((START_MINUTES + 2 * seconds / 60) * attempt))

    def _activations(self, run: Run) -> float:
        """Return the bytes kept for backward on the host."""
        if self.gpu:
            return 0.0
        shape = run.shape
        tokens = micro_batch(run) * shape.context
        return 4.0 * FLOATS_PER_FEATURE * tokens * shape.layers * shape.width


def _cost(representation: Representation) -> float:
    if representation.activations is not None:
        return ACTIVATIONS_COST
    return 1.0 if representation.is_dense else WEIGHTS_COST


def micro_batch(run: Run) -> int:
    """Return an upper bound of the sequences that go through the model together."""
    shape = run.shape
    return min(run.training.batch_sequences, max(1, 32768 // shape.context))


def _counts(text: str) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    wrong = []
    for word in text.split():
        size, _, count = word.partition(":")
        if match := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", count):
            found[size] = (int(match[1] or 1), int(match[2]))
        else:
            wrong.append(word)
    if wrong:
        raise QpipeError(
            "profile, set-resources: train: devices: expected size:devices or size:nodesxdevices, as in "
            f"'430M:4 800M:2x8', found {wrong}"
        )
    return found


def _shown(nodes: int, per_node: int) -> str:
    return f"{nodes}x{per_node}" if nodes > 1 else str(per_node)


def _positive(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise QpipeError(f"profile, set-resources: train: {name}: expected a number above 0, found {value!r}")
    return number

"""What a training run asks of a scheduler: memory and time, from its size, its tokens and its representation.

Host memory is what Python, torch and the two nested Snakemakes of a Slurm job need, plus 20 bytes per parameter
(weights, gradients, two Adam moments and a copy of the weights on their way to disk, float32), plus, without a GPU,
the activations of one micro-batch. Time is FLOPs over the sustained rate of the site, plus what launching a step costs,
twice over, plus start-up. Both are estimates with room: a retry asks for more memory and more time, and a run that
reaches its time limit is requeued and goes on from its checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qpipe.errors import QpipeError
from qpipe.leases import RUNS_PER_GPU
from qpipe.runs import Run

PROCESS_MB = 1500
"""Resident memory of a trainer before it builds a model (0.7 GB on CPU) and of the Snakemakes around it (MB)."""
GPU_PROCESS_MB = 4000
"""The same with a CUDA context, compiler workers and pinned buffers (MB)."""
BYTES_PER_PARAMETER = 20
FLOATS_PER_FEATURE = 60
"""Floats kept for backward per token, layer and feature of width: 34 of a Llama block, the rest of the quantizers."""
STEP_SECONDS = 0.02
START_MINUTES = 15


@dataclass(frozen=True)
class Site:
    """What the profile says about the machine that trains (`set-resources: train:`)."""

    gpu: bool = False
    """runs train on a GPU (the profile asks for `gres` or `gpu`)"""
    tflops: float = 0.02
    """sustained rate of one run (TFLOP/s)"""
    longest: int = 1440
    """longest time a job may ask for (minutes); longer runs are requeued"""
    runs_per_gpu: int | None = None
    """runs that share a GPU on a machine without a scheduler, which then take leases (`qpipe.leases`)"""

    @classmethod
    def from_profile(cls, resources: Mapping[str, Any]) -> "Site":
        """Read the profile's resources for training: the fields above, `gres` and `gpu` (error: not numbers)."""
        given = {
            name: _positive(name, resources[name])
            for name in ("tflops", "longest", "runs_per_gpu")
            if name in resources
        }
        gpu = any(name in resources for name in ("gres", "gpu", "runs_per_gpu"))
        return cls(
            gpu=gpu,
            tflops=given.get("tflops", 40.0 if gpu else cls.tflops),
            longest=int(given.get("longest", cls.longest)),
            runs_per_gpu=int(given["runs_per_gpu"]) if "runs_per_gpu" in given else None,
        )

    @property
    def environment(self) -> str:
        """Shell assignments that tell a trainer how it shares the machine."""
        return "" if self.runs_per_gpu is None else f"{RUNS_PER_GPU}={self.runs_per_gpu}"

    def memory_mb(self, run: Run, attempt: int) -> int:
        """Return the host memory a job asks for (MB); each attempt asks for as much again."""
        parameters = run.parameters.total * BYTES_PER_PARAMETER
        need = (GPU_PROCESS_MB if self.gpu else PROCESS_MB) + (parameters + self._activations(run)) / 1e6
        return round(need * attempt)

    def minutes(self, run: Run, attempt: int) -> int:
        """Return the time a job asks for (minutes), at most `longest`."""
        seconds = run.flops / (self.tflops * 1e12) + run.steps * STEP_SECONDS
        return min(self.longest, round((START_MINUTES + 2 * seconds / 60) * attempt))

    def _activations(self, run: Run) -> float:
        """Return the bytes kept for backward on the host."""
        if self.gpu:
            return 0.0
        shape = run.shape
        tokens = micro_batch(run) * shape.context
        return 4.0 * FLOATS_PER_FEATURE * tokens * shape.layers * shape.width


def micro_batch(run: Run) -> int:
    """Return an upper bound of the sequences that go through the model together."""
    shape = run.shape
    return min(run.training.batch_sequences, max(1, 32768 // shape.context))


def _positive(name: str, value: Any) -> float:
    try:
        number = float(str(getattr(value, "raw", value)))
    except ValueError:
        number = 0.0
    if not number > 0:
        raise QpipeError(f"profile, set-resources: train: {name}: expected a number above 0, found {value!r}")
    return number

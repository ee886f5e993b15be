"""How a run went on this machine: what `runtime.json` says. Nothing here enters the record."""

import contextlib
import os
import platform
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qpipe.accounting import training_flops_per_token
from qpipe.runs import Run

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 peaks of NVIDIA's data sheets (FLOP/s), by a part of the device's name; the first match counts."""


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def utilisation(run: Run, tokens_per_second: float | None, name: str, devices: int) -> float | None:
    """Return model FLOPs per second over the devices' peak (MFU), None where the peak is not known."""
    peak = next((value for part, value in PEAK_BF16_FLOPS.items() if part in name), None)
    if peak is None or tokens_per_second is None or run.training.precision != "bf16":
        return None
    return tokens_per_second * training_flops_per_token(run.shape) / (peak * devices)


def versions() -> dict[str, str]:
    """Return the versions of what computed the result."""
    packages = {name: version(name) for name in ("qpipe", "torch", "lightning", "numpy", "safetensors")}
    return {"python": platform.python_version(), **packages}


def describe(run: Run, device: torch.device, devices: int, tokens_per_second: float | None) -> dict[str, Any]:
    """Return where the run was trained, throughput, MFU and versions."""
    name = device_name(device)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "device": name,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "tokens_per_second": tokens_per_second,
        "mfu": utilisation(run, tokens_per_second, name, devices),
        "peak_device_bytes": memory,
        "versions": versions(),
    }

"""What is kept while a quantization is under way, so that killed work goes on; and how long it took."""

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qpipe.files import replacing, write_text
from qpipe.ptq.groups import Layout
from qpipe.ptq.planning import LayerTask, Plan
from qpipe.ptq.sensitivity import Sensitivity
from qpipe.train.runtime import device_name, versions

_FILE = "rounds.safetensors"


@dataclass
class Kept:
    """Groups and depths of a round."""

    layouts: dict[str, Layout]
    plan: Plan


@dataclass
class Progress:
    """Rounds of measuring and quantizing that are done."""

    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    rounds: int = 0
    best_loss: float = float("inf")
    best: Kept | None = None
    latest: Kept | None = None

    def take(self, rounds: int, loss: float, tasks: dict[str, LayerTask], plan: Plan) -> None:
        """Take in a round; the first one counts as best even if its loss is not finite."""
        self.rounds = rounds
        self.latest = Kept({name: task.layout for name, task in tasks.items()}, plan)
        if self.best is None or loss < self.best_loss:
            self.best, self.best_loss = self.latest, loss


def write_progress(folder: Path, identity: str, progress: Progress) -> None:
    """Keep the rounds done so far durably."""
    tensors = {f"sums/{name}": value for name, value in progress.sensitivity.sums.items()}
    described: dict[str, Any] = {
        "identity": identity,
        "rounds": progress.rounds,
        "best_loss": progress.best_loss,
        "tokens": progress.sensitivity.tokens,
    }
    for label, kept in (("best", progress.best), ("latest", progress.latest)):
        assert kept is not None
        tensors |= {f"{label}/cluster/{name}": layout.cluster.clone() for name, layout in kept.layouts.items()}
        tensors |= {f"{label}/depth/{name}": depth.clone() for name, depth in kept.plan.depths.items()}
        groups = {name: [layout.rows, layout.columns, layout.width] for name, layout in kept.layouts.items()}
        plan = {"predicted": kept.plan.predicted, "gap": kept.plan.gap, "gain": kept.plan.gain}
        described[label] = {"groups": groups, "plan": plan}
    with replacing(folder / _FILE) as temporary:
        safetensors.torch.save_file(
            {name: value.cpu() for name, value in tensors.items()}, temporary, metadata={"qpipe": json.dumps(described)}
        )


def read_progress(folder: Path, identity: str, device: torch.device) -> Progress | None:
    """Return the kept rounds, or None where there are none of this work or they cannot be read."""
    try:
        with safetensors.safe_open(folder / _FILE, framework="pt") as file:
            described = json.loads(file.metadata()["qpipe"])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None
    if described["identity"] != identity:
        return None
    sums = {name.removeprefix("sums/"): value for name, value in tensors.items() if name.startswith("sums/")}
    return Progress(
        Sensitivity(sums, described["tokens"]),
        described["rounds"],
        described["best_loss"],
        *(_kept(label, described[label], tensors) for label in ("best", "latest")),
    )


def _kept(label: str, described: dict[str, Any], tensors: dict[str, Tensor]) -> Kept:
    layouts = {
        name: Layout(rows, columns, tensors[f"{label}/cluster/{name}"], width)
        for name, (rows, columns, width) in described["groups"].items()
    }
    depths = {name: tensors[f"{label}/depth/{name}"] for name in layouts}
    return Kept(layouts, Plan(depths, **described["plan"]))


def write_runtime(path: Path, device: torch.device, seconds: float, parts: dict[str, float]) -> None:
    """Write `runtime.json`: seconds in all and by part, peak memory (bytes), device, versions."""
    on_gpu = device.type == "cuda"
    found = {
        "seconds": seconds,
        "parts": parts,
        "device": device_name(device),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }
    write_text(path, json.dumps(found, indent=1) + "\n")

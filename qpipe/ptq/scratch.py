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

from qpipe.files import replacing, write_text
from qpipe.ptq.groups import Layout
from qpipe.ptq.planning import Plan
from qpipe.ptq.sensitivity import Sensitivity
from qpipe.ptq.tasks import LayerTask
from qpipe.train.runtime import device_name, versions

_FILE = "rounds.safetensors"


@dataclass
class Progress:
    """Rounds of measuring and quantizing that are done.

    Attributes
    ----------
    sensitivity
        Sums over all rounds.
    layouts
        Groups of each layer, formed in the first round.
    rounds, best_loss
        Rounds done (count); least held-out loss (nats/token).
    best, latest
        Depths of the round with that loss, and of the last round.
    """

    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    layouts: dict[str, Layout] = field(default_factory=dict)
    rounds: int = 0
    best_loss: float = float("inf")
    best: Plan | None = None
    latest: Plan | None = None

    def take(self, loss: float, tasks: dict[str, LayerTask], plan: Plan) -> None:
        """Take in a round; the first one counts as best even if its loss is not finite."""
        self.rounds += 1
        self.layouts = {name: task.layout for name, task in tasks.items()}
        self.latest = plan
        if self.best is None or loss < self.best_loss:
            self.best, self.best_loss = plan, loss


def write_progress(folder: Path, identity: str, progress: Progress) -> None:
    """Keep the rounds done so far durably."""
    tensors = {f"sums/{name}": value for name, value in progress.sensitivity.sums.items()}
    tensors |= {f"cluster/{name}": layout.cluster for name, layout in progress.layouts.items()}
    described: dict[str, Any] = {
        "identity": identity,
        "rounds": progress.rounds,
        "best_loss": progress.best_loss,
        "tokens": progress.sensitivity.tokens,
        "groups": {name: [layout.rows, layout.columns, layout.width] for name, layout in progress.layouts.items()},
    }
    for label, plan in (("best", progress.best), ("latest", progress.latest)):
        assert plan is not None
        tensors |= {f"{label}/{name}": depth.clone() for name, depth in plan.depths.items()}
        described[label] = {"predicted": plan.predicted, "gap": plan.gap, "gain": plan.gain, "power": plan.power}
    with replacing(folder / _FILE) as temporary:
        stored = {name: value.cpu().contiguous() for name, value in tensors.items()}
        safetensors.torch.save_file(stored, temporary, metadata={"qpipe": json.dumps(described)})


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
    names = described["groups"]
    layouts = {
        name: Layout(rows, columns, tensors[f"cluster/{name}"], width) for name, (rows, columns, width) in names.items()
    }
    plans = (Plan({n: tensors[f"{label}/{n}"] for n in names}, **described[label]) for label in ("best", "latest"))
    sums = Sensitivity({name: tensors[f"sums/{name}"] for name in names}, described["tokens"])
    return Progress(sums, layouts, described["rounds"], described["best_loss"], *plans)


def write_runtime(path: Path, device: torch.device, seconds: dict[str, float]) -> None:
    """Write `runtime.json`: seconds by part, peak memory (bytes), device, versions."""
    on_gpu = device.type == "cuda"
    found = {
        "seconds": seconds,
        "device": device_name(device),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }
    write_text(path, json.dumps(found, indent=1) + "\n")

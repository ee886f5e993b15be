"""What a run remembers of its course: the curve, the running means, and whether it diverged.

Sums are kept on the device and read once per row of the curve, so that a GPU is never made to wait for the host. They
are part of a checkpoint: a resumed run writes the same curve to the last bit. Nothing here depends on the clock.

Divergence rule. A run has diverged when a loss or a gradient norm is not finite, or when, after warm-up and the first
tenth of the steps, the mean training loss of the last four rows (2 % of the steps) exceeds twice ln V, the loss of
guessing uniformly among the V tokens. It then stops at once.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpipe.files import replacing
from qpipe.runs import Run
from qpipe.train.schedule import run_learning_rate
from qpipe.train.validation import diverged

Row = dict[str, float | int | None]

_UNITS = {
    "step": "count",
    "tokens": "count",
    "train_loss": "nats/token, mean since the row before",
    "learning_rate": "",
    "gradient_norm": "mean since the row before, before clipping",
    "validation_loss": "nats/token, on a fixed part of the validation split",
}
_ROWS = 200
_VALIDATIONS = 10
_TAIL = 0.05
_JUDGED = 4
_SETTLING = 0.1


@dataclass
class History:
    """Curve and running means of one run.

    Attributes
    ----------
    run
        The run.
    rows
        The curve so far; its columns are the keys of `_UNITS`.
    failure
        Why the run counts as diverged; empty while it does not.
    """

    run: Run
    rows: list[Row] = field(default_factory=list)
    failure: str = ""
    _sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    _first_bad: Tensor = field(default_factory=lambda: torch.full((), math.inf, dtype=torch.float64))

    @property
    def interval(self) -> int:
        """Steps between rows."""
        return max(1, self.run.steps // _ROWS)

    def row_due(self, step: int) -> bool:
        """Whether a row ends after `step` steps."""
        return step % self.interval == 0 or step == self.run.steps

    def validation_due(self, step: int) -> bool:
        """Whether the row after `step` steps holds a validation loss."""
        rows_between = max(1, math.ceil(self.run.steps / self.interval / _VALIDATIONS))
        return self.row_due(step) and (step % (rows_between * self.interval) == 0 or step == self.run.steps)

    def to(self, device: torch.device) -> None:
        """Keep the sums on a device."""
        self._sums, self._first_bad = self._sums.to(device), self._first_bad.to(device)

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """Add the step-th step (from 1) without waiting for the device."""
        self._sums[0] += loss
        self._sums[1] += gradient_norm
        if step > self._tail_start:
            self._sums[2] += loss
        bad = ~torch.isfinite(loss + gradient_norm)
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=step), self._first_bad)

    def average(self) -> None:
        """Average the sums over the processes that train together; a step that is bad for one is bad for all."""
        torch.distributed.all_reduce(self._sums)
        self._sums /= torch.distributed.get_world_size()
        torch.distributed.all_reduce(self._first_bad, torch.distributed.ReduceOp.MIN)

    def close_row(self, step: int, validation_loss: float | None) -> Row:
        """Read the sums, append the row that ends after `step` steps and return it."""
        previous = int(self.rows[-1]["step"] or 0) if self.rows else 0
        loss, norm, _ = (self._sums / (step - previous)).tolist()
        self._sums[:2] = 0.0
        row: Row = {
            "step": step,
            "tokens": step * self.run.tokens_per_step,
            "train_loss": loss,
            "learning_rate": run_learning_rate(self.run, step - 1),
            "gradient_norm": norm,
            "validation_loss": validation_loss,
        }
        self.rows.append(row)
        self._judge(step)
        return row

    def _judge(self, step: int) -> None:
        first_bad = self._first_bad.item()
        if math.isfinite(first_bad):
            self.failure = f"loss or gradient not finite at step {int(first_bad):,} of {self.run.steps:,}"
            return
        loss = statistics.fmean(float(row["train_loss"] or 0.0) for row in self.rows[-_JUDGED:])
        settled = step > max(self.run.training.warmup_fraction, _SETTLING) * self.run.steps
        if settled and diverged(loss, self.run.shape.vocab_size):
            limit = 2 * math.log(self.run.shape.vocab_size)
            self.failure = f"training loss {loss:.2f} above {limit:.2f} (2 ln V) at step {step:,} of {self.run.steps:,}"

    @property
    def tail_loss(self) -> float | None:
        """Mean training loss over the last 5 % of the steps (nats/token).

        None without steps, and for a trunk: it would depend on the shorter trunk that this one went on from.
        """
        if not self.run.steps or self.run.training.schedule == "constant":
            return None
        return self._sums[2].item() / (self.run.steps - self._tail_start)

    @property
    def _tail_start(self) -> int:
        return self.run.steps - math.ceil(_TAIL * self.run.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers for a checkpoint."""
        return {
            "rows": self.rows,
            "failure": self.failure,
            "sums": self._sums.tolist(),
            "first_bad": self._first_bad.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rows, self.failure = list(state["rows"]), state["failure"]
        self._sums = torch.tensor(state["sums"], dtype=torch.float64, device=self._sums.device)
        self._first_bad = torch.tensor(state["first_bad"], dtype=torch.float64, device=self._sums.device)


def write_curve(path: Path, rows: list[Row]) -> None:
    """Write the curve as Parquet, units in the fields' metadata."""
    import pyarrow as pa
    import pyarrow.parquet

    kinds = {name: np.int64 if name in ("step", "tokens") else np.float64 for name in _UNITS}
    schema = pa.schema(
        [pa.field(n, pa.from_numpy_dtype(kinds[n]), metadata={"unit": unit}) for n, unit in _UNITS.items()]
    )
    columns = [_column([row[name] for row in rows], kind) for name, kind in kinds.items()]
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pa.Table.from_arrays(columns, schema=schema), temporary)


def _column(values: list[float | int | None], kind: type) -> Any:
    """Return an Arrow array made of raw buffers: the usual constructors import pandas, half a second in a short run."""
    import pyarrow as pa

    present = np.packbits(np.array([value is not None for value in values], bool), bitorder="little")
    data: NDArray[Any] = np.array([0 if value is None else value for value in values], kind)
    buffers = [pa.py_buffer(present), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(values), buffers)

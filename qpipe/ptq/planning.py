"""Depths for a whole network: the allocator's view of its layers.

Costs and rates of all groups of all layers are put into one table, the allocator chooses, and the choice is handed back
layer by layer. Rates hold everything a choice changes (codes, the scale that a group of 0 bits does not have); what is
the same for every choice (offsets, depth indices, clusters, biases) is taken from the budget beforehand.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qpipe.errors import QpipeError
from qpipe.ptq.allocation import (
    Allocator,
    Array,
    allocate,
    allocate_exactly,
    partition_gain,
    spread_evenly,
)
from qpipe.ptq.codebooks import MAX_DEPTH
from qpipe.ptq.layer import SCALE_BITS, depth_bits
from qpipe.ptq.tasks import LayerTask
from qpipe.ptq_methods import Method

_DEPTHS = np.arange(MAX_DEPTH + 1)
_EIGHTHS = np.arange(0, MAX_DEPTH + 0.0625, 0.125)
"""Average depths of a layer that the per-layer allocator chooses from."""
_REFINEMENTS = 6


@dataclass
class Plan:
    """Depths of all groups.

    Attributes
    ----------
    depths
        Per layer, shape (groups,), int64, on the weight's device.
    predicted
        Predicted error of the probed output per token, None where nothing was probed.
    gap
        See `Allocation.gap`; None for allocators that do not optimise.
    gain
        Partition gain in bits per weight, None without sensitivities.
    power
        Power of the sensitivities that depths were chosen for: 1 unless tempered, None where they are spread evenly.
    """

    depths: dict[str, Tensor]
    predicted: float | None
    gap: float | None
    gain: float | None
    power: float | None = 1.0

    def digest(self) -> str:
        """Return a digest of the depths."""
        found = hashlib.sha256()
        for name, depth in self.depths.items():
            found.update(name.encode() + depth.cpu().numpy().tobytes())
        return found.hexdigest()[:16]


class Planner:
    """Chooses depths for one network at any budget; costs are measured once.

    Parameters
    ----------
    tasks
        Layers by name.
    method
        Decides costs and allocator.
    coefficients
        Per-layer coefficients of relative errors (linearity theorem), for allocation `layer`.
    payload_only
        Whether budgets count codes alone.
    """

    def __init__(
        self,
        tasks: dict[str, LayerTask],
        method: Method,
        coefficients: dict[str, float] | None = None,
        payload_only: bool = False,
    ) -> None:
        self.tasks, self.method, self.payload_only = tasks, method, payload_only
        self.weights = sum(task.weight.numel() for task in tasks.values())
        self.sizes = np.concatenate([np.full(task.layout.groups, task.layout.size) for task in tasks.values()])
        scales = 0 if payload_only else SCALE_BITS * (_DEPTHS > 0)
        self.rates = (self.sizes[:, None] * _DEPTHS + scales).astype(np.float64)
        self.fixed = 0 if payload_only else sum(task.fixed_bits(method) for task in tasks.values())
        self.scores = self._scores()
        self.costs = None if method.allocation == "uniform" else self._costs(coefficients)

    def plan(self, bits: float) -> Plan:
        """Choose depths for an average of `bits` per weight (error: fewer bits than the smallest choice takes)."""
        budget = bits * self.weights - self.fixed
        least = float(self.rates[:, 0].sum())
        if budget < least:
            raise QpipeError(
                f"{bits:g} bits per weight asked for, but offsets, clusters and biases alone take "
                f"{(self.fixed + least) / self.weights:.3f}; ask for more bits or for larger groups (rows, columns)"
            )
        choice, gap = self._choose(budget) if self.payload_only else self._with_indices(budget)
        return Plan(self._by_layer(choice), self._predict(choice), gap, self.gain())

    def _with_indices(self, budget: float) -> tuple[NDArray[np.int64], float | None]:
        """Choose depths whose indices fit in the budget too.

        How many bits an index takes follows from the choice. The reserve for indices starts at its most and is set to
        what the last choice needed; of the choices that fit the one that spends most is kept.
        """
        rows = np.arange(len(self.rates))
        reserve = float(min(len(rows) * depth_bits(MAX_DEPTH + 1), budget - self.rates[:, 0].sum()))
        best, spent = None, -1.0
        for _ in range(_REFINEMENTS):
            choice, gap = self._choose(budget - reserve)
            needed = self._index_bits(choice)
            total = float(self.rates[rows, choice].sum()) + needed
            if spent < total <= budget:
                best, spent = (choice, gap), total
            if needed == reserve:
                break
            reserve = float(needed)
        assert best is not None  # the first choice has reserved enough, or has one depth and needs no index
        return best

    def _index_bits(self, choice: NDArray[np.int64]) -> int:
        return sum((part.stop - part.start) * depth_bits(len(np.unique(choice[part]))) for part in self._slices())

    def _choose(self, budget: float) -> tuple[NDArray[np.int64], float | None]:
        allocation = self.method.allocation
        if self.costs is None:
            return spread_evenly(self.rates, budget), None
        if allocation == "layer":
            return self._per_layer(budget)
        if allocation == "exact":
            return allocate_exactly(self.costs, self.rates.astype(np.int64), int(budget)), 0.0
        found = self._allocator.choose(budget)
        return found.choice, found.gap

    @cached_property
    def _allocator(self) -> Allocator:
        assert self.costs is not None
        return Allocator(self.costs, self.rates)

    def _per_layer(self, budget: float) -> tuple[NDArray[np.int64], float]:
        """Choose each layer's average depth in eighths of a bit, then spread it over the layer's groups."""
        assert self.costs is not None
        parts = self._slices()
        menu = [_interpolated(table[part].sum(axis=0)) for table in (self.costs, self.rates) for part in parts]
        costs, totals = np.stack(menu[: len(parts)]), np.stack(menu[len(parts) :])
        found = allocate(costs, totals, budget)
        spent = totals[np.arange(len(parts)), found.choice]
        # What eighths leave over goes to the layers in proportion, as far as their groups can use it.
        spent = spent + (budget - spent.sum()) * spent / spent.sum()
        return np.concatenate(
            [spread_evenly(self.rates[p], float(s)) for p, s in zip(parts, spent, strict=True)]
        ), found.gap

    def _costs(self, coefficients: dict[str, float] | None) -> Array:
        """Return what each depth of each group costs at the output, shape (groups, 9)."""
        allocation = self.method.allocation
        if allocation == "layer":
            assert coefficients is not None
            return np.concatenate([self._relative_costs(n, t, coefficients[n]) for n, t in self.tasks.items()])
        if allocation in ("measured", "exact"):
            return np.concatenate([self._measured_costs(task) for task in self.tasks.values()])
        if allocation == "closed-form":
            return self.scores[:, None] * self.sizes[:, None] * 4.0**-_DEPTHS
        tables = [
            np.broadcast_to(task.distortion_table(self.method), (task.layout.groups, len(_DEPTHS)))
            for task in self.tasks.values()
        ]
        return self.scores[:, None] * self.sizes[:, None] * np.concatenate(tables)

    def _measured_costs(self, task: LayerTask) -> Array:
        return task.group_errors(self.method) * task.group_importance().double().cpu().numpy()[:, None]

    def _relative_costs(self, name: str, task: LayerTask, coefficient: float) -> Array:
        costs = self._measured_costs(LayerTask(task.weight, None, task.layout, task.rotation, task.adds_bias))
        # Noise can make a coefficient of a layer that hardly matters negative: it then matters not at all.
        return costs * max(coefficient, 0.0) / float(task.weight.double().square().sum())

    def _scores(self) -> Array:
        """Return squared sensitivity x variance of each group; sensitivities count as 1 for allocation `variance`."""
        scores = []
        for task in self.tasks.values():
            variance = task.group_variance(self.method)
            if task.importance is not None and self.method.allocation != "variance":
                variance = variance * task.group_importance()
            scores.append(variance.double().cpu().numpy())
        return np.concatenate(scores)

    def predicted(self, plan: Plan) -> float | None:
        """Return the predicted error of a plan, whatever it was chosen for."""
        return self._predict(np.concatenate([plan.depths[name].cpu().numpy() for name in self.tasks]))

    def _predict(self, choice: NDArray[np.int64]) -> float | None:
        if self.costs is None or not self.method.needs_sensitivities:
            return None
        return float(self.costs[np.arange(len(choice)), choice].sum())

    def gain(self) -> float | None:
        """Return the partition gain in bits per weight, None without sensitivities."""
        return partition_gain(self.scores, self.sizes) if self.method.needs_sensitivities else None

    def _slices(self) -> list[slice]:
        stops = np.cumsum([task.layout.groups for task in self.tasks.values()]).tolist()
        return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]

    def _by_layer(self, choice: NDArray[np.int64]) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(choice[part]).to(task.weight.device)
            for (name, task), part in zip(self.tasks.items(), self._slices(), strict=True)
        }


def _interpolated(values: Array) -> Array:
    """Values at whole depths, shape (9,), linearly in between at eighths of a bit: a mix of two depths."""
    return np.interp(_EIGHTHS, _DEPTHS, values)

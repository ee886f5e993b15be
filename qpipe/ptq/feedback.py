"""Rounding with error feedback: GPTQ (Frantar et al., 2210.17323) over groups of any shape and mixed depths.

Columns are rounded one after the other; the error of each is compensated by the columns still to come, in the way that
changes the layer's outputs W X least in squares. With H = E[x x^T] + damping and the Cholesky factor H^-1 = U^T U (U
upper triangular), rounding column i with error e changes column j > i by -e U_ij / U_ii.

Groups that lie within a row are fitted when their first column's turn comes, on the weights as compensated so far;
groups of a single column are fitted beforehand. Columns of single-column groups go in order of falling H_ii: the
largest inputs are rounded while all others can still compensate.
"""

import math

import torch
from torch import Tensor

from qpipe.ptq.fitting import Fit, Rounder, Tables, fit_groups, tables
from qpipe.ptq.groups import Layout, largest_divisor
from qpipe.ptq_methods import Kind

_LAZY_COLUMNS = 128


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with (H + damping mean(diag H) 1)^-1 = U^T U; float64 inside, float32 out.

    Inputs that are always 0 get a diagonal of 1: nothing depends on their weights.
    """
    h = second_moment.double()
    diagonal = h.diagonal().clone()
    dead = diagonal == 0
    added = damping * float(diagonal[~dead].mean()) if not dead.all() else 0.0
    h = h + torch.diag(dead.double() + added)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()


def round_with_feedback(
    weight: Tensor,
    second_moment: Tensor,
    layout: Layout,
    depth: Tensor,
    kind: Kind,
    offset: bool,
    damping: float = 0.01,
) -> tuple[Fit, Tensor]:
    """Quantize a layer column by column.

    Parameters
    ----------
    weight
        Weights, (out, in), float32.
    second_moment
        E[x x^T] of the layer's inputs, (in, in).
    layout, depth
        Groups and their depths (groups,).
    kind, offset
        Family of code books; whether groups have an offset.
    damping
        Share of the mean diagonal added to the second moment.

    Returns
    -------
    The fit and the codes (groups, size), uint8.
    """
    state = _Columns(weight, layout, depth, kind, offset)
    order = torch.arange(layout.width, device=weight.device)
    if layout.columns == 1:
        order = torch.argsort(second_moment.diagonal(), descending=True, stable=True)
    factor = inverse_factor(second_moment[order][:, order], damping)
    w = weight[:, order].T.contiguous()  # one input column after the other in memory
    step, places = _lazy_columns(layout.columns), order.tolist()
    for start in range(0, layout.width, step):
        stop = min(start + step, layout.width)
        errors = torch.empty(stop - start, w.shape[1], device=w.device)
        for i in range(start, stop):
            if i % layout.columns == 0:
                state.begin(places[i], w)
            error = errors[i - start]
            torch.sub(w[i], state.round(places[i], w[i]), out=error)
            error /= factor[i, i]
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return state.result()


def _lazy_columns(columns: int) -> int:
    """Columns after which later ones are updated in one product: groups start with all earlier errors applied."""
    if columns >= _LAZY_COLUMNS:
        return largest_divisor(columns, _LAZY_COLUMNS)
    return columns * max(1, _LAZY_COLUMNS // columns)


class _Columns:
    """The growing result: scale and offset of each group, codes of each column."""

    def __init__(self, weight: Tensor, layout: Layout, depth: Tensor, kind: Kind, offset: bool) -> None:
        self.layout, self.depth, self.kind, self.offset = layout, depth, kind, offset
        self.book: Tables = tables(kind, weight.device)
        self.codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)
        self.per_cluster = layout.width // layout.columns
        groups = torch.zeros(layout.groups, device=weight.device)
        self.found = Fit(depth, groups, groups.clone(), groups.clone())
        if layout.columns == 1:
            self.found = fit_groups(layout.gather(weight), depth, kind, offset)

    def begin(self, column: int, weight: Tensor) -> None:
        """Begin with the groups that start at a column; fit them on the present weights, (in, out), if not yet done."""
        if self.layout.columns > 1:
            self._fit(column, weight)
        group = self.layout.cluster * self.per_cluster + column // self.layout.columns
        self.rounder = Rounder(self.depth[group], self.found.scale[group], self.found.offset[group], self.book)

    def _fit(self, column: int, weight: Tensor) -> None:
        layout = self.layout
        stop = column + layout.columns
        part = Layout(layout.rows, layout.columns, layout.cluster, layout.columns)
        members = torch.arange(layout.clusters, device=weight.device) * self.per_cluster + column // layout.columns
        found = fit_groups(
            part.gather(weight[column:stop].T),
            self.depth[members],
            self.kind,
            self.offset,
        )
        self.found.scale[members], self.found.offset[members] = found.scale, found.offset

    def round(self, column: int, weight: Tensor) -> Tensor:
        """Round one column, shape (out,): keep its codes, return its values."""
        codes = self.rounder.codes(weight)
        self.codes[column] = codes
        return self.rounder.values(codes)

    def result(self) -> tuple[Fit, Tensor]:
        """Return the fit and the codes by group."""
        return self.found, self.layout.gather(self.codes.T)


def output_error(difference: Tensor, second_moment: Tensor) -> float:
    """Return E ||(W - Wq) x||^2 of a layer for a weight difference (out, in)."""
    return math.fsum(((difference @ second_moment) * difference).sum(dim=1).double().tolist())

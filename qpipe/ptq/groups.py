"""Which weights share a depth, a scale and an offset.

A layer's weight W, shape (out, in), is cut into groups of `rows` x `columns` weights. Two shapes matter: one row x many
columns, the usual contiguous group; and many rows x one column, CVXQ's group, which lets every input feature have its
own depth. For the latter, rows that are alike should meet: rows are sorted by how much their errors matter and cut into
clusters of `rows`, and the file keeps each row's cluster.

Statistics are kept per weight, (out, in), and never per group: when rows are clustered anew their statistics move with
them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How one layer is cut.

    Attributes
    ----------
    rows, columns
        Size of a group; they divide the layer's shape.
    cluster
        Cluster of each row, shape (out,), int64; every cluster has `rows` rows.
    width
        Input features.
    """

    rows: int
    columns: int
    cluster: Tensor
    width: int

    @property
    def clusters(self) -> int:
        """Clusters of rows (count)."""
        return len(self.cluster) // self.rows

    @property
    def groups(self) -> int:
        """Groups of the layer (count); group = cluster * (width / columns) + block of columns."""
        return self.clusters * (self.width // self.columns)

    @property
    def size(self) -> int:
        """Weights per group (count)."""
        return self.rows * self.columns

    def gather(self, matrix: Tensor) -> Tensor:
        """Cut a matrix (out, in) into groups (groups, size)."""
        order = torch.argsort(self.cluster, stable=True)
        blocks = matrix[order].view(self.clusters, self.rows, -1, self.columns)
        return blocks.transpose(1, 2).reshape(self.groups, self.size)

    def scatter(self, groups: Tensor) -> Tensor:
        """Put groups (groups, size) back into a matrix (out, in)."""
        blocks = groups.view(self.clusters, -1, self.rows, self.columns).transpose(1, 2)
        order = torch.argsort(self.cluster, stable=True)
        matrix = torch.empty(len(order), self.width, dtype=groups.dtype, device=groups.device)
        matrix[order] = blocks.reshape(len(order), self.width)
        return matrix

    def index_bits(self) -> int:
        """Bits that the clusters of all rows take in the file; none where rows stand in their own order."""
        return len(self.cluster) * math.ceil(math.log2(self.clusters)) if self.shuffled and self.clusters > 1 else 0

    @property
    def shuffled(self) -> bool:
        """Whether clusters differ from runs of neighbouring rows."""
        return not torch.equal(self.cluster, _neighbours(len(self.cluster), self.rows, self.cluster.device))


def plain_layout(out: int, width: int, rows: int, columns: int, device: torch.device | str = "cpu") -> Layout:
    """Cut a layer into groups of neighbouring rows; sizes are lowered to the next divisors of the layer's shape.

    `columns` 0 stands for the whole width.
    """
    rows, columns = largest_divisor(out, rows), largest_divisor(width, columns or width)
    return Layout(rows, columns, _neighbours(out, rows, device), width)


def clustered_layout(weight: Tensor, importance: Tensor, rows: int, columns: int) -> Layout:
    """Cut a layer into groups whose rows are alike: sorted by log variance + log mean importance (2409.02026).

    Parameters
    ----------
    weight, importance
        Weight and its squared sensitivities, both (out, in).
    rows, columns
        Wanted group size; lowered to divisors of the layer's shape.
    """
    out, width = weight.shape
    layout = plain_layout(out, width, rows, columns, weight.device)
    # A row of zeros sorts first whatever its sensitivity: 1e-30 stands for log 0.
    key = (weight.var(dim=1, correction=0) * importance.mean(dim=1)).clamp_min(1e-30).log2()
    cluster = torch.empty_like(layout.cluster)
    cluster[torch.argsort(key, stable=True)] = layout.cluster
    return Layout(layout.rows, layout.columns, cluster, width)


def largest_divisor(total: int, limit: int) -> int:
    """Return the largest divisor of `total` up to `limit`."""
    return max(d for d in range(1, min(limit, total) + 1) if total % d == 0)


def _neighbours(out: int, rows: int, device: torch.device | str) -> Tensor:
    return torch.arange(out, device=device) // rows

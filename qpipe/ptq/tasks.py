"""A layer to be quantized: its weight cut into groups, what errors cost there, and what each depth leaves of them.

Errors at every depth depend on the weight and the groups alone: they are measured once, however many rounds of
sensitivities and however many budgets follow.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qpipe.compress.rotation import rotate
from qpipe.ptq.allocation import Array
from qpipe.ptq.codebooks import MAX_DEPTH
from qpipe.ptq.fitting import depth_costs
from qpipe.ptq.groups import Layout, clustered_layout, plain_layout
from qpipe.ptq.layer import SCALE_BITS, rotation_block
from qpipe.ptq_methods import Method

_IMPORTANCE_FLOOR = 0.01
"""Share of the layer's mean sensitivity that every group has at least: estimates from few samples touch 0."""
_TABLE_GROUPS = 256
"""Groups of a layer that its distortion table is measured on."""


@dataclass
class LayerTask:
    """One layer as planning and rounding see it.

    Attributes
    ----------
    weight
        Dense weight, rotated where the method rotates, (out, in), float32.
    importance
        Squared sensitivities, (out, in), or None for plain squared errors.
    layout, rotation
        Groups; block of the rotation (0: none).
    adds_bias
        Whether the method adds a bias that the model did not have.
    errors
        Squared error of every group at every depth, (groups, 9), float64, once it has been measured.
    table
        Error over variance at every depth, (9,), measured on some groups, once it has been. Both depend on the weight
        and the layout alone, so they serve any number of rounds.
    """

    weight: Tensor
    importance: Tensor | None
    layout: Layout
    rotation: int
    adds_bias: bool
    errors: Array | None = None
    table: Array | None = None

    def group_importance(self) -> Tensor:
        """Return the mean squared sensitivity of each group, shape (groups,); ones where nothing was measured."""
        if self.importance is None:
            return torch.ones(self.layout.groups, device=self.weight.device)
        groups = self.layout.gather(self.importance).mean(dim=1)
        return groups.clamp_min(_IMPORTANCE_FLOOR * float(groups.mean()))

    def group_variance(self, method: Method) -> Tensor:
        """Return the variance of each group, shape (groups,): around its mean where the method stores one, else 0."""
        groups = self.layout.gather(self.weight)
        center = groups.mean(dim=1, keepdim=True) if method.offset else 0.0
        return (groups - center).square().mean(dim=1)

    def group_errors(self, method: Method) -> Array:
        """Return the squared error of every group at every depth, (groups, 9)."""
        if self.errors is None:
            found = depth_costs(self.layout.gather(self.weight), method.codebook, method.offset)
            self.errors = found.double().cpu().numpy()
        return self.errors

    def distortion_table(self, method: Method) -> Array:
        """Return D(B) of the layer, error over variance at every depth, (9,), measured on some of its groups."""
        if self.table is None:
            groups = self.layout.gather(self.weight)
            count = min(len(groups), _TABLE_GROUPS)
            chosen = torch.linspace(0, len(groups) - 1, count, device=groups.device).round().long()
            errors = depth_costs(groups[chosen], method.codebook, method.offset).double().sum(dim=0).cpu().numpy()
            # A layer of constants has nothing to lose at any depth.
            self.table = np.asarray(errors / errors[0] if errors[0] > 0 else np.zeros(MAX_DEPTH + 1))
        return self.table

    def tempered(self, power: float) -> "LayerTask":
        """Return the same layer with its sensitivities raised to a power."""
        return replace(self, importance=None if self.importance is None else self.importance**power)

    def fixed_bits(self, method: Method) -> int:
        """Bits that every choice of depths spends, without the indices of the depths."""
        bits = self.layout.index_bits() + (self.layout.groups * SCALE_BITS if method.offset else 0)
        return bits + (len(self.weight) * SCALE_BITS if self.adds_bias else 0)


def make_task(
    weight: Tensor, importance: Tensor | None, method: Method, has_bias: bool, layout: Layout | None = None
) -> LayerTask:
    """Cut a layer (out, in) into the method's groups, or into given ones."""
    rotation = rotation_block(method.rotation, weight.shape[1])
    if rotation:
        weight = rotate(weight, rotation)
    if layout is None and method.clustered:
        reference = torch.ones_like(weight) if importance is None else importance
        layout = clustered_layout(weight, reference, method.rows, method.columns)
    elif layout is None:
        layout = plain_layout(len(weight), weight.shape[1], method.rows, method.columns, weight.device)
    return LayerTask(weight, importance, layout, rotation, method.bias_correction and not has_bias)

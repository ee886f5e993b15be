"""Weights of many layers rotated and rounded in one launch, and their gradients finished in another.

A layer's weight is a few megabytes, so that a kernel per layer and direction mostly starts and ends: those of a 30M
model take 0.7 ms of a step, where memory needs a seventh of that. In a captured training step weights change once, so
all of them can be rounded before the first micro-batch. Products then leave their gradient, that of the rounded weight,
where the weight's own belongs (float32, summed over micro-batches), and one launch turns all of those into gradients of
the weights, in place: the rule, drop what is gated and rotate, is linear.

A program learns from its row of a table which rows of which weight are its own. Copies and gates are allocated once;
gradients get their addresses while the step is captured, and nothing can be copied to the device then. So the table is
read by the captured launch, and the addresses filled in after the capture and before the first replay. A gradient at
address 0 is no work.

Numbers are those of `qpipe.compress.triton_rounding`. Imported only where there is a GPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpipe.compress.rotation import hadamard
from qpipe.compress.triton_rounding import BITS, load_matrix, mean_of_squares, rotate_gated_blocks, round_blocks
from qpipe.triton_launch import launch

_TILE, _WARPS, _STAGES = 64, 4, 2
"""Rows of a program, its warps, and blocks on their way from memory at a time."""

_COLUMNS: tl.constexpr = tl.constexpr(6)
"""Of the table: addresses of weight, copy, gates and gradient; how many rows, and numbers in each."""


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    table, hadamard, multiplier: tl.constexpr, top: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
    back: tl.constexpr, stages: tl.constexpr, bits: tl.constexpr, root: tl.constexpr, copies: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0).to(tl.int64) * _COLUMNS
    weight = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.float32)), 16)
    copy = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(copies)), 16)
    gate = tl.load(entry + 2).to(tl.pointer_type(tl.int16))
    width = tl.multiple_of(tl.load(entry + 5).to(tl.int32), block)
    row = tl.arange(0, tile)
    inside = (row < tl.load(entry + 4))[:, None]
    scale = tl.sqrt(mean_of_squares(weight, row, inside, width, block))[:, None] * multiplier
    matrix = load_matrix(hadamard, block, True)
    round_blocks(weight, matrix, scale, copy, gate, row, inside, 0, width, width, top, block, back, stages, bits, root)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    table, hadamard, block: tl.constexpr, tile: tl.constexpr, back: tl.constexpr, stages: tl.constexpr,
    bits: tl.constexpr, root: tl.constexpr,
):  # fmt: skip
    entry = table + tl.program_id(0).to(tl.int64) * _COLUMNS
    address = tl.load(entry + 3)
    if address != 0:
        gradient = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
        gate = tl.load(entry + 2).to(tl.pointer_type(tl.int16))
        width = tl.multiple_of(tl.load(entry + 5).to(tl.int32), block)
        row = tl.arange(0, tile)
        inside = (row < tl.load(entry + 4))[:, None]
        matrix = load_matrix(hadamard, block, True)
        rotate_gated_blocks(
            gradient, matrix, gate, gradient, row, inside, 0, width, width,
            tl.float32, block, back, stages, bits, root,
        )  # fmt: skip


class RoundedWeights:
    """Weights rounded alike in a CUDA graph: make it, `round` and `finish` in the capture, `fill` it, then replay.

    It has to live as long as the graph, which reads its table and writes its copies.

    Parameters
    ----------
    weights
        Contiguous float32 matrices (rows, width) on a GPU, rotated in the same block.
    block
        Numbers that are rotated together; divides every width.
    rounding
        What is done to them: step in standard deviations, half the number of levels, whether copies are rotated back.
    dtype
        Of the copies, 16 bits.

    Attributes
    ----------
    copies
        The rounded weights, in the order and shapes of the weights.
    """

    def __init__(
        self, weights: Sequence[torch.nn.Parameter], block: int, rounding: tuple[float, float, bool], dtype: torch.dtype
    ) -> None:
        self.weights, self._block = weights, block
        self._multiplier, self._top, self._back = rounding
        self.copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        gates = [weight.numel() // BITS for weight in weights]
        self._gates = torch.empty(sum(gates), dtype=torch.int16, device=weights[0].device).split(gates)
        self._signs = hadamard(block, weights[0].device, torch.bfloat16)
        self._copies_type = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
        # The longest rows first: programs that come late find little to do.
        self._order = sorted(range(len(weights)), key=lambda number: -weights[number].shape[1])
        self._table = torch.cat([self._entries(number) for number in self._order]).to(weights[0].device)
        self.round()  # loads both kernels, which a capture does not allow
        self.finish()

    def round(self) -> None:
        """Write the copies and the gates."""
        launch(
            _round, (len(self._table),),
            self._table, self._signs, multiplier=self._multiplier, top=self._top,
            copies=self._copies_type, **self._constants(),
        )  # fmt: skip

    def finish(self) -> None:
        """Turn gradients of the copies, which lie where the weights' belong, into gradients of the weights."""
        launch(_finish, (len(self._table),), self._table, self._signs, **self._constants())

    def fill(self) -> None:
        """Write into the table where the gradients lie, each contiguous, in float32."""
        self._table.copy_(torch.cat([self._entries(number) for number in self._order]))

    def _entries(self, number: int) -> Tensor:
        """Return a weight's rows of the table, shape (programs, columns), on the CPU."""
        weight, copy, gate = self.weights[number], self.copies[number], self._gates[number]
        rows, width = weight.shape
        first = torch.arange(0, rows, _TILE)
        gradient = torch.zeros_like(first) if weight.grad is None else weight.grad.data_ptr() + 4 * width * first
        columns = [
            weight.data_ptr() + 4 * width * first,
            copy.data_ptr() + 2 * width * first,
            gate.data_ptr() + 2 * (width // BITS) * first,
            gradient,
            (rows - first).clamp(max=_TILE),
            torch.full_like(first, width),
        ]
        return torch.stack(columns, dim=1)

    def _constants(self) -> dict[str, object]:
        return {
            "block": self._block, "tile": _TILE, "back": self._back, "stages": _STAGES, "bits": BITS,
            "root": self._block**-0.5, "num_warps": _WARPS,
        }  # fmt: skip

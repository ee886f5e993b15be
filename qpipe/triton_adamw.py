"""AdamW and gradient clipping in one launch for all parameters, for training steps that are captured as CUDA graphs.

    g = min(1, max_norm / (norm + 1e-6)) * gradient
    m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
    p = p - rate decay p - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)

(Loshchilov and Hutter, 1711.05101, in torch's order of operations, with torch's clipping.) The library scales all
gradients in one pass, writing them back, and updates in a second one, cut into pieces so large that a small model fills
a fraction of the GPU. Here gradients are scaled as they are read, and each program updates `_NUMBERS` neighbours. Where
products read a weight in 16 bits, that copy is written with the weight.

A program learns from its row of a table where its numbers lie. Gradients get their addresses while the step is
captured, and nothing can be copied to the device then; so the table is allocated before, read by the captured launch,
and filled after the capture and before the first replay. A row of zeros is no work.

Moments and counts of steps stay the optimizer's own, so checkpoints are torch's. Arithmetic is float32 but for the bias
corrections, where 1 - beta^t loses digits. Imported only where there is a GPU.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpipe.errors import QpipeError
from qpipe.triton_launch import launch

_NUMBERS = 2048
"""Numbers that a program updates; a multiple of 4, so that every program starts at a multiple of 16 bytes."""

_WARPS = 4

_COLUMNS: tl.constexpr = tl.constexpr(7)
"""Of the table: addresses of parameter, gradient, first and second moment and count of steps; how many numbers; address
of a 16-bit copy, 0 where there is none."""

_ALIGNMENT = 16
"""Bytes that a thread reads at once; torch allocates at multiples of 512."""


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    parameter, gradient, first, second, copy, has_copy, place, inside, coefficient, decay, rate, root,
    beta1: tl.constexpr, beta2: tl.constexpr, epsilon: tl.constexpr,
):  # fmt: skip
    g = tl.load(gradient + place, mask=inside) * coefficient
    m = tl.load(first + place, mask=inside) * beta1 + g * (1.0 - beta1)
    v = tl.load(second + place, mask=inside) * beta2 + g * g * (1.0 - beta2)
    p = tl.load(parameter + place, mask=inside)
    p -= decay * p
    p -= rate * m / (tl.sqrt(v) / root + epsilon)
    tl.store(parameter + place, p, mask=inside)
    tl.store(first + place, m, mask=inside)
    tl.store(second + place, v, mask=inside)
    if has_copy:
        tl.store(copy + place, p.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    table, decays, learning_rate, norm,
    max_norm: tl.constexpr, beta1: tl.constexpr, beta2: tl.constexpr, log_beta1: tl.constexpr, log_beta2: tl.constexpr,
    epsilon: tl.constexpr, numbers: tl.constexpr, copies: tl.constexpr,
):  # fmt: skip
    row = table + tl.program_id(0).to(tl.int64) * _COLUMNS
    count = tl.load(row + 5)
    if count > 0:
        parameter = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
        gradient = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
        first = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
        second = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
        address = tl.load(row + 6)
        copy = tl.multiple_of(address.to(tl.pointer_type(copies)), 16)
        step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
        rate = tl.load(learning_rate)
        decay = rate * tl.load(decays + tl.program_id(0))
        rate /= (1.0 - tl.exp(step * log_beta1)).to(tl.float32)
        root = tl.sqrt((1.0 - tl.exp(step * log_beta2)).to(tl.float32))
        coefficient = max_norm / (tl.load(norm) + 1e-6)
        coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)  # a minimum would lose NaN
        place = tl.arange(0, numbers)
        if count == numbers:  # without a mask, so that threads read 16 bytes at once
            _update(
                parameter, gradient, first, second, copy, address != 0, place, None, coefficient, decay, rate, root,
                beta1, beta2, epsilon,
            )  # fmt: skip
        else:
            _update(
                parameter, gradient, first, second, copy, address != 0, place, place < count, coefficient, decay, rate,
                root, beta1, beta2, epsilon,
            )  # fmt: skip


@triton.jit
def _squares(table, sums, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    row = table + tl.program_id(0).to(tl.int64) * _COLUMNS
    count = tl.load(row + 5)
    gradient = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    place = tl.arange(0, numbers)
    if count == numbers:  # noqa: SIM108 - a branch of the kernel, not a choice of numbers
        g = tl.load(gradient + place)
    else:
        g = tl.load(gradient + place, mask=place < count, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(g * g))


def fits(optimizer: torch.optim.AdamW) -> bool:
    """Whether `CapturedAdamW` can take an optimizer's steps: else they are torch's to take.

    All parameters and moments in float32, contiguous and aligned; rate, betas and epsilon common to all groups.
    """
    groups = optimizer.param_groups
    tensors = [parameter for group in groups for parameter in group["params"]]
    tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    rates = {id(group["lr"]) for group in groups}
    constants = {(*group["betas"], group["eps"]) for group in groups}
    alike = len(rates) == len(constants) == 1 and isinstance(groups[0]["lr"], Tensor)
    return alike and all(tensor.dtype == torch.float32 and _in_place(tensor) for tensor in tensors)


class CapturedAdamW:
    """The step of an optimizer inside a CUDA graph: make it, `launch` it in the capture, `fill` it, then replay.

    It has to live as long as the graph, which reads its table.

    Parameters
    ----------
    optimizer
        AdamW that `fits`, with the state of every parameter that gets gradients.
    max_norm
        Gradients are scaled down where their norm is larger.
    copies
        Copies of parameters in one 16-bit type, which each step writes anew.
    """

    def __init__(
        self, optimizer: torch.optim.AdamW, max_norm: float, copies: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        self.optimizer, self.max_norm, self._copies = optimizer, max_norm, copies or {}
        half = any(copy.dtype == torch.float16 for copy in self._copies.values())
        self._copies_type = tl.float16 if half else tl.bfloat16
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._programs = sum(triton.cdiv(parameter.numel(), _NUMBERS) for parameter in parameters)
        device = parameters[0].device
        self._table = torch.zeros(self._programs, _COLUMNS.value, dtype=torch.int64, device=device)
        self._decays = torch.zeros(self._programs, device=device)
        self._updated: list[tuple[Tensor, Tensor, dict[str, Tensor], float]] = []
        self._sums = torch.zeros(self._programs, device=device)
        self._run(self._total_norm())  # no work yet: loads the kernels, which a capture does not allow

    def launch(self) -> Tensor:
        """Count a step and update every parameter that has a gradient; return the norm () of all gradients.

        Raises
        ------
        QpipeError
            A parameter has a gradient and no moments.
        """
        self._collect()
        torch._foreach_add_([state["step"] for _, _, state, _ in self._updated], 1)
        norm = self._total_norm()
        self._run(norm)
        return norm

    def fill(self) -> None:
        """Write the table of what was launched."""
        rows, decays = [], []
        for parameter, gradient, state, decay in self._updated:
            starts = torch.arange(0, parameter.numel(), _NUMBERS)
            arrays = (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
            addresses = [array.data_ptr() + starts * array.element_size() for array in arrays]
            step = torch.full_like(starts, state["step"].data_ptr())
            copy = torch.zeros_like(starts)
            if parameter in self._copies:
                copy = self._copies[parameter].data_ptr() + 2 * starts
            rows.append(torch.stack([*addresses, step, (parameter.numel() - starts).clamp(max=_NUMBERS), copy], dim=1))
            decays.append(torch.full((len(starts),), decay))
        used = sum(len(part) for part in rows)
        self._table[:used].copy_(torch.cat(rows))
        self._decays[:used].copy_(torch.cat(decays))

    def _collect(self) -> None:
        """Find gradients and moments; copy a gradient that lies in another way than its parameter."""
        self._updated = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not (state := self.optimizer.state.get(parameter)):
                    raise QpipeError(f"a parameter {tuple(parameter.shape)} gets its first gradient in a captured step")
                gradient = (
                    parameter.grad
                    if _in_place(parameter.grad)
                    else parameter.grad.clone(memory_format=torch.contiguous_format)
                )
                self._updated.append((parameter, gradient, state, group["weight_decay"]))

    def _total_norm(self) -> Tensor:
        launch(_squares, (self._programs,), self._table, self._sums, numbers=_NUMBERS, num_warps=_WARPS)
        return self._sums.sum().sqrt()

    def _run(self, norm: Tensor) -> None:
        group: dict[str, Any] = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        launch(
            _adamw, (self._programs,),
            self._table, self._decays, group["lr"], norm,
            max_norm=self.max_norm, beta1=beta1, beta2=beta2, log_beta1=_log(beta1), log_beta2=_log(beta2),
            epsilon=group["eps"], numbers=_NUMBERS, copies=self._copies_type, num_warps=_WARPS,
        )  # fmt: skip


def _in_place(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf

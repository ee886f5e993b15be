"""Going through a network one block at a time, with every block reading what the quantized blocks before it give.

Calibration sequences are sent to the first block's door once; from there each block is run on its own. Besides the
network only the hidden states of the calibration sequences and the statistics of one block are held, whatever the
depth of the network.
"""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.ptq.network import Network

_BLOCK = 256
"""Least width of a block of second moments: narrower products are slower than what they save."""


class _AtTheDoor(Exception):
    """Stops a forward pass where nothing that follows is needed."""


@dataclass
class Inputs:
    """What a layer is fed, over all calibration tokens.

    Attributes
    ----------
    mean
        Mean input, shape (in,).
    second_moment
        E[x x^T], shape (in, in), or None where it was not asked for.
    """

    mean: Tensor
    second_moment: Tensor | None


@dataclass
class _Call:
    """A block's arguments for one batch; the hidden state comes first."""

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


@torch.no_grad()
def stream(
    network: Network, batches: list[Tensor], second_moments: bool
) -> Iterator[tuple[int, nn.Module, dict[str, Inputs]]]:
    """Yield (number, block, inputs by layer name) block by block.

    The caller changes the block's weights before it asks for the next: outputs are computed from the changed block.

    Parameters
    ----------
    batches
        Calibration token ids, each (B, T), on the network's device.
    second_moments
        Whether to gather E[x x^T].
    """
    calls = [_at_first_block(network, tokens) for tokens in batches]
    for number, block in enumerate(network.blocks):
        yield number, block, _gather(network, block, calls, second_moments)
        if number + 1 < len(network.blocks):
            for call in calls:
                call.hidden = _run(network, block, call)


def _gather(network: Network, block: nn.Module, calls: list[_Call], second_moments: bool) -> dict[str, Inputs]:
    """Return what the layers of a block are fed.

    The layer that was last to be called in the first batch stops the others at its door: nobody reads its output.
    """
    linears = network.block_linears(block)
    gathered = {name: _Moments(second_moments) for name in linears}
    called: list[str] = []

    def take(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        gathered[name].take(inputs[0])
        called.append(name)
        if name == last:
            raise _AtTheDoor

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(partial(take, name)).remove)
        last = None
        for call in calls:
            with suppress(_AtTheDoor):
                _run(network, block, call)
            last = called[-1]
    return {name: moments.result() for name, moments in gathered.items()}


def _at_first_block(network: Network, tokens: Tensor) -> _Call:
    caught: list[_Call] = []

    def stop(module: nn.Module, rest: tuple[Any, ...], named: dict[str, Any]) -> None:
        if rest:
            caught.append(_Call(rest[0], rest[1:], named))
        else:
            others = {key: value for key, value in named.items() if key != "hidden_states"}
            caught.append(_Call(named["hidden_states"], (), others))
        raise _AtTheDoor

    handle = network.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with network.arithmetic():
            network.hidden(tokens)
    except _AtTheDoor:
        pass
    finally:
        handle.remove()
    return caught[0]


def _run(network: Network, block: nn.Module, call: _Call) -> Tensor:
    with network.arithmetic():
        output = block(call.hidden, *call.rest, **call.named)
    return output[0] if isinstance(output, tuple) else output


class _Moments:
    """Sums over the tokens that go through a layer; float64 for the mean, float32 products summed in float64."""

    def __init__(self, second: bool) -> None:
        self.second = second
        self.tokens = 0
        self.total: Tensor | None = None
        self.outer: Tensor | None = None

    def take(self, inputs: Tensor) -> None:
        """Take in one batch of inputs, (..., in)."""
        x = inputs.detach().flatten(0, -2).float()
        self.tokens += len(x)
        total = x.sum(0, dtype=torch.float64)
        self.total = total if self.total is None else self.total + total
        if self.second:
            if self.outer is None:
                self.outer = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
            with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the sum would not be positive definite
                _add_upper(self.outer, x)

    def result(self) -> Inputs:
        """Return the means."""
        assert self.total is not None
        second = None
        if self.outer is not None:
            upper = (self.outer / self.tokens).float()
            second = upper.triu() + upper.triu(1).T
        return Inputs((self.total / self.tokens).float(), second)


def _add_upper(total: Tensor, x: Tensor) -> None:
    """Add x^T x to `total` (in, in) in blocks, those below the diagonal left out: the matrix is symmetric."""
    width = x.shape[1]
    step = max(_BLOCK, -(-width // 8))
    for start in range(0, width, step):
        stop = min(start + step, width)
        total[:stop, start:stop] += x[:, :stop].T @ x[:, start:stop]

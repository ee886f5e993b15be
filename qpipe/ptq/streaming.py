"""Going through a network one block at a time, with every block reading what the quantized blocks before it give.

Calibration sequences are sent to the first block's door once; from there each block is run on its own. Besides the
network only the hidden states of the calibration sequences and the statistics of one block are held, whatever the
depth of the network.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.ptq.network import Network

_BLOCK = 256
"""Least width of a block of second moments: narrower products are slower than what they save."""


class _AtTheDoor(Exception):
    """Stops a forward pass once the first block has been called."""


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
        gathered = {name: _Moments(second_moments) for name in network.block_linears(block)}
        with ExitStack() as hooks:
            for name, linear in network.block_linears(block).items():
                hooks.callback(linear.register_forward_hook(gathered[name].hook).remove)
            for call in calls:
                _run(network, block, call)
        yield number, block, {name: moments.result() for name, moments in gathered.items()}
        for call in calls:
            call.hidden = _run(network, block, call)


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

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Take in one batch of inputs."""
        x = inputs[0].detach().flatten(0, -2).float()
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

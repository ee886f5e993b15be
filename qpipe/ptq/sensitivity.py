"""What an error in a weight costs at the output: second moments of gradients through random probes.

For small errors dW, taken as independent, the expected squared change of an output z = f(W) per token is

    sum_ij  G2_ij dW_ij^2,        G2_ij = E_t sum_c (d z_tc / d W_ij)^2

One backward pass with a random cotangent a_tc of mean 0 and covariance I gives, per weight, a number whose square has
exactly this expectation: E (sum_tc a_tc d z_tc / dW)^2 = sum_tc (d z_tc / dW)^2, because all cross terms vanish. So a
sequence costs one backward pass instead of one per token and component (CVXQ, 2409.02026, retains the graph and goes
backward for 17 tokens, one principal component a sequence). Which output counts is a choice of cotangent:

hidden
    random signs on all features of the state before the head: the squared error of that state. With `basis` (K, D)
    of orthonormal rows, the error inside the span of K directions.
loss
    the gradient of the log-probability of a token drawn from the model's own prediction. Its second moment is the
    Fisher information, so 1/2 sum G2 dW^2 is the expected rise of the loss in nats.

Sums are float32 (squares of gradients underflow in float16) and kept per weight, so that rows may be clustered anew at
any time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qpipe.ptq.network import Network, on_each


@dataclass
class Sensitivity:
    """Running sums of squared gradients.

    Attributes
    ----------
    sums
        Per layer, shape (out, in), float32.
    tokens
        Token positions that were probed (count).
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def mean(self, name: str) -> Tensor:
        """Return G2 of a layer per token, shape (out, in)."""
        return self.sums[name] / self.tokens


Probe = Callable[[Tensor, torch.Generator], Tensor]
"""(hidden (B, T, D), generator) -> cotangent (B, T, D)"""


def hidden_probe(basis: Tensor | None = None) -> Probe:
    """Return the probe of the hidden state's error, within the rows of `basis` (K, D) where given."""

    def probe(hidden: Tensor, generator: torch.Generator) -> Tensor:
        if basis is None:
            return random_signs(hidden.shape, generator, hidden.device)
        signs = random_signs((*hidden.shape[:-1], len(basis)), generator, hidden.device)
        return signs @ basis

    return probe


def loss_probe(network: Network) -> Probe:
    """Return the probe of the loss: gradient of -log p(y), y drawn from p."""

    def probe(hidden: Tensor, generator: torch.Generator) -> Tensor:
        weight = network.head.weight.float()
        # One sequence at a time: probabilities over the vocabulary are far larger than the state.
        return torch.stack([of_sequence(state.float(), weight, generator) for state in hidden])

    def of_sequence(state: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
        probability = torch.softmax(state @ weight.T, dim=-1)
        # Inverse transform sampling with numbers drawn on the CPU: the same on every device.
        draw = torch.rand(len(state), 1, generator=generator).to(state.device)
        drawn = (probability.cumsum(-1) < draw).sum(-1, keepdim=True).clamp_max(len(weight) - 1)
        return probability.scatter_add_(-1, drawn, torch.full_like(draw, -1.0)) @ weight

    return probe


def random_signs(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw -1 or 1 with equal chance."""
    return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(device, torch.float32)


def accumulate(
    network: Network,
    sequences: Tensor,
    into: Sensitivity,
    probe: Probe,
    generator: torch.Generator,
    positions: int = 0,
) -> None:
    """Add the squared gradients of some sequences at the network's present weights.

    Parameters
    ----------
    sequences
        Token ids, shape (B, T), on the network's device. Sequences go through together; their gradients are squared
        one by one.
    into
        Sums to add to.
    probe, generator
        Where cotangents come from; the generator lives on the CPU.
    positions
        Token positions per sequence that are probed, drawn without replacement; 0 for all.
    """
    with on_each(network, lambda name: _square_hook(name, into)), _differentiable_embedding(network):
        with network.arithmetic():
            hidden = network.hidden(sequences)
        cotangent = probe(hidden.detach(), generator)
        if positions:
            cotangent = cotangent * _some_positions(sequences.shape, positions, generator).to(cotangent)[..., None]
        torch.autograd.backward(hidden, cotangent.to(hidden.dtype))
    into.tokens += sequences.shape[0] * (positions or sequences.shape[1])


def _square_hook(name: str, into: Sensitivity) -> Callable[..., None]:
    def on_forward(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()

        def on_backward(gradient: Tensor) -> None:
            total = into.sums.get(name)
            if total is None:
                total = into.sums[name] = torch.zeros_like(module.weight, dtype=torch.float32)
            # Where a model flattens (B, T) the whole batch is squared at once: unbiased too, with more variance.
            with torch.autocast(x.device.type, enabled=False):
                for g, inputs_of_one in zip(_sequences(gradient), _sequences(x), strict=True):
                    product = g.float().T @ inputs_of_one.float()
                    total.addcmul_(product, product)

        output.register_hook(on_backward)

    return on_forward


def _sequences(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x[None]


def _differentiable_embedding(network: Network) -> RemovableHandle:
    """Let gradients flow from the embedding on: weights themselves take none."""
    return network.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _some_positions(shape: torch.Size, count: int, generator: torch.Generator) -> Tensor:
    """Return a mask (B, T) with `count` positions of each sequence."""
    rank = torch.rand(shape, generator=generator).argsort(dim=1)
    return rank < count


@torch.no_grad()
def principal_basis(network: Network, batches: list[Tensor], count: int) -> Tensor:
    """Return the `count` principal directions of the hidden state, orthonormal rows (count, D), largest first."""
    total, outer, tokens = None, None, 0
    for sequences in batches:
        with network.arithmetic():
            state = network.hidden(sequences).flatten(0, 1).double()
        total = state.sum(0) if total is None else total + state.sum(0)
        outer = state.T @ state if outer is None else outer + state.T @ state
        tokens += len(state)
    assert total is not None
    assert outer is not None
    mean = total / tokens
    _, vectors = torch.linalg.eigh(outer / tokens - torch.outer(mean, mean))
    return vectors.flip(1).T[:count].float().contiguous()

"""How much the output cares about each layer, by the linearity theorem (HIGGS, 2411.17525).

For small errors that are unrelated to the weights, the loss rises by sum_l alpha_l t_l^2, where t_l^2 is the squared
error of layer l over its squared norm, whatever quantizer made it. alpha_l is measured by adding Gaussian noise of a
known t^2 to one layer at a time. The rise is measured as the divergence KL(original || noisy) of the predicted tokens,
which needs no labels: random token ids serve where no text is given, so that the method is data-free.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qpipe.ptq.network import Network

NOISE = 0.01
"""t^2 of the noise: small enough for the linear regime, large enough to stand above rounding."""
_ROWS = 1024


@torch.no_grad()
def layer_coefficients(network: Network, tokens: Tensor, seed: int, report: Callable[[str], None]) -> dict[str, float]:
    """Return alpha of each layer in nats/token per unit of relative squared error.

    Parameters
    ----------
    tokens
        Token ids, shape (B, T), on the network's device.
    seed
        Of the noise.
    """
    reference = _hidden(network, tokens)
    generator = torch.Generator().manual_seed(seed)
    coefficients = {}
    for name, linear in network.linears().items():
        exact = linear.weight.data.clone()
        noise = torch.randn(exact.shape, generator=generator).to(exact)
        linear.weight.data += noise * (exact.norm() * (NOISE / exact.numel()) ** 0.5)
        coefficients[name] = divergence(network, reference, _hidden(network, tokens)) / NOISE
        linear.weight.data.copy_(exact)
        report(f"sensitivity of {name}: {coefficients[name]:.4g} nats per unit of relative error")
    return coefficients


def _hidden(network: Network, tokens: Tensor) -> Tensor:
    with network.arithmetic():
        parts = [network.hidden(part).flatten(0, 1) for part in tokens.split(8)]
    return torch.cat(parts)


@torch.no_grad()
def divergence(network: Network, reference: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence (nats/token) of predictions from hidden states (M, D) to those of others."""
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    weight = network.head.weight.float()
    for p, q in zip(reference.split(_ROWS), other.split(_ROWS), strict=True):
        log_p = torch.log_softmax(p.float() @ weight.T, dim=-1)
        log_q = torch.log_softmax(q.float() @ weight.T, dim=-1)
        total += (log_p.exp() * (log_p - log_q)).sum().double()
    return float(total) / len(reference)

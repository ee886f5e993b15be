"""Predicted capacity: how many dense parameters a compressed one is worth, before any training.

    rho = L tanh(F log_{1/4} GMSE)^C          (2506.01863, eq. 3)

where log_{1/4} GMSE counts the ideal bits of the error. Coefficients were fitted per family of formats, inside joint
fits with their own exponents, so rho is a prior to compare formats by, not a measurement; multipliers that `qpipe fit`
finds replace it. Parts multiply: rho = rho(bits of W) rho(zeros of W) rho(activations) (section 4.3), which is within
0.01-0.03 from 3 bits up, and pessimistic by up to 0.09 at 2 bits and below.
"""

import math
from typing import Any, NamedTuple

from qpipe.compress.gmse import Gmse, gmse
from qpipe.formats import Representation, TensorFormat, storage_bits


class Coefficients(NamedTuple):
    """One fitted curve from GMSE to capacity."""

    name: str
    ceiling: float
    slope: float
    curvature: float
    source: str


SCALAR = Coefficients("scalar", 1.0, 0.41, 1.39, "2506.01863 table 3, Llama / C4 (0.41 +- 0.02, 1.39 +- 0.08)")
SPARSE = Coefficients(
    "sparse", 1.0, 0.283, 0.484, "least squares on the multipliers of 2506.01863 figure 9 (rmse 0.006)"
)


def capacity_of_error(error: float, coefficients: Coefficients) -> float:
    """rho for a GMSE: the ceiling at 0, 0 at 1 and above."""
    if error >= 1:
        return 0.0
    bits = math.inf if error <= 0 else effective_bits(error)
    return coefficients.ceiling * math.tanh(coefficients.slope * bits) ** coefficients.curvature


def effective_bits(error: float) -> float:
    """Ideal bits of an error: log_{1/4}; the Gaussian rate-distortion bound reaches error 4^-b with b bits."""
    return -math.log(error) / math.log(4)


def _factor(part: TensorFormat | None, **sampling: Any) -> float:
    """rho of one side: a product over its grid and its mask."""
    if part is None:
        return 1.0
    factor = 1.0
    if part.grid is not None:
        alone = part.model_copy(update={"mask": None})
        factor *= capacity_of_error(gmse(alone, **sampling).value, SCALAR)
    if part.mask is not None:
        alone = TensorFormat(mask=part.mask.model_copy(update={"backward": "forward", "band": None}))
        factor *= capacity_of_error(gmse(alone, **sampling).value, SPARSE)
    return factor


def capacity(
    representation: Representation, *, width: int = 4096, samples: int = 2**20, seed: int = 0
) -> dict[str, Any]:
    """The numbers of `qpipe capacity --json` for one representation.

    Parameters
    ----------
    width : rows and columns of the matrix whose bits are counted, and the row length of sampled errors
    samples, seed : of Monte Carlo errors

    Returns
    -------
    `representation`, `bits_per_weight`, `payload_bits`, `gmse` (weights), `activation_gmse`, `effective_bits` (of the
    weights; null for 16-bit ones), `rho`, and `gmse_standard_error` / `activation_gmse_standard_error` where sampled.
    """
    sampling: dict[str, Any] = {"width": width, "samples": samples, "seed": seed}
    weights = gmse(representation.weights, **sampling)
    activations = gmse(representation.activations, **sampling)
    storage = storage_bits(representation, width, width)
    return {
        "representation": representation.name,
        "bits_per_weight": storage.total_bits,
        "payload_bits": storage.payload_bits,
        "gmse": weights.value,
        "activation_gmse": activations.value,
        "effective_bits": effective_bits(weights.value) if weights.value > 0 else None,
        "rho": _factor(representation.weights, **sampling) * _factor(representation.activations, **sampling),
        **_standard_errors(gmse=weights, activation_gmse=activations),
    }


def _standard_errors(**found: Gmse) -> dict[str, float]:
    return {f"{name}_standard_error": e.standard_error for name, e in found.items() if e.standard_error is not None}

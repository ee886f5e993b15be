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
from qpipe.formats.spec import TRAINED_SCALES


class Coefficients(NamedTuple):
    """One fitted curve from GMSE to capacity, and what it was fitted on."""

    name: str
    ceiling: float
    slope: float
    curvature: float
    source: str
    limits: str


SCALAR = Coefficients(
    "scalar",
    1.0,
    0.41,
    1.39,
    "2506.01863 table 3, Llama on C4: slope 0.41 +- 0.02, curvature 1.39 +- 0.08, ceiling 1.0 +- 0.7",
    "fitted on QuEST weights of 1 to 8 bits; used for activations too, where QuEST's public runs refitted with the "
    "same exponents give 0.19, 0.44 and 0.66 at 2, 3 and 4 bits against products of 0.20, 0.45 and 0.67",
)
VECTOR = SCALAR._replace(
    name="vector",
    limits="the scalar curve: for vectors the paper finds a ceiling below 1 that falls with the dimension, but prints "
    "no value, so this is an upper estimate",
)
TRAINED = SCALAR._replace(
    name="trained",
    limits="the scalar curve: for trained scales the paper finds a ceiling below 1 (biased gradient), but prints no "
    "value, so this is an upper estimate",
)
SPARSE = Coefficients(
    "sparse weights",
    1.0,
    0.283,
    0.484,
    "least squares on the multipliers of 2506.01863 figure 9 (sparsity 0.1 to 0.9, rmse 0.006)",
    "always-on magnitude pruning; other figures of the paper give 0.5 to 0.72 at half sparsity, gradual pruning gives "
    "0.87 to 0.89 (2502.16440, 2309.08520)",
)
SPARSE_ACTIVATIONS = Coefficients(
    "sparse activations",
    1.0,
    0.25,
    1.06,
    "least squares on the multipliers of 2506.01863 figure 2b (rmse 0.018)",
    "top-k per token; from another joint fit than the other curves",
)
PRODUCT_LIMITS = (
    "parts multiply: within 0.01-0.03 of joint fits from 3 bits up, too low by up to 0.09 at 2 bits and below, off by "
    "up to 0.1 for sparse weights under absolute-maximum scales at 2 bits"
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


def _factors(representation: Representation, **sampling: Any) -> list[tuple[float, Coefficients]]:
    """rho of every part: the grid and the mask of each side."""
    factors = []
    for part, sparse in ((representation.weights, SPARSE), (representation.activations, SPARSE_ACTIVATIONS)):
        if part is not None and part.grid is not None:
            error = gmse(part.model_copy(update={"mask": None}), **sampling).value
            factors.append((capacity_of_error(error, _curve(part)), _curve(part)))
        if part is not None and part.mask is not None:
            alone = TensorFormat(mask=part.mask.model_copy(update={"backward": "forward", "band": None}))
            factors.append((capacity_of_error(gmse(alone, **sampling).value, sparse), sparse))
    return factors


def _curve(part: TensorFormat) -> Coefficients:
    grid = part.parsed_grid
    if grid is not None and grid.dimension > 1:
        return VECTOR
    return TRAINED if part.scale in TRAINED_SCALES else SCALAR


def capacity(
    representation: Representation, *, width: int = 4096, samples: int = 2**20, seed: int = 0
) -> dict[str, Any]:
    """The numbers of `qpipe capacity --json` for one representation.

    Parameters
    ----------
    width : rows and columns of the matrix whose bits are counted, and the row length of errors that depend on it
    samples, seed : of Monte Carlo errors

    Returns
    -------
    `representation`, `bits_per_weight`, `payload_bits`, `gmse` (weights), `activation_gmse`, `effective_bits` (of the
    weights; null for 16-bit ones), `rho`, `rho_basis` (curves, sources and limits behind it), and
    `gmse_standard_error` / `activation_gmse_standard_error` where sampled.
    """
    sampling: dict[str, Any] = {"width": width, "samples": samples, "seed": seed}
    weights = gmse(representation.weights, **sampling)
    activations = gmse(representation.activations, **sampling)
    storage = storage_bits(representation, width, width)
    factors = _factors(representation, **sampling)
    return {
        "representation": representation.name,
        "bits_per_weight": storage.total_bits,
        "payload_bits": storage.payload_bits,
        "gmse": weights.value,
        "activation_gmse": activations.value,
        "effective_bits": effective_bits(weights.value) if weights.value > 0 else None,
        "rho": math.prod(factor for factor, _ in factors),
        "rho_basis": _basis([curve for _, curve in factors]),
        **_standard_errors(gmse=weights, activation_gmse=activations),
    }


def _basis(curves: list[Coefficients]) -> list[str]:
    """Where rho comes from and how far to trust it, one line per curve."""
    lines = [f"{curve.name}: {curve.source}; {curve.limits}" for curve in dict.fromkeys(curves)]
    return lines + ([PRODUCT_LIMITS] if len(curves) > 1 else [])


def _standard_errors(**found: Gmse) -> dict[str, float]:
    return {f"{name}_standard_error": e.standard_error for name, e in found.items() if e.standard_error is not None}

"""The front of loss against size: which models no smaller one beats, and how sure that is.

A point is a group of runs that differ by their seed alone: same N, D and representation. Its size is counted from the
bits its weights need (`qpipe.accounting.model_mib`), its loss is the mean over seeds. A point is on the front when no
point of the same or smaller size has a lower loss.

The loss of a point is known only up to the noise between seeds, and a front picks minima, so noise puts points on it
that do not belong there. Membership is therefore counted over draws: the noise's variance is pooled over all points
with two or more seeds and drawn from its posterior (scaled inverse chi-square), losses are drawn around their means
with it, and each draw has its front. A representation is called on the front when one of its points is in at least
90 % of the draws.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qpipe.accounting import model_mib
from qpipe.errors import QpipeError

LEVEL = 0.9
"""Share of draws from which on a representation counts as on the front."""
_NEEDED = ("n", "n_compressed", "n_embedding", "bits_per_weight", "payload_bits")


@dataclass(frozen=True)
class Front:
    """Points of a front and how often they are on it.

    Attributes
    ----------
    points
        One row per group of runs, by size: n, d, representation, runs, size_mib, loss (mean, nats/token), on_front
        (of the means), share (of draws in which it is on the front).
    formats
        Representation -> share of draws with at least one of its points on the front, largest first.
    noise
        Pooled standard deviation between seeds (nats/token).
    freedom
        Degrees of freedom of `noise`.
    """

    points: pd.DataFrame
    formats: dict[str, float]
    noise: float
    freedom: int

    @property
    def members(self) -> list[str]:
        """Representations on the front in at least 90 % of the draws."""
        return [name for name, share in self.formats.items() if share >= LEVEL]


def sizes(table: pd.DataFrame, embedding_bits: float, payload: bool) -> NDArray[np.float64]:
    """Return the size of each run's model (MiB): stored bits with norms, or payload bits of the linear layers alone.

    A column `size_mib` in the table is taken as it is (error: neither it nor the counts and bits it is made of).
    """
    if "size_mib" in table:
        return table["size_mib"].to_numpy(float)
    if missing := [name for name in _NEEDED if name not in table]:
        raise QpipeError(
            f"no sizes: the loss table has no column {', '.join(missing)}; use a table of qpipe collect, or add "
            "`size_mib`, the size of each model in MiB"
        )
    linear, embedding = table["n_compressed"].to_numpy(float), table["n_embedding"].to_numpy(float)
    other = table["n"].to_numpy(float) - linear  # all of a dense model, norms otherwise
    bits = table["payload_bits" if payload else "bits_per_weight"].to_numpy(float)
    counted = np.where(payload & (linear > 0), 0.0, other)
    return np.asarray(model_mib(linear, bits, embedding, embedding_bits, counted))  # type: ignore[arg-type]


def front(
    table: pd.DataFrame, *, embedding_bits: float = 16, payload: bool = False, draws: int = 1000, seed: int = 0
) -> Front:
    """Return the front of a loss table.

    Parameters
    ----------
    table
        As `qpipe.laws.table.read_losses` returns it; rows with a status other than ok are left out.
    embedding_bits
        Bits per weight of embedding and head.
    payload
        Count codes alone, as ParetoQ does, and not scales, masks and norms.
    draws, seed
        Of the membership; without draws the shares are those of the means.

    Raises
    ------
    QpipeError
        No rows, no sizes, or draws asked for and no point with two seeds.
    """
    rows = table[table["status"] == "ok"] if "status" in table else table
    if rows.empty:
        raise QpipeError("no rows with status ok: nothing to draw a front of")
    rows = rows.assign(size_mib=sizes(rows, embedding_bits, payload))
    grouped = rows.groupby(["n", "d", "representation"], sort=False)
    points = grouped.agg(runs=("loss", "size"), size_mib=("size_mib", "mean"), loss=("loss", "mean")).reset_index()
    points = points.sort_values(["size_mib", "loss"], ignore_index=True)
    freedom = int((points["runs"] - 1).sum())
    if draws and not freedom:
        raise QpipeError(
            "no two runs differ by their seed alone, so the noise is not known; add seeds to the study, or ask for a "
            "front of the means with --bootstrap 0"
        )
    spread = rows["loss"] - grouped["loss"].transform("mean")
    noise = float(np.sqrt((spread**2).sum() / freedom)) if freedom else float("nan")
    losses = points["loss"].to_numpy()[None]
    points["on_front"] = on_front(points["size_mib"].to_numpy(), losses)[0]
    if draws:
        generator = np.random.default_rng(seed)
        deviation = noise * np.sqrt(freedom / generator.chisquare(freedom, (draws, 1)))
        error = deviation / np.sqrt(points["runs"].to_numpy())
        losses = losses + error * generator.standard_normal((draws, len(points)))
    member = on_front(points["size_mib"].to_numpy(), losses)
    points["share"] = member.mean(axis=0)
    by_format = {
        str(name): float(member[:, (points["representation"] == name).to_numpy()].any(axis=1).mean())
        for name in points["representation"].unique()
    }
    return Front(points, dict(sorted(by_format.items(), key=lambda item: -item[1])), noise, freedom)


def on_front(size: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points no point of the same or smaller size beats.

    Parameters
    ----------
    size
        Shape (points,), ascending.
    loss
        Shape (draws, points).
    """
    ends = np.searchsorted(size, size, side="right") - 1  # points of equal size compete with each other
    best = np.minimum.accumulate(loss, axis=1)[:, ends]
    return np.asarray(loss <= best)

"""Budget splits: how the loss depends on the share of tokens trained dense, where it is least and how sure that is.

A curve holds the runs that differ in nothing but the split and the seed: equal representation, mode, N and total tokens
D. Its points are means over seeds. What a seed changes shifts the points of a curve alike as far as they share a trunk,
so differences between splits are taken seed by seed, and the noise is what is left after a split's and a seed's own
effect (two-way layout), pooled over all curves. Which share is best is drawn from the posterior of the means, as for
fronts (`qpipe.front`): each draw has one best share. Runs that finetune one dense model for different lengths make
curves over the finetuning's tokens in the same way: where more tokens no longer help, finetuning has saturated.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qpipe.errors import QpipeError

LEVEL = 0.9
_LABEL = re.compile(r"(?P<name>.+):(?P<word>[A-Za-z][A-Za-z.-]*?)(?P<percent>\d+(?:\.\d+)?)")
_LONGER = re.compile(r"(?P<name>.+):(?P<word>[A-Za-z][A-Za-z.-]*)\+(?P<tokens>\d+)")
_ENDS = "wsd"
_NEEDED = ("n", "d", "representation", "loss", "qat_tokens", "seed", "trajectory")


@dataclass(frozen=True)
class Curve:
    """Loss against the share of tokens trained dense.

    Attributes
    ----------
    representation, mode, n, d
        What the runs have in common; n parameters and d tokens (counts), of the dense model alone where lengths differ.
    axis
        What `at` is: `share` of d trained dense, or `qat_tokens` after it.
    at
        Shares or tokens, ascending, shape (S,).
    loss
        Means over seeds (nats/token), shape (S,).
    low, high
        Ends of the 90 % interval of each mean's excess over the best mean, shape (S,); NaN if the noise is not known.
    best_share
        Probability that a share is the best one, shape (S,); NaN if the noise is not known.
    runs
        Runs behind each mean, shape (S,).
    """

    representation: str
    mode: str
    n: float
    d: float
    axis: Literal["share", "qat_tokens"]
    at: NDArray[np.float64]
    loss: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    best_share: NDArray[np.float64]
    runs: NDArray[np.int64]

    @property
    def optimum(self) -> float:
        """Share, or tokens, with the least mean loss."""
        return float(self.at[self.loss.argmin()])

    @property
    def as_good(self) -> list[float]:
        """Where the loss cannot be told from the least at 90 %: how flat the optimum is."""
        return [float(at) for at, low in zip(self.at, self.low, strict=True) if low <= 0]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data; unknown numbers are None."""
        names = {self.axis: "at", **{name: name for name in ("loss", "low", "high", "best_share", "runs")}}
        arrays = {name: getattr(self, attribute) for name, attribute in names.items()}
        lists = {name: [None if v != v else v for v in values.tolist()] for name, values in arrays.items()}
        common = {"representation": self.representation, "mode": self.mode, "n": self.n, "d": self.d}
        return {**common, **lists, "optimum": self.optimum, "as_good": self.as_good}


def split_curves(table: pd.DataFrame, *, draws: int = 10_000, seed: int = 0) -> tuple[list[Curve], float, int]:
    """Return the curves of a loss table, the noise (nats/token, NaN if not known) and its degrees of freedom.

    Parameters
    ----------
    table
        As `qpipe collect` writes it; runs that did not end ok are left out.
    draws, seed
        Of the means.

    Raises
    ------
    QpipeError
        Columns are missing, or no representation was trained at two splits of one budget.
    """
    if missing := [name for name in _NEEDED if name not in table]:
        raise QpipeError(f"no splits: the loss table has no column {', '.join(missing)}; use a table of qpipe collect")
    good = table[table["status"] == "ok"] if "status" in table else table
    groups = [*_groups(good), *_lengths(good)]
    if not groups:
        raise QpipeError(
            "no representation was trained at two splits of one budget, or finetuned for two lengths; plan them with "
            "`finetune: {splits: [...]}` or `qat_tokens`"
        )
    squares, freedom = map(sum, zip(*(_residual(matrix) for *_, matrix in groups), strict=True))
    noise = float(np.sqrt(squares / freedom)) if freedom else float("nan")
    generator = np.random.default_rng(seed)
    return [_curve(*group, noise, int(freedom), draws, generator) for group in groups], noise, int(freedom)


Group = tuple[str, str, float, float, Literal["share", "qat_tokens"], pd.DataFrame]


def _groups(table: pd.DataFrame) -> Iterator[Group]:
    """Yield (representation, mode, n, d, axis, losses by share and seed) of each curve with two splits or more."""
    labels = [(_LABEL.fullmatch(name), name) for name in table["representation"]]
    rows = table.assign(
        name=[match["name"] if match else name for match, name in labels],
        word=[match["word"] if match else "" for match, name in labels],
        share=1 - table["qat_tokens"] / table["d"],
    )
    # A dense control is split in name alone: none of its tokens are compressed.
    dense = [float(match["percent"]) / 100 if match else np.nan for match, _ in labels]
    rows["share"] = np.where(rows["name"] == "dense", dense, rows["share"])
    words = sorted(set(rows["word"]) - {"", _ENDS})
    for (name, n, d), group in rows.groupby(["name", "n", "d"]):
        for word in words:
            between = group[group["word"] == word]
            # The ends of runs off a trunk have labels of their own; a finished family starts from the ordinary run.
            ends = _ENDS if between["trajectory"].astype(str).str.contains("-trunk-").any() else ""
            chosen = pd.concat([between, group[(group["word"] == ends) & group["share"].notna()]])
            matrix = chosen.pivot_table(index="share", columns="seed", values="loss", aggfunc="mean")
            if len(between) and len(matrix) > 1:
                yield str(name), word, float(str(n)), float(str(d)), "share", matrix


def _lengths(table: pd.DataFrame) -> Iterator[Group]:
    """Yield the same of each dense model that was finetuned for two lengths or more."""
    labels = [_LONGER.fullmatch(name) for name in table["representation"]]
    rows = table.assign(
        name=[match["name"] if match else "" for match in labels],
        word=[match["word"] if match else "" for match in labels],
        asked=[float(match["tokens"]) if match else np.nan for match in labels],
    )
    rows = rows[rows["name"] != ""]
    # What a dense control was trained on after the split stands in its label alone.
    rows["own"] = np.where(rows["name"] == "dense", rows["asked"], rows["qat_tokens"])
    rows["before"] = np.where(rows["name"] == "dense", np.nan, rows["d"] - rows["qat_tokens"])
    rows["before"] = rows["before"].fillna(rows.groupby("n")["before"].transform("median")).fillna(0)
    for (name, word, n, before), group in rows.groupby(["name", "word", "n", "before"]):
        matrix = group.pivot_table(index="own", columns="seed", values="loss", aggfunc="mean")
        if len(matrix) > 1:
            yield str(name), str(word), float(str(n)), float(str(before)), "qat_tokens", matrix


def _residual(matrix: pd.DataFrame) -> tuple[float, int]:
    """Return the sum of squares that shares and seeds do not explain, and its degrees of freedom."""
    full = matrix.dropna(axis=1).to_numpy()  # seeds that have every share
    if full.shape[1] < 2:
        return 0.0, 0
    left = full - full.mean(axis=1, keepdims=True) - full.mean(axis=0, keepdims=True) + full.mean()
    return float((left**2).sum()), (full.shape[0] - 1) * (full.shape[1] - 1)


def _curve(
    name: str,
    word: str,
    n: float,
    d: float,
    axis: Literal["share", "qat_tokens"],
    matrix: pd.DataFrame,
    noise: float,
    freedom: int,
    draws: int,
    generator: np.random.Generator,
) -> Curve:
    runs = matrix.notna().sum(axis=1).to_numpy()
    loss = matrix.mean(axis=1).to_numpy()
    low = high = best = np.full(len(loss), np.nan)
    if freedom:
        deviation = noise * np.sqrt(freedom / generator.chisquare(freedom, (draws, 1)))
        drawn = loss + deviation / np.sqrt(runs) * generator.standard_normal((draws, len(loss)))
        excess = drawn - drawn[:, [loss.argmin()]]
        low, high = np.quantile(excess, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        best = np.bincount(drawn.argmin(axis=1), minlength=len(loss)) / draws
    return Curve(name, word, n, d, axis, matrix.index.to_numpy(float), loss, low, high, best, runs)

"""What a fit's status means, in words for someone who never fitted a scaling law.

The verdict stands above the numbers: whoever reads only the first lines of a page must learn from them whether the
multipliers below may be quoted.
"""

import math
from dataclasses import dataclass
from typing import Literal

from qpipe.report.subject import Multiplier, Subject

_WIDE = 1.5
"""An interval whose ends differ by more than this factor is called wide."""

_DRIFT = 0.01
"""Drifts of eff are named when their p, adjusted for the number of tests, is below this."""


@dataclass(frozen=True)
class Verdict:
    """How far a fit can be trusted."""

    level: Literal["settled", "careful", "failed"]
    headline: str
    sentences: tuple[str, ...]


def verdict(subject: Subject) -> Verdict:
    """Return the verdict on a fit."""
    status, law = subject.fit.status, subject.fit.law
    details = (
        *_reasons(subject),
        *_intervals(subject),
        *_drifts(subject),
        f"The fit's own words: {status['message']}.",
    )
    if not status["converged"]:
        return Verdict("failed", f"The {law} fit did not converge: do not use its numbers", details)
    if not status["identified"]:
        return Verdict(
            "careful", f"These runs do not identify the {law} law: read the intervals, not the values", details
        )
    if status["at_bound"]:
        return Verdict("careful", f"A parameter of the {law} law sits at its bound: read the intervals", details)
    return Verdict("settled", f"The {law} law is identified by these runs", details)


def _reasons(subject: Subject) -> list[str]:
    status = subject.fit.status
    reasons = []
    if not status["converged"]:
        reasons.append("The searches from different starting points ended in different places.")
    if status["at_bound"]:
        names = ", ".join(status["at_bound"])
        reasons.append(
            f"The best value of {names} is the end of the allowed range, so the runs say on which side it lies and not "
            "where. The usual remedy is runs at more ratios of tokens to parameters, or at larger sizes."
        )
    if status.get("starts"):
        reasons.append(f"{status['agreeing_starts']} of {status['starts']} searches agree on the optimum.")
    return reasons


def _intervals(subject: Subject) -> list[str]:
    compressed = {name: m for name, m in subject.multipliers.items() if name != "dense"}
    if not compressed:
        return []
    if not any(entry.has_interval for entry in compressed.values()):
        return ["The fit was made without resampling: nothing is known of how sure the multipliers are."]
    level = f"{100 * float(subject.fit.interval['level']):.4g} %"
    wide = [f"{name} ({entry})" for name, entry in compressed.items() if _width(entry) > _WIDE]
    if not wide:
        return [f"No {level} interval of a multiplier is wider than a factor of {_WIDE:g}."]
    listed = ", ".join(wide[:6]) + (f" and {len(wide) - 6} more" if len(wide) > 6 else "")
    return [f"Wide {level} intervals, known no better than to a factor of {_WIDE:g}: {listed}."]


def _drifts(subject: Subject) -> list[str]:
    """Name representations whose eff changes with N or D, which the law takes to be constant."""
    words = {"n": "size", "d": "tokens"}
    found = [
        f"{entry['representation']} with {words[entry['axis']]} (log-log slope {entry['slope']:+.2g})"
        for entry in subject.fit.checks.get("trends") or []
        if entry.get("p_adjusted") is not None and entry["p_adjusted"] < _DRIFT
    ]
    return [f"eff is not quite a constant in these runs: it drifts for {', '.join(found)}."] if found else []


def _width(entry: Multiplier) -> float:
    """Return the ratio of an interval's ends."""
    if not entry.has_interval:
        return math.inf
    return entry.high / entry.low if entry.low > 0 else math.inf

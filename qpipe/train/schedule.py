"""The learning rate as a pure function of the step (no torch).

All schedules warm up along half a cosine from LR/100 to the peak. `cosine` then falls along half a cosine to
`final_fraction` of the peak, exactly as `torch.optim.lr_scheduler.OneCycleLR` with `div_factor=100` does, which is how
the published ladders were trained (QuEST, 2502.05003). `wsd` (warm-up, stable, decay) holds the peak and falls
linearly over the last `decay_fraction` of the steps. `constant` holds the peak: the trunk that `wsd` runs branch off.

A run that continues another one either has a schedule of its own, drawn over its own steps, or goes on where the other
stood in a schedule drawn over both (`Parent.horizon`).
"""

import math

from qpipe.recipe import Training
from qpipe.runs import Run

WARMUP_DIVISOR = 100.0
"""The first step's learning rate is the peak over this."""


def run_learning_rate(run: Run, step: int) -> float:
    """Return the learning rate of a run's own step, from 0 to `run.steps` - 1."""
    if run.horizon is None:
        return learning_rate(run.training, step, run.steps)
    return learning_rate(run.training, run.first_step + step, run.horizon)


def learning_rate(training: Training, step: int, steps: int) -> float:
    """Return the learning rate of a step of a schedule.

    Parameters
    ----------
    training
        Peak, shape and fractions.
    step
        Step about to be taken, from 0 to steps - 1.
    steps
        Steps of the whole schedule.
    """
    peak, final = training.learning_rate, training.learning_rate * training.final_fraction
    # OneCycleLR reaches the peak at step `warmup * steps - 1`, not rounded, and the end at the last step.
    warmup = training.warmup_fraction * steps if training.warmup_steps is None else training.warmup_steps
    warmup_end = warmup - 1
    last = steps - 1
    if step <= warmup_end and warmup_end > 0:
        return _half_cosine(peak / WARMUP_DIVISOR, peak, step / warmup_end)
    if training.schedule == "constant":
        return peak
    if training.schedule == "cosine":
        start = max(warmup_end, 0.0)
        return _half_cosine(peak, final, (step - start) / max(last - start, 1.0))
    decay_start = steps - training.decay_fraction * steps
    share = max(0.0, (step + 1 - decay_start) / (steps - decay_start))
    return peak + (final - peak) * share


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * share))

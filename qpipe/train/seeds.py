"""Seeds of the random numbers that a representation may draw (noise, Quant-Noise), a pure function of run and step."""

import numpy as np
import torch

from qpipe.train.data import mix


def step_seed(seed: int, step: int) -> int:
    """Return the seed of the random numbers that step `step` of a run draws (63 bits)."""
    return int(mix(mix(np.array([seed], np.uint64)) ^ np.array([step], np.uint64))[0] >> np.uint64(1))


def seed_device(device: torch.device, seed: int) -> None:
    """Seed one device's generator; `torch.manual_seed` seeds every kind of device and takes a hundred times as long."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)

"""`from qpipe.train.lightning_import import lightning`: Lightning, imported without what it would only look at.

Most runs of a grid are short, so start-up counts. Importing Lightning imports torchmetrics, and torchmetrics imports
transformers and matplotlib whenever they are installed, for metrics that nobody here computes: about 2 of 4 seconds.
While Lightning is being imported these two count as not installed; nothing of them is used later.
"""

from unittest import mock

from lightning_utilities.core.imports import RequirementCache

_NOT_NEEDED = ("transformers", "matplotlib")
_check = RequirementCache._check_available


def _check_without(requirement: RequirementCache) -> None:
    if str(requirement.requirement or requirement.module).startswith(_NOT_NEEDED):
        requirement.available, requirement.message = False, "not needed for training"
    else:
        _check(requirement)


with mock.patch.object(RequirementCache, "_check_available", _check_without):
    import lightning.pytorch as lightning
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.loggers import WandbLogger

__all__ = ["LightningEnvironment", "TorchCheckpointIO", "WandbLogger", "lightning"]

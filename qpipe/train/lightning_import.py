"""`from qpipe.train.lightning_import import lightning`: Lightning, imported without what it would only look at.

Most runs of a grid are short, so start-up counts. Importing Lightning imports torchmetrics, and torchmetrics imports
transformers, matplotlib and scipy.signal wherever they are installed, for metrics that nobody here computes: more than
half of the time. While Lightning is being imported these packages count as not installed; nothing of them is used
later.
"""

from unittest import mock

from lightning_utilities.core import imports

_NOT_NEEDED = ("transformers", "matplotlib", "scipy")
_check, _available = imports.RequirementCache._check_available, imports.package_available


def _check_without(requirement: imports.RequirementCache) -> None:
    if str(requirement.requirement or requirement.module).startswith(_NOT_NEEDED):
        requirement.available, requirement.message = False, "not needed for training"
    else:
        _check(requirement)


def _available_without(name: str) -> bool:
    return name not in _NOT_NEEDED and _available(name)


with (
    mock.patch.object(imports.RequirementCache, "_check_available", _check_without),
    mock.patch.object(imports, "package_available", _available_without),
):
    import lightning.pytorch as lightning
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

__all__ = ["DDPStrategy", "LightningEnvironment", "TorchCheckpointIO", "lightning"]

"""Training a model that is shared out among processes, for sizes that one GPU does not hold.

With plain data parallelism every process holds all weights, gradients and both AdamW moments, 16 bytes per parameter.
Here each holds its part of them (torch's `fully_shard`; ZeRO stage 3, Rajbhandari et al., 1910.02054): a block's
weights are gathered right before the block computes and dropped after it, gradients averaged and cut up as they arise.
What is computed is the same, so losses agree with those of one process up to the order in which floats are added.

Outside of training nothing knows about it. A checkpoint is gathered and written by the main process in the one form
that checkpoints have, and each process cuts its part out of it when it resumes, so a run can go on with any number of
processes, sharded or not. When training ends, the main process gets the whole model back for validation and results.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from qpipe.model import Decoder
from qpipe.train.lightning_import import DDPStrategy

log = logging.getLogger("qpipe.train")


class ShardedStrategy(DDPStrategy):
    """Lightning's data parallelism with the model sharded instead of copied."""

    def configure_ddp(self) -> None:
        """Shard the model, which has its weights and, where it resumes, those of the checkpoint."""
        module: Any = self.lightning_module
        with torch.no_grad(), self.precision_plugin.forward_context():
            module.first_pass()  # trained scales that start from the weights have to see all of them
        parameters = list(module.model.parameters())
        shard(module.model, init_device_mesh(self.root_device.type, (self.world_size,)))
        held = sum(parameter.to_local().numel() for parameter in module.model.parameters())
        if self.is_global_zero:
            log.info("this process holds %s of %s parameters", f"{held:,}", f"{sum(p.numel() for p in parameters):,}")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return all weights on the main process; called by all."""
        return whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the whole optimizer state on the main process; called by all."""
        return whole(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of a checkpoint's optimizer state."""
        states = checkpoint["optimizer_states"]
        for optimizer, content in zip(self.optimizers, states, strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {key: part_like(parameters[index], value) for key, value in entry.items()}
                for index, entry in content["state"].items()
            }
            optimizer.load_state_dict({**content, "state": state})


def shard(model: Decoder, mesh: Any) -> None:
    """Share a model's parameters out among the processes of a mesh, block by block, in place."""
    model.joins_norms = False  # else a block's norm would be read before its weights are gathered
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for entrance in ("hidden", "loss", "token_losses"):
        register_fsdp_forward_method(model, entrance)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to a model."""
    return isinstance(model, FSDPModule)


def part_like(parameter: Tensor, value: Any) -> Any:
    """Return this process's part of a whole tensor that belongs to a parameter; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(content: Any) -> Any:
    """Gather every sharded tensor in nested dictionaries and lists, in order, and keep it on the main process's CPU."""
    if isinstance(content, DTensor):
        full = content.full_tensor()
        return full.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)
    if isinstance(content, dict):
        return {key: whole(value) for key, value in content.items()}
    return [whole(value) for value in content] if isinstance(content, list) else content


def unsharded(model: Decoder, representation: Any) -> Decoder:
    """Return a model of its own with the gathered weights, of meaning on the main process; called by all."""
    state = whole(model.state_dict())
    result = Decoder(model.shape, representation)
    if torch.distributed.get_rank() == 0:
        result.load_state_dict(state)
    return result

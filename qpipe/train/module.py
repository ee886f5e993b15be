"""One training step as a LightningModule.

Lightning's automatic optimization is off: a step is forward and backward over the micro-batches, clipping, one AdamW
step at the schedule's rate, all in one place where it can be read (and captured as one graph). Lightning still places
the model, runs precision and distribution, counts steps and restores them.

Random numbers that a representation draws in a step (noise, Quant-Noise) come from a generator seeded by (run, step),
so they need no place in a checkpoint.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.compress import CompressedLinear
from qpipe.errors import QpipeError
from qpipe.model import Decoder
from qpipe.recipe import Training
from qpipe.runs import Run
from qpipe.train.data import Batches, BatchStream
from qpipe.train.history import History
from qpipe.train.lightning_import import lightning
from qpipe.train.schedule import learning_rate
from qpipe.train.seeds import seed_device, step_seed
from qpipe.train.validation import sequences_at_once


class TrainingModule(lightning.LightningModule):
    """The model of a run, its data and its optimizer.

    Parameters
    ----------
    run
        What to train.
    batches
        The run's data.
    history
        Receives loss and gradient norm of every step.
    """

    def __init__(self, run: Run, batches: Batches, history: History) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run, self.batches, self.history = run, batches, history
        self.model = Decoder(run.shape, run.format_spec)
        self.model.initialize(run.seed)
        self.micro_batch = sequences_at_once(run.shape, run.training.batch_sequences)
        self.stream: BatchStream | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with weight decay on the blocks' linear weights only."""
        training = self.run.training
        return torch.optim.AdamW(
            parameter_groups(self.model, training),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=training.adam_epsilon,
            fused=True,
        )

    def train_dataloader(self) -> BatchStream:
        """Return the batches from the current step on."""
        self.stream = BatchStream(
            self.batches,
            start=self.trainer.global_step,
            stop=self.run.steps,
            rank=self.trainer.global_rank,
            processes=self.trainer.world_size,
            prefetch=self.device.type == "cuda",
        )
        return self.stream

    @property
    def seconds_waited(self) -> float:
        """Time spent waiting for batches (seconds)."""
        return self.stream.waited if self.stream is not None else 0.0

    def on_train_start(self) -> None:
        """Keep running means where the losses arise; compile where it pays."""
        self.history.to(self.device)
        if compiling(self.device):
            for block in self.model.blocks:
                block.compile(dynamic=False)  # blocks are alike: the first is compiled, the others reuse it

    def training_step(self, tokens: Tensor, _: int) -> None:
        """Take one optimizer step on this process's sequences, shape (sequences, context + 1)."""
        step, optimizer = self.trainer.global_step, self.optimizers()
        seed_device(tokens.device, step_seed(self.run.seed, step))
        self.model.set_progress(step / self.run.steps)
        loss = self._gradients(tokens.long())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.training.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.run.training, step, self.run.steps)
        optimizer.step()
        optimizer.zero_grad()
        self.history.add(step + 1, loss, norm)

    def _gradients(self, tokens: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss over the sequences; return that loss, detached."""
        total = torch.zeros((), device=tokens.device)
        for part in tokens.split(self.micro_batch):
            loss = self.model.loss(part[:, :-1], part[:, 1:]) * (len(part) / len(tokens))
            self.manual_backward(loss)
            total += loss.detach()
        return total


def compiling(device: torch.device) -> bool:
    """Whether to compile blocks: on GPUs, unless the environment says otherwise (QPIPE_COMPILE=0 or 1)."""
    word = os.environ.get("QPIPE_COMPILE", "")
    if word not in ("", "0", "1"):
        raise QpipeError(f"QPIPE_COMPILE={word}: use 0 or 1, or leave it out")
    return device.type == "cuda" if word == "" else word == "1"


def parameter_groups(model: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay (weights of linear layers in blocks) and those without."""
    decayed = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | CompressedLinear) and name.startswith("blocks.")
    }
    parameters: Iterable[nn.Parameter] = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]

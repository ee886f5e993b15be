"""One training step as a LightningModule.

Lightning's automatic optimization is off: a step is forward and backward over the micro-batches, clipping, one AdamW
step at the schedule's rate, all in one place where it can be read and captured as one graph (`qpipe.train.step`).
Lightning still places the model, runs precision and distribution, counts steps and restores them.

Random numbers that a representation draws in a step (noise, Quant-Noise) come from a generator seeded by (run, step),
so they need no place in a checkpoint.
"""

import importlib
import os
import threading

import torch
from torch import Tensor

from qpipe.compress import CompressedLinear
from qpipe.memory import sequences_at_once
from qpipe.model import Decoder
from qpipe.runs import Run
from qpipe.train.data import Batches, BatchStream
from qpipe.train.history import History
from qpipe.train.lightning_import import lightning
from qpipe.train.shards import is_sharded, unsharded
from qpipe.train.step import TrainingStep, make_optimizer, switched_on


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
        self._importing = _import_compiler(self.model)
        self.model.initialize(run.seed)
        self.micro_batch = sequences_at_once(run.shape, run.training.batch_sequences)
        self.stream: BatchStream | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with weight decay on the blocks' linear weights only."""
        return make_optimizer(self.model, self.run.training)

    def train_dataloader(self) -> BatchStream:
        """Return the batches from the current step on."""
        self.stream = BatchStream(
            self.batches,
            start=self.run.first_step + self.trainer.global_step,
            stop=self.run.first_step + self.run.steps,
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
        """Keep running means where the losses arise; prepare the step."""
        if self._importing is not None:
            self._importing.join()
        self.history.to(self.device)
        self.step = TrainingStep(self.model, self.run, self.micro_batch, single=self.trainer.world_size == 1)

    def training_step(self, tokens: Tensor, _: int) -> None:
        """Take one optimizer step on this process's sequences, shape (sequences, context + 1)."""
        number = self.trainer.global_step
        loss, norm = self.step(tokens, number, self.optimizers(), self.manual_backward)
        self.history.add(number + 1, loss, norm)

    def first_pass(self) -> None:
        """Send this process's first sequences through the model, so that trained scales take their first values."""
        tokens = self.batches.read(self.run.first_step, self.trainer.global_rank, self.trainer.world_size)
        inputs = torch.from_numpy(tokens[: self.micro_batch, :-1]).long()
        self.model.hidden(inputs.to(self.device))

    def on_train_end(self) -> None:
        """Free what only training needs: the validation that follows wants the memory."""
        self.step.release()
        if is_sharded(self.model):
            self.model = unsharded(self.model, self.run.format_spec)


def _import_compiler(model: Decoder) -> threading.Thread | None:
    """Import the compiler on the side, if steps of this model need it: it takes a second, and so do weights."""
    on_gpu = torch.cuda.is_available() and os.environ.get("QPIPE_ACCELERATOR") != "cpu"
    layers = (layer for layer in model.blocks.modules() if isinstance(layer, CompressedLinear))
    if (
        not on_gpu
        or not any(layer.needs_compiler for layer in layers)
        or not switched_on("QPIPE_COMPILE", lambda: True)
    ):
        return None
    importing = threading.Thread(target=importlib.import_module, args=("torch._inductor.compile_fx",))
    importing.start()
    return importing

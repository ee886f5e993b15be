"""One optimizer step: forward and backward over the micro-batches, clipping, AdamW; on one GPU captured as a graph.

A small model's step is hundreds of kernels of a few microseconds each, and launching them takes the host longer than
running them takes the GPU. So on a single GPU the step is recorded once, after two ordinary steps have put everything
in place, and then replayed as one launch (CUDA graph). What changes from step to step reaches the graph
through tensors in fixed places: the tokens, the learning rate, the share a mask schedule keeps, and the generator's
seed. The kernels are the same ones, so captured and plain steps agree, but for two: a captured step represents the
weights of all layers at once (`qpipe.compress.together`), and clips and takes AdamW's step in one launch
(`qpipe.triton_adamw`; where weights are kept in bfloat16 it stays with torch's).

Before the first of all it is rehearsed, so that its kernels are compiled side by side
(`qpipe.triton_launch`). In a captured step only what represents weights and activations is compiled, and only where it
is no kernel of our own: dense models and QuEST's formats compile nothing. Blocks are otherwise matrix products and such
kernels, for which a compiler would add little but its own time before the first step. Where launches are not captured
whole blocks are compiled. On a CPU the way to the loss is compiled as a whole, in runs for which it pays.

QPIPE_COMPILE=0 and QPIPE_CAPTURE=0 turn compiling and capturing off, to look for trouble.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qpipe.compress import CompressedLinear
from qpipe.compress.together import WeightsTogether
from qpipe.errors import QpipeError
from qpipe.model import Decoder
from qpipe.recipe import Training
from qpipe.runs import Run
from qpipe.train.schedule import run_learning_rate
from qpipe.train.seeds import seed_device, step_seed
from qpipe.train.shards import is_sharded

if TYPE_CHECKING:
    from qpipe.triton_adamw import CapturedAdamW

log = logging.getLogger("qpipe.train")

LONG_RUN = 3e13
"""FLOPs of a run from which on compiling pays on a CPU: five to fifteen minutes of one core. It takes 4 to 50 s, and
steps are then 1.05 to 1.5 times as fast; but where activations are compressed hardly faster."""

_PLAIN_STEPS = 2
"""Steps before capturing: the first compiles and creates the optimizer's state, the second finds all in place."""


class ReplayedAdamW(torch.optim.AdamW):
    """AdamW whose step is, once `graph` is set, the replay of a whole captured training step.

    So whoever counts optimizer steps (Lightning does) counts replays, too.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def step(self, closure: Any = None) -> Any:
        """Take a step, or replay the graph that holds it."""
        if self.graph is None:
            return super().step(closure)
        self.graph.replay()
        return None

    def set_learning_rate(self, rate: float) -> None:
        """Set every group's rate, in place where it is a tensor that a graph reads."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def make_ready(self, device: torch.device, *, capturable: bool) -> None:
        """Keep the rate on the device if a graph is to read it, as a number if not, whatever a checkpoint had."""
        rate = torch.zeros((), device=device) if capturable else 0.0
        for group in self.param_groups:
            group["lr"], group["capturable"] = rate, capturable


class TrainingStep:
    """Takes the steps of a run.

    Parameters
    ----------
    model
        The model, on its device.
    run
        What is trained.
    micro_batch
        Sequences that go through the model together; divides the sequences of a step.
    single
        Whether this process trains alone; only then is the step captured.
    """

    def __init__(self, model: Decoder, run: Run, micro_batch: int, *, single: bool) -> None:
        self.model, self.run, self.micro_batch = model, run, micro_batch
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        self.capturing = single and on_gpu and switched_on("QPIPE_CAPTURE", lambda: True)
        self.compiling = switched_on("QPIPE_COMPILE", lambda: on_gpu or (single and _pays_on_a_cpu(run)))
        self.taken = 0
        self._optimizer: ReplayedAdamW | None = None
        self._update: CapturedAdamW | None = None
        self._weights: WeightsTogether | None = None
        self._tokens = self._loss = self._norm = torch.empty(0)

    def __call__(
        self, tokens: Tensor, step: int, optimizer: Any, backward: Callable[[Tensor], None] = Tensor.backward
    ) -> tuple[Tensor, Tensor]:
        """Take step number `step` (from 0) on this process's sequences.

        Parameters
        ----------
        tokens
            Shape (sequences, context + 1), integers.
        optimizer
            A `ReplayedAdamW`, or Lightning's wrapper of one; its `step` is called exactly once.
        backward
            Runs the backward pass of a loss.

        Returns
        -------
        Mean loss (nats/token) and gradient norm before clipping, on the device; overwritten by the next step.

        Raises
        ------
        RuntimeError
            The first step gives some parameter no gradient; nothing is updated then.
        """
        inner: ReplayedAdamW = getattr(optimizer, "optimizer", optimizer)
        if self.taken == 0:
            self._prepare(tokens, inner)
        seed_device(self.device, step_seed(self.run.seed, self.run.first_step + step))
        self.model.set_progress(step / self.run.steps)
        inner.set_learning_rate(run_learning_rate(self.run, step))
        if self.capturing and self.taken == _PLAIN_STEPS:
            self._capture(tokens, inner, backward)
        self.taken += 1
        if self._optimizer is not None:
            self._tokens.copy_(tokens, non_blocking=True)
            optimizer.step()
            return self._loss, self._norm
        loss, norm = self._gradients(tokens, backward)
        if self.taken == 1:
            self._require_gradients()
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    def release(self) -> None:
        """Give back the graph and its memory."""
        if self._optimizer is not None:
            self._optimizer.graph = None
            self._optimizer.zero_grad()
        self._optimizer, self._update, self._weights, self.capturing = None, None, None, False

    def _prepare(self, tokens: Tensor, optimizer: ReplayedAdamW) -> None:
        """Make ready on the first step of an attempt."""
        optimizer.make_ready(self.device, capturable=self.capturing)
        tokens = tokens[: self.micro_batch].long()
        if self.capturing:
            self._rehearse(tokens)
        elif self.compiling:
            self._look_round(tokens)
            compile_model(self.model)

    def _rehearse(self, tokens: Tensor) -> None:
        """Have all that a step needs compiled, kernels of our own many at a time, without taking a step."""
        from qpipe.triton_launch import Rehearsal  # there is a GPU

        layers = [layer for layer in self.model.blocks.modules() if isinstance(layer, CompressedLinear)]
        if not all(layer.scales_ready for layer in layers):
            self._look_round(tokens)
        with Rehearsal(self.device):
            if layers and self.compiling:
                self._look_round(tokens)
                for layer in layers:
                    layer.compile()  # layers share what is compiled
            self.model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        self.model.zero_grad()

    @torch.no_grad()
    def _look_round(self, tokens: Tensor) -> None:
        """Let the model find what it finds in its first pass (trained scales, tables of levels): not to be compiled."""
        self.model.hidden(tokens[:, :-1])

    def _gradients(self, tokens: Tensor, backward: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of the mean loss over the sequences and clip it; return loss and norm."""
        loss = self._accumulate(tokens, backward)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.training.clip)
        return loss, norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _require_gradients(self) -> None:
        """Refuse to go on with parameters that would never be trained: compilers have lost gradients before."""
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if without := [name for name, parameter in named if parameter.grad is None]:
            raise RuntimeError(
                f"run {self.run.id}: no gradient arrives at {len(without)} of {len(named)} parameters, at "
                f"{without[0]} for one: they would not be trained. QPIPE_COMPILE=0 may help; please report it"
            )

    def _accumulate(self, tokens: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Accumulate the gradient of the mean loss over the sequences; return the loss."""
        losses = []
        for part in tokens.long().split(self.micro_batch):
            loss = self.model.loss(part[:, :-1], part[:, 1:])
            loss = loss if len(part) == len(tokens) else loss * (len(part) / len(tokens))
            backward(loss)
            losses.append(loss.detach())
        if self._weights is not None:
            self._weights.finish()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _capture(self, tokens: Tensor, optimizer: ReplayedAdamW, backward: Callable[[Tensor], None]) -> None:
        """Record one step, without taking it."""
        from qpipe import triton_adamw  # there is a GPU

        self._tokens = tokens.clone()
        optimizer.zero_grad()
        fits = triton_adamw.fits(optimizer)
        self._weights = WeightsTogether(self.model, dense=fits)
        if fits:
            self._update = triton_adamw.CapturedAdamW(optimizer, self.run.training.clip, self._weights.copies)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), self._weights.represented():
            if self._update is None:
                self._loss, self._norm = self._gradients(self._tokens, backward)
                optimizer.step()
            else:
                self._loss = self._accumulate(self._tokens, backward)
                self._norm = self._update.launch()
        self._weights.fill()
        if self._update is not None:
            self._update.fill()
        optimizer.graph, self._optimizer = graph, optimizer


def compile_model(model: Decoder) -> None:
    """Compile what is not captured, when it first runs: on a CPU the way to the loss as a whole, elsewhere blocks.

    On a CPU evaluation stays as it is, so that a record's loss is found again whatever was compiled.
    """
    if next(model.parameters()).device.type == "cpu":
        _take_own_threads()
        model.loss = torch.compile(model.loss, dynamic=False)  # type: ignore[method-assign]
        return
    model.norm.compile(dynamic=False)
    for block in model.blocks:
        if is_sharded(block):  # gathering its weights stays outside
            block.forward = torch.compile(block.forward, dynamic=False)
        else:
            block.compile(dynamic=False)  # blocks are alike: the first is compiled, the others reuse it


def _pays_on_a_cpu(run: Run) -> bool:
    """Whether compiling takes less time than it saves, changes no more than rounding, and can be done.

    A compiler draws random numbers of its own, so representations that draw some are left alone.
    """
    weights = run.format_spec.weights
    pays = run.flops >= LONG_RUN and run.format_spec.activations is None and run.training.precision == "fp32"
    if not pays or (weights is not None and weights.draws):
        return False
    if problem := compiler_problem():
        log.warning("training without compiling, which for a run this long would be faster: %s", problem)
    return not problem


@functools.cache
def compiler_problem() -> str:
    """What keeps functions from being compiled for this CPU (a C++ compiler and Python's headers are needed), or ''."""
    _take_own_threads()
    try:
        torch.compile(torch.square, dynamic=False)(torch.ones(64))
    except (RuntimeError, OSError) as error:  # the first is the base of what the compiler raises
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _take_own_threads() -> None:
    """Compile with as many processes as this one has threads: a study trains a run per core, at the same time."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = torch.get_num_threads()


def switched_on(name: str, default: Callable[[], bool]) -> bool:
    """Whether a feature is on: as the environment says (0 or 1), by default as told."""
    word = os.environ.get(name, "")
    if word not in ("", "0", "1"):
        raise QpipeError(f"{name}={word}: use 0 or 1, or leave it out")
    return default() if word == "" else word == "1"


def make_optimizer(model: nn.Module, training: Training) -> ReplayedAdamW:
    """Return AdamW with weight decay on the blocks' linear weights only."""
    return ReplayedAdamW(
        parameter_groups(model, training),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


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

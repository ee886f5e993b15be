"""Where a run begins: from random weights, from its parent's, or on its own trunk.

A *trunk* is a dense run at a constant rate. Runs that branch off it at some step need its weights and AdamW's moments
there, so a run that ends in mid-schedule leaves `state.ckpt` beside its results. The state of a trunk at step s does
not depend on how far the trunk was meant to go: a trunk of more steps goes on from the longest shorter one that lies
beside it, with the same bits as if it had been trained alone. So one more branch point costs the steps that are
missing, and no branch point is part of another's identity.

A child takes over the weights of its parent (a dense one), drawn into its own representation, and where its schedule
goes on, the moments of the parameters that both have; trained scales start afresh from the weights.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpipe.compress import CompressedLinear
from qpipe.errors import QpipeError
from qpipe.files import replacing
from qpipe.huggingface import load_decoder, weights_digest
from qpipe.model import Decoder
from qpipe.record import Record, load_record
from qpipe.runs import Run
from qpipe.train.checkpoint import checkpoint_problem
from qpipe.train.evaluate import load_model
from qpipe.train.lightning_import import lightning
from qpipe.train.results import RECORD, STATE
from qpipe.train.shards import part_like
from qpipe.train.step import parameter_groups

log = logging.getLogger("qpipe.train")

Moments = dict[str, dict[str, Tensor]]


class Start(lightning.Callback):
    """Gives a run the weights, and perhaps the moments, that it starts from.

    Parameters
    ----------
    model
        A dense model of the run's shape.
    moments
        AdamW's state by parameter name; empty for a fresh optimizer.
    """

    def __init__(self, model: Decoder, moments: Moments) -> None:
        self.model, self.moments = model, moments

    def weights(self, model: Decoder) -> None:
        """Take over the weights."""
        take_weights(model, self.model)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the moments, unless a checkpoint of this run has brought its own."""
        if self.moments and trainer.global_step == 0:
            take_moments(trainer.optimizers[0], pl_module.model, self.moments)


class KeepState(lightning.Callback):
    """Writes `state.ckpt` at the end of a run that others go on from."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write it, all processes together."""
        if trainer.global_step == pl_module.run.steps:
            trainer.save_checkpoint(self.out / STATE)


def shorten(model: Decoder) -> None:
    """Keep all parameters but trained scales in bfloat16, as ParetoQ's code does.

    A bfloat16 number has 8 significant bits, so that an update below about 1/512 of a weight changes nothing.
    """
    for parameter in model.parameters():
        if not getattr(parameter, "is_scale", False):
            parameter.data = parameter.data.bfloat16()


def find_start(run: Run, out: Path, given: Path | None) -> Start | None:
    """Return what a run starts from, None for random weights.

    Parameters
    ----------
    run
        The run.
    out
        Its output folder.
    given
        Folder of its parent or of its checkpoint.

    Raises
    ------
    QpipeError
        The parent is not finished, the folder holds another run or model, files are damaged.
    """
    if run.checkpoint is not None:
        return Start(_load_checkpoint(run, given), {})
    if run.parent is None:
        return None
    folder = parent_folder(run, out, given)
    model, record = _load_parent(run, folder)
    return Start(model, read_moments(folder / STATE, record) if run.parent.optimizer == "kept" else {})


def _load_checkpoint(run: Run, folder: Path | None) -> Decoder:
    assert run.checkpoint is not None
    if folder is None:
        raise QpipeError(f"run {run.id} starts from a model trained elsewhere; name its folder with --parent")
    if (found := weights_digest(folder)) != run.checkpoint.weights:
        raise QpipeError(
            f"run {run.id} starts from weights {run.checkpoint.weights[:12]}..., {folder} holds {found[:12]}..."
        )
    return load_decoder(folder, run.shape)


def parent_folder(run: Run, out: Path, given: Path | None) -> Path:
    """Return the output folder of a run's parent: the one given, else the one named by its id beside `out`."""
    assert run.parent is not None
    folder = given or out.resolve().parent / run.parent.run.id
    if not (folder / RECORD).is_file():
        raise QpipeError(
            f"run {run.id} starts from run {run.parent.run.id}, but {folder} holds no finished run; train that one "
            "first, or name its folder with --parent"
        )
    return folder


def _load_parent(run: Run, folder: Path) -> tuple[Decoder, Record]:
    assert run.parent is not None
    model, record = load_model(folder)
    if record.run.science() != run.parent.run.science():
        raise QpipeError(f"run {run.id} starts from run {run.parent.run.id}, {folder} holds run {record.id}")
    if record.status != "ok":
        raise QpipeError(f"run {run.id} cannot start from run {record.id}, which {record.status}: {record.message}")
    return model, record


@torch.no_grad()
def take_weights(model: Decoder, parent: Decoder) -> None:
    """Copy a dense decoder's weights into a decoder of the same shape under any representation."""
    own, dense = dict(model.named_modules()), dict(parent.named_modules())
    for name, module in dense.items():
        for part, value in module.named_parameters(recurse=False):
            layer = own[name]
            if isinstance(layer, CompressedLinear) and part == "weight":
                layer.load_dense_weight(value)
            else:
                getattr(layer, part).copy_(value)


def read_moments(state: Path, record: Record) -> Moments:
    """Return AdamW's state by parameter name from a kept state (error: missing, damaged, another run's)."""
    _check_state(state, record)
    content = torch.load(state, map_location="cpu", weights_only=True)
    dense = Decoder(record.run.shape, record.run.format_spec, device="meta")
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    order = [names[id(p)] for group in parameter_groups(dense, record.run.training) for p in group["params"]]
    found = content["optimizer_states"][0]["state"]
    return {name: found[index] for index, name in enumerate(order) if index in found}


def take_moments(optimizer: torch.optim.Optimizer, model: Decoder, moments: Moments) -> None:
    """Give an optimizer the state of the parameters that it shares with the parent."""
    for name, parameter in model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {
                key: part_like(parameter, value.to(parameter.device, copy=True)) for key, value in moments[name].items()
            }


def trunk_state(run: Run, out: Path, given: Path | None) -> Path | None:
    """Return the kept state that a trunk can go on from: of the longest shorter run of the same trunk, if any.

    Looked for in the folder given and in those beside `out`.
    """
    if run.training.schedule != "constant" or run.parent is not None:
        return None
    beside = [path.parent for path in out.resolve().parent.glob(f"*/{STATE}")]
    found: list[tuple[int, Path]] = []
    for folder in [*([given] if given else []), *beside]:
        if not (folder / RECORD).is_file():
            continue
        record = load_record(folder / RECORD)
        if record.run.trajectory == run.trajectory and record.steps < run.steps and record.status == "ok":
            _check_state(folder / STATE, record)
            found.append((record.steps, folder / STATE))
    return max(found)[1] if found else None


def keep_state(out: Path, checkpoint: Path | None) -> None:
    """Put the final checkpoint of a run that had nothing left to train in the place of its state."""
    if not (out / STATE).exists() and checkpoint is not None:
        with replacing(out / STATE) as temporary:
            shutil.copyfile(checkpoint, temporary)


def _check_state(state: Path, record: Record) -> None:
    problem = checkpoint_problem(state, record.id) if state.exists() else "it is missing"
    if problem is not None:
        raise QpipeError(
            f"{state}: the state that run {record.id} should have kept is of no use ({problem}); delete "
            f"{state.with_name(RECORD)} and train that run again"
        )

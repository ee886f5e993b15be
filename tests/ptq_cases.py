"""Small checkpoints for the tests of post-training quantization."""

from pathlib import Path

import safetensors.torch
import torch
from training_cases import make_store, small_run

from qpipe.cli import main
from qpipe.corpus.store import TokenStore
from qpipe.model import Decoder
from qpipe.ptq.quantize import Request, quantize_checkpoint
from qpipe.ptq.result import PtqResult, Target
from qpipe.ptq_methods import get_method
from qpipe.record import Record
from qpipe.runs import Run
from qpipe.train.results import file_digest, weights

CPU = torch.device("cpu")
QUICK = {"sequences": 4}


def lively_decoder(run: Run, seed: int = 0) -> Decoder:
    """A decoder whose blocks matter: weights far larger than at the start of training, columns of unequal size."""
    model = Decoder(run.shape, run.format_spec)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "blocks" in name and parameter.ndim == 2:
                spread = torch.exp2(torch.randn(parameter.shape[1], generator=generator))
                parameter += 0.15 * spread * torch.randn(parameter.shape, generator=generator)
            elif parameter.ndim == 2:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def save_run(folder: Path, run: Run | None = None, seed: int = 0, **changes: object) -> Record:
    """Write a finished dense run as training leaves it; `changes` go to its record."""
    run = run or small_run()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights(lively_decoder(run, seed)), folder / "model.safetensors")
    payload, total = run.bits_per_weight()
    count = run.parameters
    fields = {
        "id": run.id,
        "status": "ok",
        "loss": 4.0,
        "bits_per_byte": 2.0,
        "train_loss": 4.0,
        "validation_tokens": 699,
        "steps": run.steps,
        "n": count.non_embedding,
        "n_compressed": 0,
        "n_embedding": count.embedding + count.head,
        "d": run.tokens,
        "flops": run.flops,
        "bits_per_weight": total,
        "payload_bits": payload,
        "tokens_digest": "0",
        "weights_digest": file_digest(folder / "model.safetensors"),
        "run": run,
    }
    record = Record.model_validate({**fields, **changes})
    record.write(folder / "record.json")
    return record


def save_tokens(folder: Path, train: int = 6000, validation: int = 700) -> TokenStore:
    """A token store for these checkpoints."""
    return make_store(folder, train=train, validation=validation)


def quantize(
    place: Path, out: Path, method: str = "cvxq", checkpoint: str = "run", seed: int = 0, **asked
) -> PtqResult:
    target = {name: asked.pop(name) for name in list(asked) if name in Target.model_fields}
    request = Request(get_method(method, **{**QUICK, **asked}), Target(**(target or {"bits": 3.0})), seed)
    return quantize_checkpoint(place / checkpoint, place / "tokens", out, request, CPU)


def refused(capsys, *arguments: object) -> str:
    """Return what `qpipe ptq` complains of."""
    assert main(["ptq", *map(str, arguments)]) == 2
    return capsys.readouterr().err

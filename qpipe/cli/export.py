"""Pack a trained run to the bits its representation needs: codes, scales, masks, in one safetensors file.

Embedding, head and norms are stored as trained. The file is read back at once and its weights compared with the run's;
with --tokens the validation loss is computed again from the packed file and compared with the record. --transformers
also writes the dequantized model as a Llama folder for `transformers`, where only weights are compressed (with the
tokenizer if --tokens is given);
--compressed-tensors one that stays quantized, where that format knows the grid (integers with a zero, e4m3).

example:
  qpipe export results/demo/runs/100k-d20x-w4-s0-1f3a9c2e/ packed.safetensors --tokens results/demo/tokens/
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpipe.model import Decoder
    from qpipe.record import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of qpipe train")
    parser.add_argument("file", type=Path, metavar="FILE", help="packed file to write (.safetensors)")
    parser.add_argument("--tokens", type=Path, help="token store, to compute the validation loss from the packed file")
    parser.add_argument(
        "--transformers", type=Path, metavar="FOLDER", help="also write a dequantized Llama folder here"
    )
    parser.add_argument(
        "--compressed-tensors", type=Path, metavar="FOLDER", help="also write a quantized Llama folder here"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Pack, read back, compare; exit code 1 when the loss is not reproduced."""
    from qpipe.compress.model_file import save_packed
    from qpipe.train.evaluate import load_model

    model, record = load_model(args.out)
    size = save_packed(model, args.file, {"run": record.id, "representation": record.run.format_spec.name})
    result: dict[str, Any] = {
        "id": record.id,
        "file": str(args.file),
        "bytes": args.file.stat().st_size,
        "bits_per_weight": size.stored_bits / size.weights,
        "computed_bits_per_weight": size.computed_bits / size.weights,
    }
    if args.transformers is not None:
        result["transformers"] = str(write_llama(packed_decoder(args.file, record), record, args.transformers))
    if args.compressed_tensors is not None:
        result["compressed_tensors"] = str(write_quantized(model, record, args.compressed_tensors))
    if args.tokens is not None:
        for folder in filter(None, (args.transformers, args.compressed_tensors)):
            _copy_tokenizer(args.tokens, folder)
        result |= _losses(packed_decoder(args.file, record), record, args.tokens)
    print(json.dumps(result, indent=1) if args.json else _text(result))
    return 0 if result.get("reproduced", True) else 1


def _copy_tokenizer(tokens: Path, folder: Path) -> None:
    from qpipe.corpus.store import MANIFEST, TOKENIZER

    shutil.copy((tokens.parent if tokens.name == MANIFEST else tokens) / TOKENIZER, folder / TOKENIZER)


def packed_decoder(file: Path, record: "Record") -> "Decoder":
    """Rebuild a run's model from its packed file: dequantized weights, activations compressed as in the run."""
    from qpipe.compress.model_file import read_packed
    from qpipe.model import Decoder

    spec = record.run.format_spec
    rotation = spec.rotation if spec.activations else 0
    model = Decoder(record.run.shape, spec.model_copy(update={"weights": None, "rotation": rotation}))
    model.load_state_dict(read_packed(file).state)
    model.set_progress(1.0)
    return model


def write_llama(model: "Decoder", record: "Record", folder: Path) -> Path:
    """Write a weight-only model, dequantized, as a folder that `transformers` opens; refuses to replace one."""
    from qpipe.errors import QpipeError

    if record.run.format_spec.activations is not None:
        raise QpipeError(
            f"run {record.id} compresses activations ({record.run.format_spec.name}), which a Llama folder cannot say; "
            "export a weight-only run, or leave out --transformers"
        )
    with _new_folder(folder) as temporary:
        _save_llama(model, temporary)
    return folder


def write_quantized(model: "Decoder", record: "Record", folder: Path) -> Path:
    """Write a trained model, quantized, as a folder that `transformers` opens with `compressed-tensors`."""
    from qpipe.huggingface import dequantized
    from qpipe.quantized_llama import check, write_quantized_llama

    check(record.run.format_spec)
    with _new_folder(folder) as temporary:
        _save_llama(dequantized(model), temporary)
        write_quantized_llama(model, record.run.format_spec, temporary)
    return folder


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that takes its place when it is complete; refuses to replace one."""
    from qpipe.errors import QpipeError

    if folder.exists():
        raise QpipeError(f"{folder} exists already; give a new folder")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_llama(model: "Decoder", folder: Path) -> None:
    from qpipe.ptq.export import to_llama

    to_llama(model).save_pretrained(folder, max_shard_size="100GB")


def _losses(model: "Decoder", record: "Record", tokens: Path) -> dict[str, Any]:
    """Validation loss of the reloaded model beside the recorded one."""
    from qpipe.memory import sequences_at_once
    from qpipe.train.evaluate import TOLERANCE
    from qpipe.train.store import open_store
    from qpipe.train.validation import Validation

    run = record.run
    store = open_store(run, tokens)
    batch = sequences_at_once(run.shape, run.training.batch_sequences)
    validation = Validation(store.validation, run.shape.context, batch, run.training.precision, run.seed)
    found = validation.loss(model, validation.windows)
    weights = run.format_spec.weights
    # Kept weights without a grid are stored as bfloat16, whatever precision the run multiplied in.
    tolerance = TOLERANCE["bf16" if weights is None or weights.grid is None else run.training.precision]
    reproduced = record.loss is not None and abs(found - record.loss) <= tolerance
    return {"recorded": record.loss, "found": found, "reproduced": reproduced}


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['id']}: {result['file']}, {result['bytes']:,} bytes",
        f"  compressed layers: {result['bits_per_weight']:.4f} bits/weight stored, "
        f"{result['computed_bits_per_weight']:.4f} computed",
    ]
    if "found" in result:
        verdict = "reproduced" if result["reproduced"] else "NOT reproduced"
        lines.append(
            f"  validation loss {result['found']!r} from the packed file, {result['recorded']!r} recorded: {verdict}"
        )
    return "\n".join(lines)

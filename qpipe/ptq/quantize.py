"""Quantizing a checkpoint from start to result: the whole process, in order.

    load -> choose text -> search depths (measure, allocate, round, look at held-out text, again) -> round for good,
    block by block where inputs are needed -> write -> reload -> measure -> ptq.json last

A dense run that diverged ends at once, as a result of that status: its siblings in a study must not wait for it.

Everything reported is measured on the packed file after reading it back. Work that was killed goes on from the last
finished round or block and ends with the same file.
"""

import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpipe.corpus.store import MANIFEST, TokenStore
from qpipe.errors import QpipeError
from qpipe.identity import digest
from qpipe.ptq.layer import QuantizedLayer
from qpipe.ptq.measure import describe_layer, measure_distortion, measure_losses, total_bits, zero_bit_share
from qpipe.ptq.network import Network, Source, diverged_run, load_network
from qpipe.ptq.packed import build, read_packed, write_packed
from qpipe.ptq.planning import Plan
from qpipe.ptq.result import PACKED, RESULT, RUNTIME, PtqResult, Target, load_result
from qpipe.ptq.rounding import Pieces, round_independently, round_streaming
from qpipe.ptq.scratch import write_runtime
from qpipe.ptq.search import Exact, Search
from qpipe.ptq.tasks import LayerTask
from qpipe.ptq.text import Text, choose_text
from qpipe.ptq_methods import Method

log = logging.getLogger("qpipe.ptq")

_OWN = ("scratch", PACKED, RUNTIME)


@dataclass(frozen=True)
class Request:
    """What is wanted.

    Attributes
    ----------
    method, target, seed
        How, how small, and the seed of calibration text and probes.
    validation_tokens
        Evaluate about so many tokens of the validation split; None for all.
    """

    method: Method
    target: Target
    seed: int = 0
    validation_tokens: int | None = None

    def identity(self, source: Source, store: TokenStore | None) -> str:
        """Return the digest of all that decides the result."""
        fields: dict[str, Any] = {
            "method": self.method.model_dump(mode="json"),
            "target": self.target.model_dump(mode="json"),
            "seed": self.seed,
            "validation_tokens": self.validation_tokens,
            "checkpoint": source.digest,
            "tokens": store.digest if store else None,
        }
        return digest(fields)


def quantize_checkpoint(
    checkpoint: Path, tokens: Path | None, out: Path, request: Request, device: torch.device
) -> PtqResult:
    """Quantize a checkpoint, or go on with it, or return the result if it is finished.

    Parameters
    ----------
    checkpoint
        Folder of a finished dense run, or a transformers model.
    tokens
        Token store (folder or manifest) for calibration and evaluation; None works for data-free methods.
    out
        Receives `packed.safetensors`, `runtime.json` and, last, `ptq.json`; the latter two alone for a dense run that
        diverged.

    Raises
    ------
    QpipeError
        See `load_network`, `choose_text`, `Planner.plan`; `out` holds something else; targets out of range.
    """
    begin = time.monotonic()
    check_target(request.target, request.method, tokens)
    if (diverged := diverged_run(checkpoint)) is not None:
        return _without_model(request, diverged, _open(tokens), out, device)
    network, source = load_network(checkpoint, device)
    store = _open(tokens)
    identity = request.identity(source, store)
    if (finished := check_folder(out, identity)) is not None:
        log.info("%s is already finished: %s", out, summary(finished))
        return finished
    text = None if store is None else choose_text(store, network, sequences_needed(request.method), request.seed)
    exact = Exact.of(network)
    search = Search(network, exact, text, request.method, request.target, request.seed, out / "scratch", identity)
    with torch.no_grad():
        tasks, plan = search.run()
        plans = [plan, *search.rivals(tasks)]
        layers, plan = _best_rounded(network, exact, tasks, plans, request.method, text, out / "scratch", identity)
    write_packed(out / PACKED, layers, source.description, network.model)
    exact.restore(network)
    measured = _measure(out / PACKED, network, text, request)
    seconds = {**search.seconds, "all": time.monotonic() - begin}
    write_runtime(out / RUNTIME, device, seconds)
    result = _result(request, identity, source, store, exact, layers, plan, out, measured)
    result.write(out / RESULT)
    shutil.rmtree(out / "scratch", ignore_errors=True)
    return result


def _open(tokens: Path | None) -> TokenStore | None:
    return None if tokens is None else TokenStore.open(tokens.parent if tokens.name == MANIFEST else tokens)


def sequences_needed(method: Method) -> int:
    """Return the calibration sequences over all rounds; the final rounding sees all of them."""
    return method.sequences * (method.iterations if method.needs_sensitivities else 1)


def check_target(target: Target, method: Method, tokens: Path | None) -> None:
    """Raise `QpipeError` for a target out of range, several or none, or text that is needed and missing."""
    problems = []
    bits, size, rise = target.bits, target.size, target.max_loss_increase
    if sum(value is not None for value in (bits, size, rise)) != 1:
        problems.append("give exactly one of bits, size and max loss increase")
    if bits is not None and not 0 < bits <= 16:
        problems.append(f"{bits:g} bits per weight asked for; depths go up to 8 bits: use more than 0 and at most 16")
    if size is not None and size < 1:
        problems.append(f"a size of {size} bytes asked for; use a positive one, e.g. 45MiB")
    if rise is not None and not 0 < rise < math.inf:
        problems.append(f"a loss increase of {rise} asked for; use a positive number of nats/token")
    if tokens is None and not method.data_free:
        problems.append(f"method '{method.name}' needs text for calibration: give a token store")
    if target.payload_only and bits is None:
        problems.append("payload-only goes with bits: sizes and loss increases are of everything that is stored")
    if tokens is None and rise is not None:
        problems.append("a largest loss increase needs text to measure it: give a token store")
    if problems:
        raise QpipeError(problems)


def check_folder(out: Path, identity: str) -> PtqResult | None:
    """Return the finished result of this very request, None for a new or unfinished folder (error: anything else)."""
    if out.exists() and not out.is_dir():
        raise QpipeError(f"{out} is a file; choose a folder for the results")
    if (out / RESULT).exists():
        result = load_result(out / RESULT)
        if result.identity == identity and (result.file_bytes is None or (out / PACKED).exists()):
            return result
        raise QpipeError(
            f"{out} holds another result ({result.label}, identity {result.identity}; {identity} was asked for); "
            "choose another folder or delete it"
        )
    strangers = sorted(p.name for p in out.iterdir() if p.name not in _OWN) if out.is_dir() else []
    if strangers:
        raise QpipeError(f"{out} exists and holds other files ({', '.join(strangers[:3])}); choose another folder")
    return None


def _best_rounded(
    network: Network,
    exact: Exact,
    tasks: dict[str, LayerTask],
    plans: list[Plan],
    method: Method,
    text: Text | None,
    scratch: Path,
    identity: str,
) -> tuple[dict[str, QuantizedLayer], Plan]:
    """Round the network for good by each plan; return what has the least held-out loss, and its plan."""
    found = []
    for number, plan in enumerate(plans):
        exact.restore(network)
        pieces = Pieces(scratch / f"{number}", f"{identity} {plan.digest()}")
        layers, loss = _round(network, tasks, plan, method, text, pieces), 0.0
        if len(plans) > 1:
            assert text is not None
            loss = text.selection(network)
            log.info("depths %s: held-out loss %.4f", "as searched" if number == 0 else "spread evenly", loss)
        found.append((loss if math.isfinite(loss) else math.inf, layers, plan))
    _, layers, plan = min(found, key=lambda one: one[0])
    return layers, plan


def _round(
    network: Network, tasks: dict[str, LayerTask], plan: Plan, method: Method, text: Text | None, pieces: Pieces
) -> dict[str, QuantizedLayer]:
    if not method.streams:
        return round_independently(network, tasks, plan, method)
    assert text is not None
    batches = text.calibration(0, sequences_needed(method))
    return round_streaming(network, tasks, plan, method, batches, pieces, log.info)


def _measure(path: Path, dense: Network, text: Text | None, request: Request) -> dict[str, Any]:
    if text is None:
        return {}
    log.info("evaluating the packed file")
    stored = build(read_packed(path), dense.device)
    found: dict[str, Any] = measure_losses(stored, dense, text, request.validation_tokens)
    if request.method.needs_sensitivities:
        found["measured_distortion"] = measure_distortion(stored, dense, text, request.method.probe)
    broken = [name for name in ("loss", "dense_loss") if not math.isfinite(found[name])]
    found = {name: value if math.isfinite(value) else None for name, value in found.items()}
    if broken:
        found |= {"status": "diverged", "message": f"not finite: {', '.join(broken)}"}
    return found


def _without_model(
    request: Request, source: Source, store: TokenStore | None, out: Path, device: torch.device
) -> PtqResult:
    """Write the result of quantizing a run that diverged: there is nothing to quantize, and that is what it says."""
    identity = request.identity(source, store)
    if (finished := check_folder(out, identity)) is not None:
        return finished
    assert source.record is not None
    result = PtqResult(
        **_asked(request, identity, source, store),
        status="diverged",
        message=f"the dense run diverged: {source.record.message}",
        bits_per_weight=None,
        payload_bits=None,
        bits={},
        file_bytes=None,
        zero_bit_share=None,
        allocation_gap=None,
        partition_gain=None,
        predicted_distortion=None,
        layers={},
    )
    write_runtime(out / RUNTIME, device, {})
    result.write(out / RESULT)
    return result


def _asked(request: Request, identity: str, source: Source, store: TokenStore | None) -> dict[str, Any]:
    """Return the fields of a result that say what was asked for."""
    return {
        "identity": identity,
        "method": request.method,
        "target": request.target,
        "seed": request.seed,
        "checkpoint": source.name,
        "checkpoint_digest": source.digest,
        "tokens_digest": None if store is None else store.digest,
        "record": source.record,
    }


def _result(
    request: Request,
    identity: str,
    source: Source,
    store: TokenStore | None,
    exact: Exact,
    layers: dict[str, QuantizedLayer],
    plan: Plan,
    out: Path,
    measured: dict[str, Any],
) -> PtqResult:
    bits = total_bits(layers)
    return PtqResult(
        **_asked(request, identity, source, store),
        bits_per_weight=bits.per_weight,
        payload_bits=bits.payload_per_weight,
        bits={name: value for name, value in vars(bits).items() if name != "weights"},
        file_bytes=(out / PACKED).stat().st_size,
        zero_bit_share=zero_bit_share(layers),
        allocation_gap=plan.gap,
        partition_gain=plan.gain,
        power=plan.power if request.method.needs_sensitivities else None,
        predicted_distortion=plan.predicted,
        layers={name: describe_layer(layer, exact.weights[name]) for name, layer in layers.items()},
        **measured,
    )


def summary(result: PtqResult) -> str:
    """Return one line about a result."""
    if result.bits_per_weight is None or result.payload_bits is None or result.file_bytes is None:
        return f"{result.method.name}: diverged: {result.message}"
    bits = f"{result.bits_per_weight:.4f} bits/weight ({result.payload_bits:.4f} payload)"
    size = f"{result.file_bytes / 2**20:.2f} MiB"
    if result.status != "ok":
        return f"{result.method.name}: {bits}, {size}, diverged: {result.message}"
    if result.loss is None or result.dense_loss is None:
        return f"{result.method.name}: {bits}, {size}, not evaluated (no token store)"
    rise = result.loss - result.dense_loss
    return f"{result.method.name}: {bits}, {size}, loss {result.loss:.4f} ({rise:+.4f}), ppl {result.perplexity:.3f}"

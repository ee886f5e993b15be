"""Quantizing a checkpoint from start to result: the whole process, in order.

    load -> choose text -> [measure sensitivities -> choose depths -> round -> look at held-out loss] x iterations
         -> round for good (block by block where inputs are needed) -> write -> reload -> evaluate -> ptq.json last

Everything reported is measured on the packed file after reading it back. Work that was killed goes on from the last
finished round or block and ends with the same file.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpipe.corpus.store import MANIFEST, TokenStore
from qpipe.errors import QpipeError
from qpipe.identity import digest
from qpipe.ptq.layer import Bits, QuantizedLayer
from qpipe.ptq.linearity import divergence, layer_coefficients
from qpipe.ptq.methods import Method
from qpipe.ptq.network import Network, Source, load_network, set_weight
from qpipe.ptq.packed import build, read_packed, remaining_tensors, write_packed
from qpipe.ptq.planning import LayerTask, Plan, Planner, make_task
from qpipe.ptq.result import PACKED, RESULT, RUNTIME, LayerResult, PtqResult, Target, load_result
from qpipe.ptq.rounding import Pieces, hidden_error, round_independently, round_streaming
from qpipe.ptq.scratch import Progress, read_progress, write_progress
from qpipe.ptq.sensitivity import Probe, Sensitivity, accumulate, hidden_probe, loss_probe, principal_basis
from qpipe.ptq.text import choose_text

log = logging.getLogger("qpipe.ptq")

_BUDGET_STEPS = 12
_LAYER_SEQUENCES = 8


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
        Receives `packed.safetensors`, `runtime.json` and, last, `ptq.json`.

    Raises
    ------
    QpipeError
        See `load_network`, `choose_text`, `Planner.plan`; `out` holds something else; targets out of range.
    """
    begin = time.monotonic()
    _check_target(request.target, request.method, tokens)
    network, source = load_network(checkpoint, device)
    store = None if tokens is None else TokenStore.open(tokens.parent if tokens.name == MANIFEST else tokens)
    identity = request.identity(source, store)
    finished = check_folder(out, identity)
    if finished is not None:
        log.info("%s is already finished: %s", out, summary(finished))
        return finished
    work = _Work(network, source, store, request, out, identity)
    layers = work.quantize()
    write_packed(out / PACKED, layers, source.description, network.model)
    result = work.result(layers)
    work.write_runtime(time.monotonic() - begin)
    result.write(out / RESULT)
    work.remove_scratch()
    log.info("%s", summary(result))
    return result


def _check_target(target: Target, method: Method, tokens: Path | None) -> None:
    problems = []
    asked = [target.bits, target.size, target.max_loss_increase]
    if sum(value is not None for value in asked) != 1:
        problems.append("give exactly one of bits, size and max loss increase")
    if target.bits is not None and not 0 < target.bits <= 16:
        problems.append(
            f"{target.bits:g} bits per weight asked for; use more than 0 and at most 8 plus side information"
        )
    if target.size is not None and target.size < 1:
        problems.append(f"a size of {target.size} bytes asked for; use a positive one, e.g. 45MiB")
    if target.max_loss_increase is not None and not 0 < target.max_loss_increase < math.inf:
        problems.append(f"a loss increase of {target.max_loss_increase} asked for; use a positive number of nats/token")
    if tokens is None and (not method.data_free or target.max_loss_increase is not None):
        problems.append(
            f"method '{method.name}' needs text for calibration: give a token store"
            if not method.data_free
            else "a largest loss increase needs text to measure it: give a token store"
        )
    if problems:
        raise QpipeError(problems)


def check_folder(out: Path, identity: str) -> PtqResult | None:
    """Return the finished result of this very request, None for a new or unfinished folder (error: anything else)."""
    if (out / RESULT).exists():
        result = load_result(out / RESULT)
        if result.identity == identity and (out / PACKED).exists():
            return result
        raise QpipeError(
            f"{out} holds another result ({result.method.name}, {result.bits_per_weight:.3f} bits, identity "
            f"{result.identity}; {identity} was asked for); choose another folder or delete it"
        )
    strangers = sorted(p.name for p in out.iterdir() if p.name not in _OWN) if out.is_dir() else []
    if out.exists() and not out.is_dir():
        raise QpipeError(f"{out} is a file; choose a folder for the results")
    if strangers:
        raise QpipeError(f"{out} exists and holds other files ({', '.join(strangers[:3])}); choose another folder")
    return None


_OWN = ("scratch", PACKED, RUNTIME)


class _Work:
    """One quantization under way."""

    def __init__(
        self,
        network: Network,
        source: Source,
        store: TokenStore | None,
        request: Request,
        out: Path,
        identity: str,
    ) -> None:
        self.network, self.source, self.request, self.out, self.identity = network, source, request, out, identity
        self.method, self.store = request.method, store
        self.text = None if store is None else choose_text(store, network, self._sequences_needed(), request.seed)
        self.exact = {name: linear.weight.data.clone() for name, linear in network.linears().items()}
        self.exact_bias = {name: linear.bias for name, linear in network.linears().items()}
        self.scratch = out / "scratch"
        self.predicted: Plan | None = None
        self.dense_loss: float | None = None
        self.seconds: dict[str, float] = {}

    def _sequences_needed(self) -> int:
        method = self.method
        return method.sequences * max(method.iterations if method.needs_sensitivities else 1, 1)

    # -- the parts of the process -------------------------------------------------------------------------------------

    @torch.no_grad()
    def quantize(self) -> dict[str, QuantizedLayer]:
        """Return the quantized layers; the network holds them afterwards."""
        if self.text is not None:
            self.dense_selection = self.text.selection(self.network)
        tasks, plan = self._search() if self.method.needs_sensitivities else self._plan_once()
        self.predicted = plan
        self._restore()
        begin = time.monotonic()
        if not self.method.streams:
            layers = round_independently(self.network, tasks, plan, self.method)
        else:
            assert self.text is not None
            batches = self.text.calibration(0, self.method.sequences)
            key = digest([self.identity, {name: d.tolist() for name, d in plan.depths.items()}])
            pieces = Pieces(self.scratch, key)
            layers = round_streaming(self.network, tasks, plan, self.method, batches, pieces, log.info)
        self.seconds["rounding"] = time.monotonic() - begin
        return layers

    def _plan_once(self) -> tuple[dict[str, LayerTask], Plan]:
        tasks = self._tasks(None)
        coefficients = None
        if self.method.allocation == "layer":
            coefficients = layer_coefficients(self.network, self._probe_tokens(), self.request.seed, log.info)
        return tasks, self._solve(Planner(tasks, self.method, coefficients), tasks)

    def _probe_tokens(self) -> Tensor:
        """Tokens for the per-layer coefficients: held-out text where there is some, else random ids."""
        if self.text is not None:
            return torch.cat(self.text.selection_batches())[:_LAYER_SEQUENCES]
        length = min(self.network.context, 512)
        generator = torch.Generator().manual_seed(self.request.seed)
        shape = (_LAYER_SEQUENCES, length)
        return torch.randint(0, self.network.vocab_size, shape, generator=generator).to(self.network.device)

    def _search(self) -> tuple[dict[str, LayerTask], Plan]:
        """Alternate measuring and quantizing; return the depths with the least loss on held-out text."""
        assert self.text is not None
        state = read_progress(self.scratch, self.identity, self.network.device) or Progress()
        for round_ in range(state.rounds, self.method.iterations):
            begin = time.monotonic()
            if round_ and state.latest:
                self._apply(state, state.latest)
            self._measure(state.sensitivity, round_)
            self._restore()
            tasks = self._tasks(state.sensitivity)
            plan = self._solve(Planner(tasks, self.method, None), tasks)
            round_independently(self.network, tasks, plan, self.method)
            loss = self.text.selection(self.network)
            state.take(round_ + 1, loss, tasks, plan)
            self._restore()
            if self.method.iterations > 1:
                write_progress(self.scratch, self.identity, state)
            seconds = time.monotonic() - begin
            rise = loss - self.dense_selection
            log.info("round %d: held-out loss %.4f (+%.4f), %.1f s", round_ + 1, loss, rise, seconds)
            self.seconds[f"round {round_ + 1}"] = seconds
        return self._best(state)

    def _best(self, state: Progress) -> tuple[dict[str, LayerTask], Plan]:
        assert state.best is not None
        tasks = self._tasks(state.sensitivity)
        for name, task in tasks.items():
            task.layout = state.best.layouts[name]
        return tasks, state.best.plan

    def _apply(self, state: Progress, kept: Any) -> None:
        """Put the weights of a round into the network (the gradient is taken at the quantized weights)."""
        tasks = self._tasks(state.sensitivity)
        for name, task in tasks.items():
            task.layout = kept.layouts[name]
        round_independently(self.network, tasks, kept.plan, self.method)

    def _measure(self, into: Sensitivity, round_: int) -> None:
        assert self.text is not None
        batches = self.text.calibration(round_, self.method.sequences)
        generator = torch.Generator().manual_seed(self.request.seed * 1000 + round_)
        probe = self._probe(batches)
        with torch.enable_grad():
            for number, batch in enumerate(batches):
                accumulate(self.network, batch, into, probe, generator, self.method.positions)
                log.info("round %d: sensitivities %d/%d", round_ + 1, number + 1, len(batches))

    def _probe(self, batches: list[Tensor]) -> Probe:
        if self.method.probe == "loss":
            return loss_probe(self.network)
        count = self.method.components
        return hidden_probe(principal_basis(self.network, batches, count) if count else None)

    def _tasks(self, sensitivity: Sensitivity | None) -> dict[str, LayerTask]:
        return {
            name: make_task(
                weight, sensitivity.mean(name) if sensitivity else None, self.method, self.exact_bias[name] is not None
            )
            for name, weight in self.exact.items()
        }

    def _restore(self) -> None:
        for name, linear in self.network.linears().items():
            set_weight(linear, self.exact[name])

    # -- targets ------------------------------------------------------------------------------------------------------

    def _solve(self, planner: Planner, tasks: dict[str, LayerTask]) -> Plan:
        """Choose depths for the target, whatever it is given in."""
        target = self.request.target
        if target.bits is not None:
            return planner.plan(target.bits, target.payload_only)
        if target.size is not None:
            return planner.plan(self._bits_for_size(target.size, planner), False)
        return self._plan_for_loss(planner, tasks)

    def _bits_for_size(self, size: int, planner: Planner) -> float:
        rest = sum(t.numel() * t.element_size() for t in remaining_tensors(self.network.model, self.exact).values())
        header = 2048 + 1024 * len(self.exact) + 512 * len(self.network.model.state_dict())
        bits = (size - rest - header) * 8 / planner.weights
        if bits <= 0:
            raise QpipeError(
                f"{size:,} bytes asked for, but embedding, head and norms at 16 bits and the file's header alone take "
                f"{rest + header:,}; ask for more"
            )
        return bits

    def _plan_for_loss(self, planner: Planner, tasks: dict[str, LayerTask]) -> Plan:
        """Bisect on bits for the smallest rate whose held-out loss rises by no more than wanted."""
        assert self.text is not None
        limit = self.request.target.max_loss_increase
        low, high, best = 0.0, 9.0, None
        for _ in range(_BUDGET_STEPS):
            bits = (low + high) / 2
            plan, rise = self._rise(planner, tasks, bits)
            log.info("%.3f bits: held-out loss +%.4f", bits, rise)
            if plan is not None and limit is not None and rise <= limit:
                high, best = bits, plan
            else:
                low = bits
        if best is None:
            raise QpipeError(f"no rate up to 8 bits keeps the loss increase below {limit}; ask for a larger one")
        return best

    def _rise(self, planner: Planner, tasks: dict[str, LayerTask], bits: float) -> tuple[Plan | None, float]:
        assert self.text is not None
        try:
            plan = planner.plan(bits, False)
        except QpipeError:  # below what scales and offsets alone take
            return None, math.inf
        round_independently(self.network, tasks, plan, self.method)
        rise = self.text.selection(self.network) - self.dense_selection
        self._restore()
        return plan, rise

    # -- what is reported ---------------------------------------------------------------------------------------------

    def result(self, layers: dict[str, QuantizedLayer]) -> PtqResult:
        """Read the packed file back, measure, and say what was found."""
        begin = time.monotonic()
        path = self.out / PACKED
        selection, measured, loss, dense, tokens = self._evaluate(path)
        self.seconds["evaluation"] = time.monotonic() - begin
        bits = sum((layer.bits() for layer in layers.values()), Bits())
        assert self.predicted is not None
        record = self.source.record
        config = self.source.description.get("config", {})
        return PtqResult(
            identity=self.identity,
            method=self.method,
            target=self.request.target,
            seed=self.request.seed,
            checkpoint=record.id if record else str(config.get("model_type")),
            checkpoint_digest=self.source.digest,
            tokens_digest=None if self.store is None else self.store.digest,
            record=record,
            bits_per_weight=bits.per_weight,
            payload_bits=bits.payload_per_weight,
            bits={name: value for name, value in vars(bits).items() if name != "weights"},
            file_bytes=path.stat().st_size,
            zero_bit_share=sum(int((q.depth == 0).sum()) * q.layout.size for q in layers.values()) / bits.weights,
            allocation_gap=self.predicted.gap,
            partition_gain=self.predicted.gain,
            predicted_distortion=self.predicted.predicted,
            measured_distortion=measured,
            selection_loss=selection,
            dense_loss=dense,
            loss=loss,
            perplexity=None if loss is None else math.exp(min(loss, 700.0)),
            validation_tokens=tokens,
            layers={name: describe_layer(layer, self.exact[name]) for name, layer in layers.items()},
        )

    def _evaluate(self, path: Path) -> tuple[float | None, float | None, float | None, float | None, int | None]:
        """Return selection loss, measured distortion, loss, dense loss and their tokens, of the file read back."""
        if self.text is None:
            return None, None, None, None, None
        stored = build(read_packed(path), self.network.device)
        self._restore_dense()
        windows = self.text.evaluation_windows(self.request.validation_tokens)
        log.info("evaluating on %s tokens", f"{windows.tokens:,}")
        loss, dense = self.text.evaluate(stored, windows), self.text.evaluate(self.network, windows)
        measured = self._distortion(stored) if self.method.needs_sensitivities else None
        return self.text.selection(stored), measured, loss, dense, windows.tokens

    def _restore_dense(self) -> None:
        """Make the network the dense one again, biases included."""
        self._restore()
        for name, linear in self.network.linears().items():
            linear.bias = self.exact_bias[name]

    @torch.no_grad()
    def _distortion(self, stored: Network) -> float:
        """Measure what the plan predicted, on held-out text: squared error of the hidden state, or KL (x 2)."""
        assert self.text is not None
        states = [[n.hidden(b).flatten(0, 1) for b in self.text.selection_batches()] for n in (self.network, stored)]
        if self.method.probe == "hidden":
            return hidden_error(*states)
        return 2 * divergence(self.network, torch.cat(states[0]), torch.cat(states[1]))

    def write_runtime(self, seconds: float) -> None:
        """Write how long it took and where."""
        from qpipe.ptq.scratch import write_runtime

        write_runtime(self.out / RUNTIME, self.network.device, seconds, self.seconds)

    def remove_scratch(self) -> None:
        """Remove what was kept for going on."""
        import shutil

        shutil.rmtree(self.scratch, ignore_errors=True)


def describe_layer(layer: QuantizedLayer, exact: Tensor) -> LayerResult:
    """Return the bit map and the error of a layer."""
    shares = torch.bincount(layer.depth.cpu(), minlength=9).double() / layer.layout.groups
    error = (layer.dense() - exact).double().square().sum() / exact.double().square().sum()
    return LayerResult(
        weights=exact.numel(),
        mean_depth=float(layer.depth.double().mean()),
        depth_shares=[float(share) for share in shares],
        relative_error=float(error),
        group=[layer.layout.rows, layer.layout.columns],
    )


def summary(result: PtqResult) -> str:
    """Return one line about a result."""
    bits = f"{result.bits_per_weight:.4f} bits/weight ({result.payload_bits:.4f} payload)"
    size = f"{result.file_bytes / 2**20:.2f} MiB"
    if result.loss is None or result.dense_loss is None:
        return f"{result.method.name}: {bits}, {size}, not evaluated (no token store)"
    rise = result.loss - result.dense_loss
    return f"{result.method.name}: {bits}, {size}, loss {result.loss:.4f} ({rise:+.4f}), ppl {result.perplexity:.3f}"

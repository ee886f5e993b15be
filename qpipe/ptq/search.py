"""Which depths: from a network, text and a target to a plan.

With sensitivities: measure them at the present weights, allocate, quantize, look at held-out text, and again at the
quantized weights, since quantizing changes what matters. Sums run over all rounds; groups are formed in the first one
and stay. The round with the least held-out loss is kept. Without: one plan.
"""

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qpipe.errors import QpipeError
from qpipe.ptq.linearity import layer_coefficients
from qpipe.ptq.network import Network, set_weight
from qpipe.ptq.packed import header_bytes, remaining_tensors
from qpipe.ptq.planning import Plan, Planner
from qpipe.ptq.result import Target
from qpipe.ptq.rounding import round_independently
from qpipe.ptq.scratch import Progress, read_progress, write_progress
from qpipe.ptq.sensitivity import Probe, Sensitivity, accumulate, hidden_probe, loss_probe, principal_basis
from qpipe.ptq.tasks import LayerTask, make_task
from qpipe.ptq.text import Text
from qpipe.ptq_methods import Method

log = logging.getLogger("qpipe.ptq")

_BISECTIONS = 12
_LAYER_SEQUENCES = 8
_POWERS = (0.5, 0.0)


@dataclass
class Exact:
    """The dense weights and biases of a network's linear layers."""

    weights: dict[str, Tensor]
    biases: dict[str, nn.Parameter | None]

    @classmethod
    def of(cls, network: Network) -> "Exact":
        """Copy the weights."""
        linears = network.linears()
        return cls(
            {name: linear.weight.data.clone() for name, linear in linears.items()},
            {name: linear.bias for name, linear in linears.items()},
        )

    def restore(self, network: Network) -> None:
        """Put everything back."""
        for name, linear in network.linears().items():
            set_weight(linear, self.weights[name])
            linear.register_parameter("bias", self.biases[name])


class Search:
    """The search for depths.

    Parameters
    ----------
    network, exact
        The network, holding its dense weights, and a copy of them.
    text
        Calibration and selection text; None for data-free methods.
    method, target, seed
        What is wanted.
    scratch, identity
        Where rounds are kept, and under which name.
    """

    def __init__(
        self,
        network: Network,
        exact: Exact,
        text: Text | None,
        method: Method,
        target: Target,
        seed: int,
        scratch: Path,
        identity: str,
    ) -> None:
        self.network, self.exact, self.text = network, exact, text
        self.method, self.target, self.seed = method, target, seed
        self.scratch, self.identity = scratch, identity
        self.dense_loss = math.nan
        self.seconds: dict[str, float] = {}

    def run(self) -> tuple[dict[str, LayerTask], Plan]:
        """Return the layers, cut into groups, and their depths; the network holds its dense weights again."""
        if self.text is not None and (self._chooses or self.target.max_loss_increase is not None):
            self.dense_loss = self.text.selection(self.network)
        return self._rounds() if self.method.needs_sensitivities else self._once()

    @property
    def _chooses(self) -> bool:
        """Whether several plans compete on held-out text."""
        return self.method.needs_sensitivities and (self.method.iterations > 1 or self.method.tempered)

    def _once(self) -> tuple[dict[str, LayerTask], Plan]:
        tasks, coefficients = self._tasks(None), None
        if self.method.allocation == "layer":
            coefficients = layer_coefficients(self.network, self._tokens_for_layers(), self.seed, log.info)
        return tasks, self._solve(self._planner(tasks, coefficients))

    def _tokens_for_layers(self) -> Tensor:
        """Return held-out text where there is some, else random ids."""
        if self.text is not None:
            return torch.cat(self.text.selection_batches())[:_LAYER_SEQUENCES]
        shape = (_LAYER_SEQUENCES, min(self.network.context, 512))
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, self.network.vocab_size, shape, generator=generator).to(self.network.device)

    def _rounds(self) -> tuple[dict[str, LayerTask], Plan]:
        assert self.text is not None
        state = read_progress(self.scratch, self.identity, self.network.device) or Progress()
        tasks = self._tasks(state) if state.layouts else {}
        for number in range(state.rounds, self.method.iterations):
            begin = time.monotonic()
            if state.latest is not None:
                round_independently(self.network, tasks, state.latest, self.method)
            self._measure(state.sensitivity, number)
            self.exact.restore(self.network)
            tasks = tasks or self._tasks(state)
            for name, task in tasks.items():
                task.importance = state.sensitivity.mean(name)
            plan = self._solve(planner := self._planner(tasks))
            last = number + 1 == self.method.iterations
            loss = self._selection_loss(tasks, plan) if self._chooses else math.nan
            if self.method.tempered and last:
                loss, plan = self._temper(tasks, planner, plan, loss)
            state.take(loss, tasks, plan)
            write_progress(self.scratch, self.identity, state)
            seconds = self.seconds[f"round {number + 1}"] = time.monotonic() - begin
            log.info("round %d: held-out loss %.4f (%+.4f), %.1f s", number + 1, loss, loss - self.dense_loss, seconds)
        assert state.best is not None
        return tasks, state.best

    def _temper(self, tasks: dict[str, LayerTask], planner: Planner, plan: Plan, loss: float) -> tuple[float, Plan]:
        """Return the best of a plan and of those that trust sensitivities less, with its held-out loss.

        Sensitivities assume small, independent errors. Where that fails (few bits, models trained briefly, whose inputs
        span few directions) they lead astray, and plans for their powers below 1 do better.
        """
        for power in _POWERS:
            other = self._solve(self._planner({name: task.tempered(power) for name, task in tasks.items()}))
            other_loss = self._selection_loss(tasks, other)
            log.info("sensitivities to the power of %g: held-out loss %+.4f", power, other_loss - self.dense_loss)
            if other_loss < loss:
                plan = replace(other, predicted=planner.predicted(other), gain=plan.gain, power=power)
                loss = other_loss
        return loss, plan

    def rivals(self, tasks: dict[str, LayerTask]) -> list[Plan]:
        """Return the plans that compete with the one found once errors are fed back: evenly spread depths.

        Error feedback makes up for more where all groups are coarse alike, which no sum over groups predicts. For a
        target in loss there is none: plans for it differ in size.
        """
        if not (self.method.tempered and self.method.feedback) or self.target.max_loss_increase is not None:
            return []
        even = self.method.model_copy(update={"allocation": "uniform"})
        plan = self._solve(Planner(tasks, even, None, self.target.payload_only))
        planner = self._planner(tasks)
        return [replace(plan, predicted=planner.predicted(plan), gain=planner.gain(), power=None)]

    def _tasks(self, state: Progress | None) -> dict[str, LayerTask]:
        """Cut all layers into groups: as in an earlier round, or anew."""
        layouts = {} if state is None else state.layouts
        return {
            name: make_task(
                weight,
                None if state is None else state.sensitivity.mean(name),
                self.method,
                self.exact.biases[name] is not None,
                layouts.get(name),
            )
            for name, weight in self.exact.weights.items()
        }

    def _measure(self, into: Sensitivity, number: int) -> None:
        assert self.text is not None
        batches = self.text.calibration(number, self.method.sequences)
        generator = torch.Generator().manual_seed(self.seed * 1000 + number)
        probe = self._probe(batches)
        report_every = max(1, len(batches) // 8)
        with torch.enable_grad():
            for done, batch in enumerate(batches, 1):
                accumulate(self.network, batch, into, probe, generator, self.method.positions)
                if done % report_every == 0 or done == len(batches):
                    log.info("round %d: sensitivities, batch %d/%d", number + 1, done, len(batches))

    def _probe(self, batches: list[Tensor]) -> Probe:
        if self.method.probe == "loss":
            return loss_probe(self.network)
        count = self.method.components
        return hidden_probe(principal_basis(self.network, batches, count) if count else None)

    def _selection_loss(self, tasks: dict[str, LayerTask], plan: Plan) -> float:
        """Return the held-out loss of a plan, rounded without error feedback."""
        assert self.text is not None
        round_independently(self.network, tasks, plan, self.method)
        loss = self.text.selection(self.network)
        self.exact.restore(self.network)
        return loss

    def _planner(self, tasks: dict[str, LayerTask], coefficients: dict[str, float] | None = None) -> Planner:
        return Planner(tasks, self.method, coefficients, self.target.payload_only)

    def _solve(self, planner: Planner) -> Plan:
        """Choose depths for the target, whatever it is given in."""
        if self.target.bits is not None:
            return planner.plan(self.target.bits)
        if self.target.size is not None:
            return planner.plan(self._bits_for_size(self.target.size, planner))
        return self._plan_for_loss(planner)

    def _bits_for_size(self, size: int, planner: Planner) -> float:
        rest = sum(t.numel() * t.element_size() for t in remaining_tensors(self.network.model, planner.tasks).values())
        rest += header_bytes(self.network.model, planner.tasks)
        bits = (size - rest) * 8 / planner.weights
        if bits <= 0:
            raise QpipeError(
                f"{size:,} bytes asked for, but embedding, head and norms at 16 bits and the file's header alone take "
                f"{rest:,}; ask for more"
            )
        return bits

    def _plan_for_loss(self, planner: Planner) -> Plan:
        """Bisect for the fewest bits whose held-out loss rises by no more than wanted."""
        limit = self.target.max_loss_increase or 0.0
        low, high, best = 0.0, 9.0, None
        for _ in range(_BISECTIONS):
            bits = (low + high) / 2
            try:
                plan = planner.plan(bits)
            except QpipeError:  # fewer bits than scales and offsets alone take
                low = bits
                continue
            rise = self._selection_loss(planner.tasks, plan) - self.dense_loss
            log.info("%.3f bits: held-out loss %+.4f", bits, rise)
            if rise <= limit:
                high, best = bits, plan
            else:
                low = bits
        if best is None:
            raise QpipeError(f"no rate up to 8 bits keeps the loss increase below {limit}; ask for a larger one")
        return best

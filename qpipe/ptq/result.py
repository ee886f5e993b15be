"""What quantizing a checkpoint leaves behind for science: `ptq.json`, and its row of the loss table. No torch here."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.ptq_config import ptq_representation
from qpipe.ptq_methods import Method
from qpipe.record import Record, loss_row

RESULT, PACKED, RUNTIME = "ptq.json", "packed.safetensors", "runtime.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(_Frozen):
    """What was asked for; exactly one of the first three."""

    bits: float | None = Field(default=None, description="average bits per weight")
    size: int | None = Field(default=None, description="bytes of the whole packed file")
    max_loss_increase: float | None = Field(default=None, description="nats/token on the selection split")
    payload_only: bool = Field(default=False, description="`bits` counts codes alone, not scales, depths, biases")


class LayerResult(_Frozen):
    """One layer."""

    weights: int = Field(description="weights (count)")
    mean_depth: float = Field(description="payload bits per weight")
    depth_shares: list[float] = Field(description="share of the weights at 0, 1, ... 8 bits")
    relative_error: float = Field(description="squared error of the weights over their squared norm")
    group: list[int] = Field(description="rows x columns of a group")


class PtqResult(_Frozen):
    """Result of one quantization. Losses are mean cross-entropies (nats/token).

    A dense run that diverged is no model to quantize, yet a result: status `diverged`, no bits, no packed file. The
    same status says that the loss of a quantized model is not finite; then everything but the loss is there.
    """

    identity: str = Field(description="digest of checkpoint, method, target, seed and tokens")
    status: Literal["ok", "diverged"] = Field(default="ok", description="`diverged`: there is no finite loss")
    message: str = Field(default="", description="what happened, when not ok")
    method: Method
    target: Target
    seed: int = Field(description="seed of calibration text and probes")
    checkpoint: str = Field(description="run id, or the model type of a transformers checkpoint")
    checkpoint_digest: str = Field(description="SHA-256 of the checkpoint's weights")
    tokens_digest: str | None = Field(description="digest of the token store; none without one")
    record: Record | None = Field(description="record of the dense run, for one of ours")
    bits_per_weight: float | None = Field(description="all stored bits of quantized layers per weight")
    payload_bits: float | None = Field(description="codes alone, per weight")
    bits: dict[str, int] = Field(description="stored bits by what they are for")
    file_bytes: int | None = Field(description="size of packed.safetensors, embedding, head and norms included")
    zero_bit_share: float | None = Field(description="share of weights in groups of 0 bits")
    allocation_gap: float | None = Field(description="allocation's cost is at most this share above the optimum")
    partition_gain: float | None = Field(description="bits per weight that groups save by the closed form (gamma)")
    power: float | None = Field(
        default=None,
        description="power of the sensitivities that depths were chosen for; none: spread evenly, or no sensitivities",
    )
    predicted_distortion: float | None = Field(description="predicted error of the probed output per token")
    measured_distortion: float | None = Field(default=None, description="measured on the selection split, same unit")
    selection_loss: float | None = Field(
        default=None, description="on held-out calibration text, of the weights as stored"
    )
    dense_loss: float | None = Field(default=None, description="loss of the checkpoint on the validation split")
    loss: float | None = Field(default=None, description="loss of the packed file, reloaded, on the validation split")
    perplexity: float | None = Field(default=None, description="exp(loss)")
    validation_tokens: int | None = Field(default=None, description="tokens both losses are averaged over (count)")
    layers: dict[str, LayerResult]

    @property
    def label(self) -> str:
        """Name of the representation in loss tables, e.g. `w2.5-cvxq`: what was asked for, not what was reached."""
        if self.target.bits is not None:
            return ptq_representation(self.method.name, self.target.bits)
        if self.bits_per_weight is None:  # a size or a loss was asked for, and nothing could be quantized
            return self.method.name
        return ptq_representation(self.method.name, round(self.bits_per_weight, 2))

    def loss_row(self) -> dict[str, Any]:
        """Return a row with the columns of the loss table (error: never evaluated, or no record of a run)."""
        if self.record is None or (self.loss is None and self.status == "ok"):
            raise QpipeError(
                f"{self.checkpoint} as {self.label}: only quantized runs of qpipe with a validation loss have a row in "
                "the loss table"
            )
        dense = self.record
        per_byte = None if dense.bits_per_byte is None or not dense.loss else dense.bits_per_byte / dense.loss
        return loss_row(dense) | {
            "run": f"{dense.id}-{self.label}-s{self.seed}-{self.identity}",
            "representation": self.label,
            "status": self.status,
            "loss": self.loss,
            "bits_per_byte": None if per_byte is None or self.loss is None else self.loss * per_byte,
            "train_loss": None,
            "bits_per_weight": self.bits_per_weight,
            "payload_bits": self.payload_bits,
            "n_compressed": dense.run.parameters.blocks_linear,
            # Bits of training, as the precision law has it; what happened afterwards is told apart.
            "w_bits": loss_row(dense)["w_bits"],
            "ptq_method": self.method.name,
            "ptq_bits": self.bits_per_weight,
            "parent": dense.id,
            "parent_loss": self.dense_loss,
            "calibration_seed": self.seed,
            "trajectory": dense.run.trajectory or dense.id,
        }

    def write(self, path: Path) -> None:
        """Write `ptq.json` atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def load_result(path: Path) -> PtqResult:
    """Read a `ptq.json` (errors: missing, damaged)."""
    try:
        return PtqResult.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise QpipeError(f"{path}: no such result") from error
    except (ValidationError, ValueError) as error:
        raise QpipeError(
            f"{path}: not a result of qpipe ptq ({error}); delete the folder and quantize again"
        ) from error

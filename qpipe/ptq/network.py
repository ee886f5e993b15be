"""One view of every decoder: its blocks, their linear layers, the hidden state before the head, token losses.

Checkpoints are a folder of a finished dense run (record.json, model.safetensors) or a folder that transformers saved
(config.json, safetensors) with a Llama- or OPT-type model. Weights are float32 here; on a GPU products run in bfloat16
where the checkpoint was trained so.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe.errors import QpipeError
from qpipe.model import Decoder
from qpipe.record import Record, load_record
from qpipe.train.results import RECORD, WEIGHTS, file_digest, load_weights

ARCHITECTURES = ("llama", "opt")
"""Hugging Face model types whose blocks are known."""
_LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**28}
"""Enough rows for a product at full speed; on a CPU few enough that the logits need not go far from the cache."""


@dataclass(frozen=True)
class Source:
    """What a checkpoint is.

    Attributes
    ----------
    description
        Plain data from which the same architecture can be built again: `{"kind": "qpipe", "run": ...}` or
        `{"kind": "transformers", "config": ...}`.
    digest
        SHA-256 (hex) of the weights.
    record
        The record of one of our runs, else None.
    """

    description: dict[str, Any]
    digest: str
    record: Record | None = None

    @property
    def name(self) -> str:
        """Run id, or the model type."""
        return self.record.id if self.record else str(self.description["config"]["model_type"])


class Network(nn.Module):
    """A decoder whose block linears can be quantized.

    Attributes
    ----------
    model
        The decoder itself.
    blocks
        Its blocks in order.
    context, vocab_size
        Longest sequence (tokens) and ids known.
    bf16
        Whether products run in bfloat16.
    """

    model: Any
    blocks: nn.ModuleList

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, context: int, vocab_size: int, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.blocks = blocks
        self.context, self.vocab_size, self.bf16 = context, vocab_size, bf16
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Network":
        """Stay in evaluation: dropout has no place here."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linear layers inside the blocks by their name in the model, in order."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and id(module) in inside
        }

    def block_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Return the linear layers of one block by their name in the model."""
        inside = {id(module) for module in block.modules()}
        return {name: module for name, module in self.linears().items() if id(module) in inside}

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run products in bfloat16 where the model wants it and a GPU does it well."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and self.device.type == "cuda"):
            yield

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the state (B, T, D) that the head reads."""
        if isinstance(self.model, Decoder):
            return self.model.hidden(tokens)
        state: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return state

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        found: nn.Module = (
            self.model.embedding if isinstance(self.model, Decoder) else self.model.get_input_embeddings()
        )
        return found

    @property
    def head(self) -> nn.Linear:
        """The output head."""
        found: nn.Linear = self.model.head if isinstance(self.model, Decoder) else self.model.get_output_embeddings()
        return found

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return each token's cross-entropy (nats), (B, T), float32."""
        hidden, flat = self.hidden(tokens).flatten(0, 1), targets.flatten()
        at_once = _LOGITS_AT_ONCE.get(self.device.type, _LOGITS_AT_ONCE["cuda"])
        rows = max(16, at_once // self.vocab_size)
        losses = [
            F.cross_entropy(self.head(part).float(), target, reduction="none")
            for part, target in zip(hidden.split(rows), flat.split(rows), strict=True)
        ]
        return torch.cat(losses).view(targets.shape)


def load_network(folder: Path, device: torch.device) -> tuple[Network, Source]:
    """Load a checkpoint.

    Raises
    ------
    QpipeError
        No checkpoint there, a run that diverged or was not dense, weights that do not fit their record, weights that
        are not finite, an architecture that is not known.
    """
    if (folder / RECORD).is_file():
        network, source = _load_run(folder, device)
    elif (folder / "config.json").is_file():
        network, source = _load_transformers(folder, device)
    else:
        raise QpipeError(
            f"{folder} holds no checkpoint: expected {RECORD} and {WEIGHTS} of a finished run, or config.json and "
            "safetensors of a transformers model"
        )
    broken = [name for name, value in network.model.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise QpipeError(f"{folder}: weights that are not finite: {', '.join(broken[:5])}; train the model again")
    return network.eval(), source


def diverged_run(folder: Path) -> Source | None:
    """Return a dense run that diverged, None for everything else: `load_network` says what is wrong with the rest."""
    if not (folder / RECORD).is_file():
        return None
    record = load_record(folder / RECORD)
    if record.status != "diverged" or record.run.representation:
        return None
    return Source({"kind": "qpipe", "run": record.run.model_dump(mode="json")}, record.weights_digest, record)


def _load_run(folder: Path, device: torch.device) -> tuple[Network, Source]:
    record = load_record(folder / RECORD)
    problems = []
    if record.status != "ok":
        problems.append(f"{folder}: the run {record.status} ({record.message}); its weights are no model to quantize")
    if record.run.representation:
        name = record.run.representation_name
        problems.append(f"{folder}: the run was trained as '{name}'; quantize a dense run of the same size")
    if not (folder / WEIGHTS).is_file():
        problems.append(f"{folder}: {WEIGHTS} is missing; train the run again")
    elif file_digest(folder / WEIGHTS) != record.weights_digest:
        problems.append(f"{folder}: {WEIGHTS} is not what its record describes (digest differs); train the run again")
    if problems:
        raise QpipeError(problems)
    model = Decoder(record.run.shape, record.run.format_spec)
    load_weights(model, folder / WEIGHTS)
    description = {"kind": "qpipe", "run": record.run.model_dump(mode="json")}
    return wrap_decoder(model.to(device), record.run.training.precision == "bf16"), Source(
        description, record.weights_digest, record
    )


def wrap_decoder(model: Decoder, bf16: bool) -> Network:
    """View one of our decoders."""
    return Network(model, model.blocks, model.shape.context, model.shape.vocab_size, bf16)


def _load_transformers(folder: Path, device: torch.device) -> tuple[Network, Source]:
    config = _read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise QpipeError(f"{folder}: no .safetensors file; save the model with save_pretrained (safe_serialization)")
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise QpipeError(f"{folder}: transformers cannot load it: {error}") from error
    description = {"kind": "transformers", "config": config}
    return wrap_transformers(model.to(device)), Source(description, _joint_digest(files))


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise QpipeError(f"{folder}/config.json is not a model's configuration ({error!r})") from None
    if kind not in ARCHITECTURES:
        raise QpipeError(f"{folder}: model type '{kind}' found; known types: {', '.join(ARCHITECTURES)}")
    return dict(config)


def wrap_transformers(model: Any) -> Network:
    """View a Llama- or OPT-type model of transformers."""
    config = model.config
    base = model.base_model
    blocks = base.decoder.layers if config.model_type == "opt" else base.layers
    model.config.use_cache = False
    return Network(model, blocks, int(config.max_position_embeddings), int(config.vocab_size), bf16=True)


def _joint_digest(files: list[Path]) -> str:
    import hashlib

    digests = [file_digest(path) for path in files]
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def set_weight(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Replace a layer's weight, and its bias where one is given."""
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(linear.weight), requires_grad=False)


def on_each(network: Network, make: Callable[[str], Callable[..., Any]]) -> contextlib.ExitStack:
    """Attach the forward hook `make(name)` to every block linear; closing the stack takes them off."""
    stack = contextlib.ExitStack()
    for name, linear in network.linears().items():
        stack.callback(linear.register_forward_hook(make(name)).remove)
    return stack

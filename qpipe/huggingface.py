"""Llama-type models of Hugging Face as our decoders, and back.

A model is a folder as `save_pretrained` leaves it: `config.json` and one or more safetensors files. Known model types
are those whose blocks are Llama's: `llama` (Llama 2 and 3.x, TinyLlama, SmolLM), `mobilellm`, `mistral` without a
sliding window and `qwen2`, which adds biases to queries, keys and values. Everything else in a configuration that would
change a number (other activations, partial or otherwise scaled rotary embeddings, further biases or norms, shared
layers) is refused by name, since a model that loads and computes something else is worse than one that does not load.

Weights are read from the files themselves, whatever type they are stored in, as float32. The only dependency on
`transformers` is in writing a folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from qpipe.compress import CompressedLinear
from qpipe.errors import QpipeError
from qpipe.formats import Representation
from qpipe.model import Decoder
from qpipe.recipe import ModelShape, RopeScaling

MODEL_TYPES = ("llama", "mobilellm", "mistral", "qwen2")
_INDEX = "model.safetensors.index.json"
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Buffers that older checkpoints carry along; they follow from the configuration."""


def read_shape(folder: Path, context: int | None = None) -> ModelShape:
    """Return the shape of a model.

    Parameters
    ----------
    folder
        Holds `config.json`.
    context
        Sequence length to use (tokens); by default the longest that the model knows.

    Raises
    ------
    QpipeError
        No configuration, a model type that is not known, or properties that our decoder does not have: all at once.
    """
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise QpipeError(f"{folder}: model type '{kind}' found; known types: {', '.join(MODEL_TYPES)}")
    longest = int(config.get("max_position_embeddings", 2048))
    problems = list(_differences(config, longest if context is None else context))
    if context is not None and context > longest:
        problems.append(f"a context of {context} tokens; the model knows {longest} positions")
    if problems:
        raise QpipeError([f"{folder}: {problem}" for problem in problems])
    heads = int(config["num_attention_heads"])
    rope = _rope(config)
    return ModelShape(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        feed_forward=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context=context or longest,
        tied_embeddings=bool(config.get("tie_word_embeddings", False) or config.get("share_embedding", False)),
        rope_theta=rope.get("rope_theta") or config.get("rope_theta", 1e4),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        rope_scaling=_scaling(rope, longest),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QpipeError(f"{path}: no such file; give a folder that save_pretrained has written") from None
    except (OSError, ValueError) as error:
        raise QpipeError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise QpipeError(f"{path}: expected a mapping, found {type(content).__name__}")
    return content


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the configuration says about rotary embeddings, in either of its two notations."""
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def _scaling(rope: Mapping[str, Any], longest: int) -> RopeScaling | None:
    if _rope_type(rope) != "llama3":
        return None
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope.get("original_max_position_embeddings", longest),
    )


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _differences(config: Mapping[str, Any], context: int) -> Iterator[str]:
    """Yield what this model has and our decoder has not."""
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        yield f"config.json lacks {', '.join(missing)}"
        return
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if (head := config.get("head_dim") or width // heads) * heads != width:
        yield f"heads of {head} features x {heads} do not make the width {width}"
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        yield f"activation '{activation}'; the feed-forward here is SwiGLU (silu)"
    if (rope := _rope_type(_rope(config))) not in ("default", "llama3"):
        yield f"rotary embedding of type '{rope}'; known: default, llama3"
    partial = _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        yield f"rotary embedding of {partial:g} of a head; here it covers all of it"
    if config.get("layer_sharing"):
        yield "layers that share weights (layer_sharing)"
    window = config.get("sliding_window")
    if window is not None and window < context and config.get("use_sliding_window", True):
        yield f"a sliding window of {window} tokens, shorter than the context of {context}; give a shorter context"


def weight_files(folder: Path) -> list[Path]:
    """Return a model's safetensors files (errors: none, or one that the index names is missing)."""
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        files = [folder / Path(name).name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    problems = [f"{path}: named in {_INDEX} and missing" for path in files if not path.is_file()]
    if not files:
        problems.append(f"{folder}: no .safetensors file; save the model with save_pretrained (safe_serialization)")
    if problems:
        raise QpipeError(problems)
    return files


def weights_digest(folder: Path) -> str:
    """Return a digest of a model's weight files: SHA-256 of the file, or of the files' digests in order."""
    digests = []
    for path in weight_files(folder):
        with path.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@torch.no_grad()
def load_decoder(folder: Path, shape: ModelShape | None = None) -> Decoder:
    """Return a model as a dense decoder in float32 on the CPU.

    Parameters
    ----------
    folder
        Configuration and weights.
    shape
        Its shape, for another context than its longest (`read_shape`).

    Raises
    ------
    QpipeError
        Unknown architecture, damaged files, tensors that are missing, unknown, of another shape or not finite.
    """
    shape = shape or read_shape(folder)
    if read_shape(folder, shape.context) != shape:
        raise QpipeError(f"{folder}: a model of another shape than {shape}")
    stored = _read_tensors(folder)
    model = Decoder(shape, Representation(name="dense"))
    problems = []
    for name, target in llama_parts(model).items():
        found = stored.pop(name, None)
        if found is None:
            problems.append(f"no tensor {name}")
        elif found.shape != target.shape:
            problems.append(f"{name} has shape {tuple(found.shape)}, expected {tuple(target.shape)}")
        elif not bool(torch.isfinite(found).all()):
            problems.append(f"{name} holds numbers that are not finite")
        else:
            target.copy_(found)
    if shape.tied_embeddings:
        stored.pop("lm_head.weight", None)
    # A Llama with biases has them in all projections; where they are zero they may as well be left out.
    left = {name: value for name, value in stored.items() if not (name.endswith("_proj.bias") and not value.any())}
    problems += [f"{name}: a tensor that our decoder does not have" for name in sorted(left)]
    if problems:
        raise QpipeError([f"{folder}: {problem}" for problem in problems[:10]])
    return model


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise QpipeError(f"{path}: cannot be read as weights: {error}") from error
    return {name: value for name, value in tensors.items() if not name.endswith(_NOT_WEIGHTS)}


def llama_parts(model: Decoder) -> dict[str, Tensor]:
    """Return views of a dense decoder's weights by the names that Llama checkpoints use.

    The fused query-key-value and gate-up layers appear as the parts that they are made of. A tied head is left out.
    """
    parts: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding.weight.data,
        "model.norm.weight": model.norm.weight.data,
    }
    if not model.shape.tied_embeddings:
        parts["lm_head.weight"] = model.head.weight.data
    blocks: Any = model.blocks
    for number, block in enumerate(blocks):
        prefix = f"model.layers.{number}"
        parts[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight.data
        parts[f"{prefix}.post_attention_layernorm.weight"] = block.feed_forward_norm.weight.data
        for name, linear, rows in projections(block, model.shape):
            parts[f"{prefix}.{name}.weight"] = linear.weight.data[rows]
            if linear.bias is not None:
                parts[f"{prefix}.{name}.bias"] = linear.bias.data[rows]
    return parts


def projections(block: Any, shape: ModelShape) -> list[tuple[str, nn.Linear, slice]]:
    """Return (name in Llama, our layer, its rows) of the seven projections of a block."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    everything = slice(None)
    return [
        ("self_attn.q_proj", block.attention.qkv, slice(0, query)),
        ("self_attn.k_proj", block.attention.qkv, slice(query, query + key)),
        ("self_attn.v_proj", block.attention.qkv, slice(query + key, query + 2 * key)),
        ("self_attn.o_proj", block.attention.out, everything),
        ("mlp.gate_proj", block.feed_forward.gate_up, slice(0, shape.feed_forward)),
        ("mlp.up_proj", block.feed_forward.gate_up, slice(shape.feed_forward, 2 * shape.feed_forward)),
        ("mlp.down_proj", block.feed_forward.down, everything),
    ]


@torch.no_grad()
def dequantized(model: Decoder) -> Decoder:
    """Return a dense decoder whose weights are those that a decoder computes with."""
    dense = Decoder(model.shape, Representation(name="dense"))
    compressed = {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)}
    for name, target in dense.named_parameters():
        module, _, part = name.rpartition(".")
        layer = compressed.get(module)
        source = layer.compressed_weight() if layer is not None and part == "weight" else model.get_parameter(name)
        target.copy_(source)
    return dense

"""A quantized model as a folder that transformers loads, dequantized, with every bias in it.

Bias correction adds biases that a plain Llama does not have, and a plain reload would drop them without a word. Llama's
configuration knows `attention_bias` and `mlp_bias`; with these on, all seven projections of a block have a bias, and
those that got none are zero. OPT has its biases anyway. Our own decoders become Llama models: the fused query-key-value
and gate-up layers are cut into the parts that transformers names.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpipe.errors import QpipeError
from qpipe.huggingface import projections
from qpipe.model import Decoder
from qpipe.ptq.network import Network
from qpipe.ptq.packed import build, read_packed
from qpipe.ptq.result import PACKED, RESULT, load_result
from qpipe.recipe import ModelShape

FOLDER = "transformers"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def export_transformers(out: Path, checkpoint: Path) -> Path:
    """Write OUT/transformers from OUT/packed.safetensors; return the folder.

    The weights are float32: exactly the values that codes, scales and offsets stand for. Tokenizer files of the
    checkpoint are copied along.

    Raises
    ------
    QpipeError
        No packed model there.
    """
    import shutil

    if (out / RESULT).is_file() and (result := load_result(out / RESULT)).file_bytes is None:
        raise QpipeError(f"{out}: {result.message}; there is no model to export")
    if not (out / PACKED).is_file():
        raise QpipeError(f"{out} holds no {PACKED}; quantize first")
    network = build(read_packed(out / PACKED), torch.device("cpu"))
    model = to_llama(network.model) if isinstance(network.model, Decoder) else _with_all_biases(network)
    folder, temporary = out / FOLDER, out / f".{FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for name in _TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, temporary / name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def to_llama(model: Decoder) -> Any:
    """Return one of our decoders as a `LlamaForCausalLM` with the same logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    biased = any(isinstance(m, nn.Linear) and m.bias is not None for m in model.blocks.modules())
    shape = model.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters=_rope_parameters(shape),
        tie_word_embeddings=shape.tied_embeddings,
        attention_bias=biased,
        mlp_bias=biased,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = LlamaForCausalLM(config)
    problems = llama.load_state_dict(_llama_state(model, biased), strict=False)
    left = [key for key in problems.missing_keys if not (shape.tied_embeddings and key == "lm_head.weight")]
    assert not left, left
    assert not problems.unexpected_keys, problems.unexpected_keys
    return llama.eval()


def _rope_parameters(shape: ModelShape) -> dict[str, Any]:
    scaling = shape.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": shape.rope_theta}
    numbers = scaling.model_dump(exclude={"original_context"})
    original = {"original_max_position_embeddings": scaling.original_context}
    return {"rope_type": "llama3", "rope_theta": shape.rope_theta, **numbers, **original}


def _llama_state(model: Decoder, biased: bool) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
    }
    if not model.shape.tied_embeddings:
        state["lm_head.weight"] = model.head.weight
    blocks: Any = model.blocks
    for number, block in enumerate(blocks):
        prefix = f"model.layers.{number}"
        state[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight
        state[f"{prefix}.post_attention_layernorm.weight"] = block.feed_forward_norm.weight
        for name, linear, rows in projections(block, model.shape):
            state[f"{prefix}.{name}.weight"] = linear.weight[rows].clone()
            if biased:
                bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
                state[f"{prefix}.{name}.bias"] = bias[rows].clone()
    return {name: value.detach() for name, value in state.items()}


def _with_all_biases(network: Network) -> Any:
    """Return the transformers model, its configuration saying that it has the biases it has."""
    model: Any = network.model
    linears = network.linears()
    biased = [name for name, linear in linears.items() if linear.bias is not None]
    if model.config.model_type != "llama" or not biased:
        return model
    for linear in linears.values():
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros(linear.out_features), requires_grad=False)
    model.config.attention_bias = model.config.mlp_bias = True
    return model

"""Models of transformers in, models for transformers out, with every bias in its place."""

import numpy as np
import pytest
import torch
from ptq_cases import CPU, lively_decoder, quantize, save_run, save_tokens
from training_cases import small_run

from qpipe.ptq.export import export_transformers, to_llama
from qpipe.ptq.network import wrap_transformers
from qpipe.ptq.packed import build, read_packed


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_our_decoder_exports_to_llama_with_its_biases(tmp_path, corrected, tied):
    from transformers import AutoModelForCausalLM

    save_run(tmp_path / "run", small_run(tied_embeddings=tied, kv_heads=1))
    save_tokens(tmp_path / "tokens")
    quantize(tmp_path, tmp_path / "out", bits=3.0, bias_correction=corrected)
    folder = export_transformers(tmp_path / "out", tmp_path / "run")
    reloaded, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    stored = build(read_packed(tmp_path / "out" / "packed.safetensors"), CPU)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(tokens).logits, stored.model(tokens), atol=2e-4, rtol=1e-4)
    biases = [name for name, _ in reloaded.named_parameters() if name.endswith(".bias")]
    assert len(biases) == (7 * 2 if corrected else 0)


def test_llama_of_a_dense_decoder_has_its_logits():
    model = lively_decoder(small_run())
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(to_llama(model)(tokens).logits, model(tokens), atol=2e-4, rtol=1e-4)


def tiny_transformers(kind: str):
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    if kind == "opt":
        config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                           max_position_embeddings=16, word_embed_proj_dim=16, dropout=0.1)  # fmt: skip
        return OPTForCausalLM(config)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("method", ["cvxq", "gptq", "rtn"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_hugging_face_models(tmp_path, kind, method):
    from transformers import AutoModelForCausalLM

    model = tiny_transformers(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "model")
    save_tokens(tmp_path / "tokens")
    result = quantize(
        tmp_path, tmp_path / "out", method, checkpoint="model", bits=3.5, bias_correction=method == "cvxq"
    )
    assert 3.45 < result.bits_per_weight <= 3.5
    assert result.checkpoint == kind
    assert np.isfinite(result.loss)
    stored = build(read_packed(tmp_path / "out" / "packed.safetensors"), CPU)
    folder = export_transformers(tmp_path / "out", tmp_path / "model")
    reloaded, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = reloaded.eval()(tokens).logits
        torch.testing.assert_close(exported, stored.model(input_ids=tokens).logits, atol=1e-5, rtol=1e-5)
        dense = wrap_transformers(model.eval())
        changed = (exported - dense.model(input_ids=tokens).logits).norm() / exported.norm()
    assert 1e-4 < float(changed) < 0.6
    if kind == "opt":  # its own biases survive every method
        assert float(reloaded.model.decoder.layers[0].fc1.bias.detach().abs().max()) > 0.01

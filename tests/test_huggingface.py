"""Hugging Face models: same logits as transformers, finetuned, exported, and refused where they differ from a Llama."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from training_cases import VOCABULARY, make_store

from qpipe.accounting import count_parameters
from qpipe.cli import main
from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.formats import resolve
from qpipe.huggingface import dequantized, load_decoder, read_shape
from qpipe.model import Decoder
from qpipe.ptq.export import to_llama
from qpipe.record import load_record
from qpipe.train.start import take_weights

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def save(folder: Path, kind: str = "llama", shard: str = "1GB", **changes: Any) -> Any:
    """Save a randomly initialised model of transformers and return it."""
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    torch.manual_seed(0)
    make_config, make_model = classes[kind]
    model = make_model(make_config(**{**SMALL, **changes})).eval()
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value, 1.0 if "norm" in name else 0.0, 0.2)  # gains and biases too
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"shard": "8KB"}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    reference = save(tmp_path, kind, **changes)
    if "shard" in changes:
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = load_decoder(tmp_path)
    tokens = torch.randint(0, VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=2e-5, rtol=1e-4)
    assert count_parameters(model.shape).total == sum(p.numel() for p in reference.parameters())
    exported = to_llama(model)
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, reference(tokens).logits, atol=2e-5, rtol=1e-4)


def test_old_notations_are_understood(tmp_path: Path) -> None:
    """Llama 3's rotary scaling as transformers 4 wrote it, and MobileLLM's word for tied embeddings."""
    reference = save(tmp_path, rope_parameters=LLAMA3, tie_word_embeddings=True)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    del config["tie_word_embeddings"]
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "share_embedding": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mobilellm", "layer_sharing": False}))
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path)(tokens), reference(tokens).logits, atol=2e-5, rtol=1e-4)


def test_half_precision_files_are_read_exactly(tmp_path: Path) -> None:
    reference = save(tmp_path).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    model = load_decoder(tmp_path, read_shape(tmp_path, 16))
    assert model.shape.context == 16
    assert model.embedding.weight.dtype == torch.float32
    assert torch.equal(model.embedding.weight, reference.model.embed_tokens.weight.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "known types: llama, mobilellm, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"head_dim": 16}, "heads of 16 features"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "0.5 of a head"),
        ({"layer_sharing": True}, "layers that share weights"),
        ({"sliding_window": 8}, "sliding window of 8"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"vocab_size": 70}, r"has shape \(64, 32\), expected \(70, 32\)"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "a tensor that our decoder does not have"),
        ({"attention_bias": True}, "no tensor model.layers.0.self_attn.q_proj.bias"),
    ],
    ids=str,
)
def test_what_differs_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(QpipeError, match=message):
        load_decoder(tmp_path)


def test_only_biases_of_zero_may_be_left_out(tmp_path: Path) -> None:
    model = save(tmp_path, attention_bias=True, mlp_bias=True)
    with pytest.raises(QpipeError, match=r"mlp\.down_proj\.bias: a tensor that our decoder does not have"):
        load_decoder(tmp_path)
    for name, value in model.named_parameters():
        if name.endswith(("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")):
            value.data.zero_()
    model.save_pretrained(tmp_path)
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path)(tokens), model(tokens).logits, atol=2e-5, rtol=1e-4)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QpipeError, match="no such file"):
        load_decoder(tmp_path)
    save(tmp_path, shard="8KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(QpipeError, match=r"named in model\.safetensors\.index\.json and missing"):
        load_decoder(tmp_path)
    lost.write_bytes(content[:-5])
    with pytest.raises(QpipeError, match="cannot be read as weights"):
        load_decoder(tmp_path)
    with pytest.raises(QpipeError, match="65 tokens; the model knows 64 positions"):
        read_shape(tmp_path, 65)
    broken = save(tmp_path / "other")
    broken.model.norm.weight.data[3] = float("nan")
    broken.save_pretrained(tmp_path / "other")
    with pytest.raises(QpipeError, match=r"model\.norm\.weight holds numbers that are not finite"):
        load_decoder(tmp_path / "other")


def test_dequantized_weights_compute_the_same(tmp_path: Path) -> None:
    save(tmp_path, "qwen2")
    dense = load_decoder(tmp_path)
    model = Decoder(dense.shape, resolve("w3"))
    take_weights(model, dense)
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        assert not torch.allclose(model(tokens), dense(tokens), atol=1e-2)
        torch.testing.assert_close(dequantized(model)(tokens), model(tokens), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data") / "tokens")


@pytest.mark.parametrize(("kind", "representation"), [("qwen2", "w2-seq"), ("llama", "w4")])
def test_finetune_evaluate_and_export(
    kind: str, representation: str, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """From a folder of transformers to a finetuned one, in which transformers computes what was recorded."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    save(tmp_path / "model", kind, tie_word_embeddings=True)
    common = ["--context", "16", "--batch", "8", "--precision", "fp32", "--learning-rate", "3e-3"]
    arguments = ["finetune", str(tmp_path / "model"), str(store.path)]
    losses = {}
    for name, options in {"dense": ["dense", "--steps", "0"], "tuned": [representation, "--steps", "60"]}.items():
        assert main([*arguments, str(tmp_path / name), "--representation", *options, *common]) == 0
        record = load_record(tmp_path / name / "record.json")
        assert record.d == record.run.steps * 128
        losses[name] = record.loss
    assert losses["tuned"] < losses["dense"] - 0.5
    assert main(["evaluate", str(tmp_path / "tuned"), str(store.path)]) == 0
    export = ["export", str(tmp_path / "tuned"), str(tmp_path / "p.safetensors"), "--tokens", str(store.path)]
    assert main([*export, "--transformers", str(tmp_path / "exported")]) == 0
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    # The split's tokens in windows of 16, as the recorded loss counts them; the last few tokens are left out.
    tokens = torch.from_numpy(store.validation.read(0, len(store.validation)).astype("int64"))
    count = (len(tokens) - 1) // 16
    with torch.no_grad():
        logits = reloaded(tokens[: 16 * count].view(count, 16)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1 : 16 * count + 1])
    assert loss.item() == pytest.approx(losses["tuned"], abs=0.02)
    with torch.no_grad():  # and back into our own decoder
        torch.testing.assert_close(
            load_decoder(tmp_path / "exported")(tokens[None, :16]), reloaded(tokens[None, :16]).logits
        )
    assert (tmp_path / "exported/tokenizer.json").read_bytes() == (store.path / "tokenizer.json").read_bytes()
    weights = tmp_path / "model/model.safetensors"
    assert (
        load_record(tmp_path / "tuned/record.json").run.checkpoint.weights
        == hashlib.sha256(weights.read_bytes()).hexdigest()
    )
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({**state, "model.norm.weight": state["model.norm.weight"] * 2}, weights)
    again = ["train", str(tmp_path / "tuned/run.yaml"), str(store.path), str(tmp_path / "again")]
    assert main([*again, "--parent", str(tmp_path / "model")]) == 2
    assert "holds" in capfd.readouterr().err


def test_wrong_options_are_reported_together(store: TokenStore, tmp_path: Path, capfd: Any) -> None:
    save(tmp_path)
    arguments = ["finetune", str(tmp_path), str(store.path), str(tmp_path / "out"), "--representation", "w2-seq"]
    assert main([*arguments, "--steps", "-1", "--batch", "0", "--learning-rate", "0"]) == 2
    err = capfd.readouterr().err
    assert all(word in err for word in ("--steps -1", "--batch 0", "--learning-rate 0"))
    assert main([*arguments, "--context", "4096"]) == 2
    assert "64 positions" in capfd.readouterr().err

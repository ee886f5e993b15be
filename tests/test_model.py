"""The decoder against transformers' Llama, float64 autograd, published parameter counts and its initial law."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_cases import small_shape

import qpipe.cross_entropy
from qpipe.accounting import count_parameters, linear_shapes
from qpipe.cross_entropy import linear_cross_entropy
from qpipe.formats import resolve
from qpipe.model import Decoder
from qpipe.recipe import QUEST, ModelShape

DENSE = resolve("dense")


def llama_with_weights_of(decoder: Decoder) -> torch.nn.Module:
    """transformers' Llama with a decoder's weights, unfused."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = decoder.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="eager",
    )
    state = {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight}
    state["lm_head.weight"] = decoder.head.weight
    key_value = shape.kv_heads * shape.head_dim
    for number, block in enumerate(decoder.blocks):
        prefix = f"model.layers.{number}."
        query, key, value = block.attention.qkv.weight.split([shape.width, key_value, key_value])
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        state |= {
            f"{prefix}input_layernorm.weight": block.attention_norm.weight,
            f"{prefix}post_attention_layernorm.weight": block.feed_forward_norm.weight,
            f"{prefix}self_attn.q_proj.weight": query,
            f"{prefix}self_attn.k_proj.weight": key,
            f"{prefix}self_attn.v_proj.weight": value,
            f"{prefix}self_attn.o_proj.weight": block.attention.out.weight,
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": block.feed_forward.down.weight,
        }
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(state, strict=True)
    return llama.eval()


def random_decoder(shape: ModelShape, representation: str = "dense", seed: int = 0) -> Decoder:
    """A decoder whose every parameter matters: weights ten times the usual, norms around one."""
    decoder = Decoder(shape, resolve(representation))
    decoder.initialize(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.mul_(10)
    return decoder


@pytest.mark.parametrize(
    "changes", [{}, {"tied_embeddings": True}, {"heads": 4, "kv_heads": 2}, {"rope_theta": 5e5, "norm_epsilon": 1e-2}]
)
def test_logits_equal_transformers_llama(changes: dict[str, object]) -> None:
    decoder = random_decoder(small_shape(**changes))
    tokens = torch.randint(0, decoder.shape.vocab_size, (3, decoder.shape.context))
    with torch.no_grad():
        expected = llama_with_weights_of(decoder)(tokens).logits
        found = decoder(tokens)
    assert expected.std() > 0.5  # else the tolerance would not test anything
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("changes", [{"tied_embeddings": True}, {"heads": 4, "kv_heads": 2}])
def test_gradients_equal_transformers_llama(changes: dict[str, object]) -> None:
    decoder = random_decoder(small_shape(**changes))
    llama = llama_with_weights_of(decoder)
    tokens = torch.randint(0, 64, (3, 17))
    decoder.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    llama(tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous(), labels=tokens).loss.backward()
    block, layer = decoder.blocks[0], llama.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    parts = {
        "qkv": (block.attention.qkv, [attention.q_proj, attention.k_proj, attention.v_proj]),
        "out": (block.attention.out, [attention.o_proj]),
        "gate_up": (block.feed_forward.gate_up, [mlp.gate_proj, mlp.up_proj]),
        "down": (block.feed_forward.down, [mlp.down_proj]),
        "norms": (block.attention_norm, [layer.input_layernorm]),
        "last norm": (decoder.norm, [llama.model.norm]),
        "embedding": (decoder.embedding, [llama.model.embed_tokens]),
        "head": (decoder.head, [llama.lm_head]),
    }
    for name, (ours, theirs) in parts.items():
        expected = torch.cat([module.weight.grad for module in theirs])
        error = (ours.weight.grad - expected).norm() / expected.norm()
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("size", list(QUEST.rungs))
def test_parameter_counts_of_the_quest_ladder(size: str) -> None:
    published = {
        "30M": 30_482_560,
        "50M": 49_556_736,
        "100M": 102_777_856,
        "200M": 203_188_480,
        "430M": 443_068_288,
        "800M": 822_151_168,
    }
    shape = QUEST.shape(size, 32_000)
    decoder = Decoder(shape, DENSE, device="meta")
    groups = {"embedding": 0, "head": 0, "blocks": 0, "norm": 0}
    for name, parameter in decoder.named_parameters():
        groups[name.split(".")[0]] += parameter.numel()
    assert groups["blocks"] + groups["norm"] == published[size]
    count = count_parameters(shape)
    assert (count.non_embedding, count.embedding, count.head) == (published[size], groups["embedding"], groups["head"])


@pytest.mark.parametrize("changes", [{}, {"heads": 4, "kv_heads": 1, "tied_embeddings": True}])
def test_counted_layers_are_the_layers(changes: dict[str, object]) -> None:
    shape = small_shape(**changes)
    decoder = Decoder(shape, DENSE, device="meta")
    block = dict(decoder.blocks[0].named_modules())
    for name, inputs, outputs in linear_shapes(shape):
        assert tuple(block[name].weight.shape) == (outputs, inputs)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count_parameters(shape).total


def float64_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden64, weight64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(hidden64 @ weight64.T, targets)
    (3 * loss).backward()
    assert hidden64.grad is not None
    assert weight64.grad is not None
    return loss.detach(), hidden64.grad, weight64.grad


@pytest.mark.parametrize("rows", [16, 100, 1000])
@pytest.mark.parametrize("spread", [1, 50])  # so far apart, most classes' probabilities are 0 in float32
def test_chunked_loss_and_gradients_equal_float64(rows: int, spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qpipe.cross_entropy, "chunk_rows", lambda device, vocab_size: rows)
    hidden = (spread * torch.randn(333, 24)).requires_grad_()
    weight = torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(0, 50, (333,))
    loss = linear_cross_entropy(hidden, weight, targets)
    (3 * loss).backward()
    expected, hidden_gradient, weight_gradient = float64_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), hidden_gradient, rtol=1e-4, atol=2e-7 * spread)
    torch.testing.assert_close(weight.grad.double(), weight_gradient, rtol=1e-4, atol=2e-7 * spread)


def test_loss_in_bfloat16_has_gradients_of_bfloat16_accuracy() -> None:
    hidden = torch.randn(200, 24, requires_grad=True)
    weight = torch.randn(50, 24, requires_grad=True)
    targets = torch.randint(0, 50, (200,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    (3 * loss).backward()
    expected, hidden_gradient, weight_gradient = float64_cross_entropy(hidden, weight, targets)
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 0.02
    assert (hidden.grad.double() - hidden_gradient).norm() < 0.01 * hidden_gradient.norm()
    assert (weight.grad.double() - weight_gradient).norm() < 0.01 * weight_gradient.norm()


def test_losses_agree_with_logits() -> None:
    decoder = random_decoder(small_shape(tied_embeddings=True))
    tokens = torch.randint(0, 64, (5, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = F.cross_entropy(decoder(inputs).double().flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(decoder.token_losses(inputs, targets).flatten().double(), expected, rtol=1e-5, atol=1e-6)
    assert decoder.loss(inputs, targets).item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_gradients_of_a_tied_model_equal_those_through_logits() -> None:
    tokens = torch.randint(0, 64, (5, 17))
    gradients = []
    for through_logits in (False, True):
        decoder = random_decoder(small_shape(tied_embeddings=True))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        loss = (
            F.cross_entropy(decoder(inputs).flatten(0, 1), targets.flatten())
            if through_logits
            else decoder.loss(inputs, targets)
        )
        loss.backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    decoder = random_decoder(small_shape())
    tokens = torch.randint(0, 64, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 64
    with torch.no_grad():
        before, after = decoder(tokens), decoder(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-5)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 0.1


def test_initial_weights_follow_their_law() -> None:
    shape = small_shape(width=128, heads=4, kv_heads=4, feed_forward=352, layers=8, vocab_size=512)
    decoder = Decoder(shape, DENSE)
    decoder.initialize(1)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(1).all(), name
            continue
        residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        expected = 0.02 / math.sqrt(16) if residual else 0.02
        error = expected / math.sqrt(2 * parameter.numel())  # of a sample's standard deviation
        assert abs(parameter.std().item() - expected) < 5 * error, name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("representation", ["w4a4", "2:4", "w2"])
def test_all_representations_start_from_the_same_weights(representation: str) -> None:
    dense, compressed = Decoder(small_shape(), DENSE), Decoder(small_shape(), resolve(representation))
    dense.initialize(3)
    compressed.initialize(3)
    state = compressed.state_dict()
    for name, value in dense.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("representation", ["dense", "w4a4", "2:4", "powerprop", "w2-lsq", "noise4"])
def test_making_a_model_draws_nothing_and_initializing_gives_every_weight_a_value(representation: str) -> None:
    before = torch.get_rng_state()
    decoder = Decoder(small_shape(qkv_bias=True), resolve(representation))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [weight for weight in decoder.parameters() if not hasattr(weight, "is_scale")]
    for weight in weights:
        weight.data.fill_(float("nan"))
    decoder.initialize(0)
    assert all(weight.isfinite().all() for weight in weights)
    generator = torch.Generator().manual_seed(0)
    first = torch.empty(decoder.embedding.weight.shape).normal_(0, 0.02, generator=generator)
    assert torch.equal(decoder.embedding.weight, first)


def test_embedding_head_and_norms_stay_in_high_precision() -> None:
    decoder = Decoder(small_shape(), resolve("w4a4"))
    kinds = {name: type(module).__name__ for name, module in decoder.named_modules()}
    assert (kinds["embedding"], kinds["head"], kinds["norm"]) == ("Embedding", "DenseLinear", "RMSNorm")
    compressed = {name.split(".", 2)[2] for name, kind in kinds.items() if kind == "CompressedLinear"}
    assert compressed == {name for name, _, _ in linear_shapes(decoder.shape)}


def test_sums_joined_with_norms_change_numbers_by_rounding_alone():
    decoder = Decoder(small_shape(), DENSE)
    decoder.initialize(0)
    tokens = torch.arange(32).view(2, 16)
    decoder.joins_norms = False
    hidden = decoder.hidden(tokens)
    hidden.square().sum().backward()
    gradients = [parameter.grad for parameter in decoder.parameters()]
    decoder.zero_grad()
    joined = decoder._hidden_with_joined_norms(tokens, decoder.cosine, decoder.sine)
    joined.square().sum().backward()
    torch.testing.assert_close(joined, hidden)
    for parameter, gradient in zip(decoder.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()

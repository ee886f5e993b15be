"""Shapes, parameters, tokens and FLOPs against published figures and closed forms."""

import pytest

from qpipe.accounting import count_parameters, training_flops_per_token
from qpipe.errors import QpipeError
from qpipe.recipe import QUEST, RECIPES, ModelShape, get_recipe, swiglu_width

# arXiv 2502.05003, appendix B, and the authors' run table: layers/width/heads, N, tokens at D/N = 100, learning rate.
PUBLISHED = {
    "30M": (6, 640, 5, 30_482_560, 2_999_975_936, 1.2e-3),
    "50M": (7, 768, 6, 49_556_736, 4_999_872_512, 1.2e-3),
    "100M": (8, 1024, 8, 102_777_856, 9_999_745_024, 6e-4),
    "200M": (10, 1280, 10, 203_188_480, 19_999_752_192, 3e-4),
    "430M": (13, 1664, 13, 443_068_288, 164_031 * 262_144, 1.5e-4),
    "800M": (16, 2048, 16, 822_151_168, 305_175 * 262_144, 7.5e-5),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_quest_ladder_is_the_published_one(size):
    layers, width, heads, parameters, tokens, rate = PUBLISHED[size]
    shape, training = QUEST.shape(size, 32_000), QUEST.training(size)
    assert (shape.layers, shape.width, shape.heads, shape.head_dim) == (layers, width, heads, 128)
    assert count_parameters(shape).non_embedding == parameters
    assert training.learning_rate == rate
    per_step = training.batch_sequences * shape.context
    assert (100 * QUEST.rungs[size].nominal) // per_step * per_step == tokens


def test_swiglu_width_rounds_up():
    assert swiglu_width(640, 256) == 1792
    assert swiglu_width(768, 256) == 2048  # 8d/3 exactly


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_size_splits_into_even_heads(recipe):
    for size in recipe.rungs:
        shape = recipe.shape(size, 1024)
        assert shape.width % shape.heads == 0
        assert shape.head_dim % 2 == 0  # rotary embedding turns pairs
        assert shape.heads % shape.kv_heads == 0


def test_flops_count_matmuls_and_causal_attention():
    shape = ModelShape(layers=2, width=8, heads=2, kv_heads=1, feed_forward=16, vocab_size=32, context=10)
    linear = 2 * (8 * (8 + 2 * 4) + 8 * 8 + 8 * 32 + 16 * 8)
    attention = sum(2 * 2 * 8 * (position + 1) for position in range(10)) / 10 * 2  # forward: scores and values
    exact = 6 * (linear + 8 * 32) + 3 * attention
    assert training_flops_per_token(shape) == pytest.approx(exact, rel=0.05)  # n(n+1)/2 against n^2/2


def test_unknown_recipe_size_and_version_say_what_exists():
    with pytest.raises(QpipeError, match="did you mean 'quest'"):
        get_recipe("qest")
    with pytest.raises(QpipeError, match="version 7 was asked for, this qpipe ships 1"):
        get_recipe("quest", 7)
    with pytest.raises(QpipeError, match="it has 30M, 50M"):
        QUEST.shape("70M", 32)

"""Names, compositions and bits per weight."""

import json
import math

import pytest

from qpipe.errors import QpipeError
from qpipe.formats import from_canonical, parse_grid, resolve, storage_bits


def test_plain_names_expand_to_the_default_method_and_keep_their_label():
    assert resolve("w4a4").canonical() == resolve("w4a4-quest").canonical()
    assert resolve("w4a4").name == "w4a4"
    assert resolve("w4").canonical() != resolve("w3").canonical()


@pytest.mark.parametrize("name", ["dense", "w4", "w1a1", "w1.58", "w4e2m1", "2:4", "s50", "s50+w4", "2:4+w4a4", "a8"])
def test_canonical_form_is_json_and_rebuilds_the_representation(name: str):
    representation = resolve(name)
    rebuilt = from_canonical(json.loads(json.dumps(representation.canonical())), name=name)
    assert rebuilt == representation


def test_inline_composition_equals_the_preset_it_spells_out():
    side = {"grid": "int4", "scale": "gaussian", "gradient": "trust"}
    inline = resolve({"name": "mine", "weights": side, "activations": side, "rotation": 128})
    assert inline.canonical() == resolve("w4a4-quest").canonical()


def test_spelling_out_a_default_changes_nothing():
    side = {"grid": "int4", "scale": "gaussian", "gradient": "trust"}
    explicit = resolve({"name": "mine", "weights": side | {"group": "row", "share": 1.0}, "rotation": 128})
    assert explicit.canonical() == resolve("w4").canonical()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("w9", ["w9", "8 bits"]),
        ("w0", ["bits"]),
        ("w4a4-qest", ["qest", "did you mean 'quest'"]),
        ("dens", ["did you mean 'dense'"]),
        ("s100", ["sparsity"]),
        ("4:2", ["4:2", "2:4"]),
        ("s50+s60", ["two of its parts", "sparsity"]),
        ("w4e4m3", ["8 bits with its sign"]),
        ({"weights": {}}, ["name"]),
        ({"name": "x", "weights": {"grid": "int4", "scal": "gaussian"}}, ["scal", "did you mean 'scale'"]),
        ({"name": "x", "weights": {"grid": "int4", "gradient": "ste"}}, ["needs `scale`", "gaussian"]),
        ({"name": "x", "weights": {"grid": "int9", "scale": "absmax", "gradient": "ste"}}, ["1 to 8 bits"]),
        ({"name": "x", "weights": {"grid": "in4", "scale": "absmax", "gradient": "ste"}}, ["did you mean 'int4'"]),
        ("2:4+vq2x16", ["save no bits"]),
        ({"name": "x", "rotation": 128}, ["rotation", "alone"]),
        ({"name": "x", "weights": {"scale": "absmax", "mask": {"sparsity": 0.5}}}, ["no `grid`"]),
        ({"name": "x", "weights": {"mask": {"n": 2, "m": 4, "backward": "banded", "band": 0.1}}}, ["sparsity"]),
        ({"name": "x", "weights": {"mask": {"sparsity": float("nan")}}}, ["sparsity"]),
        ({"name": "x/y"}, ["letters"]),
    ],
)
def test_bad_specifications_say_what_would_work(spec: object, words: list[str]):
    with pytest.raises(QpipeError) as caught:
        resolve(spec)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_all_problems_of_a_composition_are_reported_at_once():
    spec = {"name": "x", "weights": {"grid": "int4", "scal": 1, "group": "rows"}, "activatons": {}}
    with pytest.raises(QpipeError) as caught:
        resolve(spec)
    assert len(caught.value.problems) >= 3


def test_a_study_may_add_presets_but_not_redefine_shipped_names():
    mine = {"weights": {"grid": "int4", "scale": "absmax", "gradient": "ste", "group": 32}}
    assert resolve("mine", presets={"mine": mine}).weights.group == 32  # type: ignore[union-attr]
    with pytest.raises(QpipeError, match="did you mean 'mine'"):
        resolve("min", presets={"mine": mine})


@pytest.mark.parametrize(
    ("name", "payload", "total"),
    [
        ("dense", 16, 16),
        ("w4", 4, 4 + 32 / 1024),  # one float32 scale per row of 1024
        ("w1.58", math.log2(3), 1.6 + 32 / 1024),
        ("2:4", 8, 9),  # two position indices of 2 bits per 4 weights
        ("s75", 4, 5),  # bitmap
        ("2:4+w4", 2, 3 + 32 / 1024),
        ("a8", 16, 16),
    ],
)
def test_bits_per_weight_by_hand(name: str, payload: float, total: float):
    storage = storage_bits(resolve(name), 1024, 256)
    assert storage.payload_bits == pytest.approx(payload, rel=1e-12)
    assert storage.total_bits == pytest.approx(total, rel=1e-12)


def test_pairs_pattern_is_charged_half_a_bit_as_published():
    # 2502.05003: 2:4 over pairs with INT4 costs b/2 + 0.5 = 2.5 bits.
    part = {"grid": "int4", "scale": "gaussian", "gradient": "trust", "mask": {"n": 2, "m": 4, "block": 2}}
    storage = storage_bits(resolve({"name": "pairs", "weights": part}), 1024, 1024)
    assert storage.payload_bits + storage.mask_hardware_bits == pytest.approx(2.5)
    assert storage.mask_entropy_bits == pytest.approx(math.log2(6) / 8)


def test_a_group_that_does_not_divide_the_width_is_refused():
    part = {"grid": "int4", "scale": "absmax", "gradient": "ste", "group": 96}
    with pytest.raises(QpipeError, match="640 input features do not divide into groups of 96"):
        storage_bits(resolve({"name": "g", "weights": part}), 640, 640)


def test_slug_is_safe_in_file_names():
    assert [resolve(n).slug for n in ("w4a4-quest", "2:4", "s50+w4")] == ["w4a4-quest", "2-4", "s50+w4"]


def test_grid_words_count_their_codes():
    counts = {w: parse_grid(w).codes for w in ("int4", "int4-narrow", "ternary", "e2m1", "gauss7", "vq2x256")}
    assert counts == {"int4": 16, "int4-narrow": 15, "ternary": 3, "e2m1": 16, "gauss7": 7, "vq2x256": 256}

"""Bit strings of the packed file, against numpy's own packing of single bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpipe.ptq.packed import _bits, _unbits


@given(st.integers(1, 12), st.integers(0, 70), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_numbers_stand_most_significant_bit_first(width: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 2**width, count)
    words = "".join(f"{number:0{width}b}" for number in numbers)
    expected = np.packbits(np.array([int(bit) for bit in words], np.uint8))
    packed = _bits(torch.from_numpy(numbers), width)
    np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(_unbits(packed, width, count).numpy(), numbers)


@pytest.mark.parametrize("width", range(1, 9))
def test_codes_are_taken_as_bytes(width: int) -> None:
    codes = torch.randint(0, 2**width, (1001,), generator=torch.Generator().manual_seed(width)).to(torch.uint8)
    assert torch.equal(_unbits(_bits(codes, width), width, 1001), codes)

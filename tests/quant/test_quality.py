import math

import pytest
import torch

from vramkit.casting import narrowed
from vramkit.errors import ConfigError
from vramkit.quant import sqnr_db


def test_a_tenth_of_noise_is_twenty_decibels():
    exact = torch.full((100,), 2.0)
    assert sqnr_db(exact, exact * 1.1) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(exact * 1e-30, exact * 1.1e-30) == pytest.approx(20, abs=1e-4)


def test_the_same_is_infinite_even_when_zero():
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf
    assert sqnr_db(torch.ones(3), torch.ones(3, dtype=torch.bfloat16)) == math.inf


def test_narrow_tensors_count_as_what_they_compute_as():
    weight = torch.randn(64, 64)
    narrow = narrowed(weight, torch.float8_e4m3fn, torch.float32)
    assert sqnr_db(weight, narrow) == sqnr_db(weight, narrow.dequantize())
    assert 31 < sqnr_db(weight, narrow) < 32


def test_what_has_no_ratio_is_named():
    with pytest.raises(ConfigError, match=r"\[3\] and stored \[4\]"):
        sqnr_db(torch.ones(3), torch.ones(4))
    with pytest.raises(ConfigError, match="only zeros"):
        sqnr_db(torch.zeros(3), torch.ones(3))

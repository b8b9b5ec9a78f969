"""Squared norms of gradients against float64."""

from __future__ import annotations

import pytest
import torch
from stretto import norms


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 0.0])
def test_squared_norms_are_those_of_float64(dtype: torch.dtype, unit: float) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.randn(5, 60_001, generator=generator) * unit).to(dtype)
    expected = float(tensor.double().square().sum())
    assert norms.sqr_norm(tensor) == pytest.approx(expected, rel=1e-6)
    assert norms.sqr_norm(tensor.t()) == pytest.approx(expected, rel=1e-6)


def test_squared_norms_neither_vanish_nor_overflow_in_single_precision() -> None:
    assert norms.sqr_norm(torch.full((10,), 1e-30)) == pytest.approx(1e-59, rel=1e-5)
    assert norms.sqr_norm(torch.full((10,), 1e30)) == pytest.approx(1e61, rel=1e-5)
    assert norms.sqr_norm(torch.full((10,), 60000.0, dtype=torch.float16)) == pytest.approx(3.6e10, rel=1e-3)
    assert norms.sqr_norm(torch.empty(0)) == 0.0


def test_complex_gradients_count_by_their_real_and_imaginary_parts() -> None:
    tensor = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]))
    assert norms.sqr_norm(tensor) == pytest.approx(30.0)
    assert norms.finite_mark(tensor) == 0.0
    assert norms.finite_mark(tensor * float("inf")) != 0.0

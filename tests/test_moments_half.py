"""Second moments of a model in 16 bits: TF32 has its numbers exactly, and is allowed for them alone."""

import pytest
import torch

from space_peft import NullSpaceFitter
from space_peft.null_space import moments
from space_peft.null_space.precision import exact_products


def as_tf32(x):
    """float32 rounded to the 10 bits behind the point that TF32 has."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tf32_has_every_number_of_16_bits_and_their_products_fit_into_float32(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)]
    assert torch.equal(as_tf32(every), every)
    x, y = every[torch.randint(len(every), (2, 10_000), generator=torch.Generator().manual_seed(0))]
    normal = (x * y).abs().double().log2().abs() < 120
    assert torch.equal((x * y).double()[normal], (x.double() * y.double())[normal])
    # Of float32 it has not, so what a model in float32 computes must not be rounded so.
    fine = torch.rand(9, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(as_tf32(fine), fine)


@pytest.mark.parametrize(
    ("dtype", "statistics", "allowed"),
    [
        (torch.bfloat16, "token", "tf32"),
        (torch.float16, "token", "tf32"),
        (torch.float32, "token", "ieee"),
        (torch.bfloat16, "pooled", "ieee"),
    ],
)
def test_it_is_allowed_where_it_is_exact(monkeypatch, dtype, statistics, allowed):
    seen = []

    def watched(device_types, **options):
        seen.append(options)
        return exact_products(device_types, **options)

    monkeypatch.setattr(moments, "exact_products", watched)
    before = torch.backends.cuda.matmul.fp32_precision
    h = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    fitter = NullSpaceFitter(8, statistics=statistics, dtype=torch.float32).update(h)
    assert torch.backends.cuda.matmul.fp32_precision == before
    (options,) = seen
    with exact_products({"cpu"}, **options):
        assert torch.backends.cuda.matmul.fp32_precision == allowed
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    inputs = (h.double() if statistics == "token" else h.double().mean(dim=1)).reshape(-1, 8)
    torch.testing.assert_close(fitter.second_moment().double(), inputs.T @ inputs / len(inputs), rtol=1e-5, atol=1e-6)

"""The dtype to compute in: the checkpoint's on CUDA; on a CPU one that the processor multiplies itself."""

import pytest
import torch

from ppf.model.precision import compute_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALVES = torch.float16, torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, *HALVES])
def test_cuda_computes_in_the_stored_dtype(stored):
    assert compute_dtype(stored, CUDA) is stored


@pytest.mark.parametrize("native", [False, True])
def test_a_cpu_computes_in_bf16_only_natively(monkeypatch, native):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native, raising=False)
    assert compute_dtype(torch.bfloat16, CPU) is (torch.bfloat16 if native else torch.float32)
    assert compute_dtype(torch.float32, CPU) is torch.float32 is compute_dtype(torch.float16, CPU)


def test_what_it_chooses_works_here():
    for stored in HALVES:
        dtype = compute_dtype(stored, CPU)
        assert torch.ones(4, 4, dtype=dtype).matmul(torch.ones(4, 4, dtype=dtype)).sum() == 64

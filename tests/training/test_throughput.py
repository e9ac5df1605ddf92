"""Which data sheet a GPU has, by the names that drivers give."""

from __future__ import annotations

import pytest
import torch

from stablemoe_ds.training.data_sheets import DATA_SHEETS, data_sheet
from stablemoe_ds.training.throughput import peak_flops


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("NVIDIA H100 80GB HBM2e", "H100 PCIE"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H800", "H800 SXM"),
        ("NVIDIA H800 PCIe", "H800 PCIE"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM"),
        ("A100-SXM4-40GB", "A100 SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIE"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIE"),
        ("NVIDIA A800-SXM4-80GB", "A800 SXM"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 ADA"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 TI"),
        ("Tesla V100-SXM2-16GB", "V100 SXM"),
        ("Tesla V100-PCIE-32GB", "V100 PCIE"),
        ("Tesla T4", "T4"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        # Others, though their names hold one that is listed.
        ("NVIDIA A100X", None),
        ("NVIDIA T400", None),
        ("NVIDIA T4G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("GRID A100-4C", None),
        ("NVIDIA A10-4Q", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("", None),
    ],
)
def test_a_sheet_is_found_by_whole_words(name: str, sheet: str | None) -> None:
    assert data_sheet(name) == sheet


def test_tensor_cores_are_worth_more_in_narrow_types() -> None:
    for peak in DATA_SHEETS.values():
        assert peak.fp16 > peak.fp32
        assert peak.bf16 in (None, peak.fp16)
        assert peak.tf32 is None or peak.fp32 <= peak.tf32 <= 0.52 * peak.fp16


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "peak", "source"),
    [
        ("NVIDIA H100 PCIe", "bf16", "highest", 756e12, "the data sheet of H100 PCIE for bf16"),
        ("NVIDIA H100 PCIe", "fp32", "highest", 51e12, "the data sheet of H100 PCIE for fp32"),
        ("NVIDIA H100 PCIe", "fp32", "high", 378e12, "the data sheet of H100 PCIE for tf32"),
        ("Tesla T4", "bf16", "highest", 1.0, "as no data sheet is known of Tesla T4 for bf16"),
        ("NVIDIA Z900", "fp16", "highest", 1.0, "as no data sheet is known of NVIDIA Z900 for fp16"),
    ],
)
def test_the_source_is_said(name, dtype, precision, peak, source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr("stablemoe_ds.training.throughput._measured_flops", lambda _device, _dtype: 1.0)
    found, text = peak_flops(torch.device("cuda", 0), dtype)
    assert found == peak
    assert text.endswith(source)


def test_a_cpu_is_measured() -> None:
    peak, source = peak_flops(torch.device("cpu"), "fp32")
    assert peak > 0
    assert source == "a matrix product measured here"

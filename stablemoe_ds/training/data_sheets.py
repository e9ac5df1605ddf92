"""What GPUs can do at most, from NVIDIA's data sheets: matrix products without sparsity, summed in fp32."""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """TFLOP/s of one GPU by the type of the factors; None where it has no such unit. fp32 is without tensor cores."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float


DATA_SHEETS = {
    "T4": Peak(None, 65, None, 8.1),
    "V100 SXM": Peak(None, 125, None, 15.7),
    "V100 PCIE": Peak(None, 112, None, 14),
    "V100S PCIE": Peak(None, 130, None, 16.4),
    "A10": Peak(125, 125, 62.5, 31.2),
    "A10G": Peak(70, 70, 35, 35),
    "A30": Peak(165, 165, 82, 10.3),
    "A40": Peak(149.7, 149.7, 74.8, 37.4),
    "RTX A6000": Peak(154.8, 154.8, 77.4, 38.7),
    "RTX 3090": Peak(71, 71, 35.6, 35.6),
    "RTX 3090 TI": Peak(80, 80, 40, 40),
    "A100 SXM": Peak(312, 312, 156, 19.5),
    "A100 PCIE": Peak(312, 312, 156, 19.5),
    "A800 SXM": Peak(312, 312, 156, 19.5),
    "A800 PCIE": Peak(312, 312, 156, 19.5),
    "L4": Peak(121, 121, 60, 30.3),
    "L40": Peak(181, 181, 90.5, 90.5),
    "L40S": Peak(362, 362, 183, 91.6),
    "RTX 6000 ADA": Peak(364.2, 364.2, 182.1, 91.1),
    "RTX 4090": Peak(165.2, 165.2, 82.6, 82.6),
    "H20": Peak(148, 148, 74, 44),
    "H100 SXM": Peak(989, 989, 494, 67),
    "H100 PCIE": Peak(756, 756, 378, 51),
    "H100 NVL": Peak(835, 835, 417, 60),
    "H800 SXM": Peak(989, 989, 494, 67),
    "H800 PCIE": Peak(756, 756, 378, 51),
    "GH200": Peak(989, 989, 494, 67),
    "H200 SXM": Peak(989, 989, 494, 67),
    "H200 NVL": Peak(835, 835, 417, 60),
    "RTX 5090": Peak(209.5, 209.5, 104.8, 104.8),
    "B100": Peak(1750, 1750, 875, 60),
    "B200": Peak(2250, 2250, 1125, 75),
    "GB200": Peak(2500, 2500, 1250, 80),
}
"""By model and, where a model comes in several builds, by build."""

SXM_WITHOUT_A_WORD = ("H100", "H200", "H800")
"""Models whose driver names the PCIe and NVL builds, and the SXM build by nothing: "NVIDIA H100 80GB HBM3"."""
_SAYS_NOTHING = re.compile(r"NVIDIA|TESLA|GEFORCE|GENERATION|HBM3E?|\d+GB?")


def data_sheet(device_name: str) -> str | None:
    """The entry of ``DATA_SHEETS`` for a GPU by the name its driver gives it; None if there is none.

    Every word of the name must be accounted for: an RTX 4090 in a laptop, a slice of a GPU (MIG, vGPU), or a build that
    is not listed is another device than its namesake.
    """
    words = re.findall(r"[A-Z0-9.]+", device_name.upper())
    words = ["SXM" if re.fullmatch(r"SXM\d?", word) else word for word in words if not _SAYS_NOTHING.fullmatch(word)]
    if words == ["H100", "HBM2E"]:  # how early drivers name the PCIe build
        words = ["H100", "PCIE"]
    if len(words) == 1 and words[0] in SXM_WITHOUT_A_WORD:
        words.append("SXM")
    name = " ".join(words)
    return name if name in DATA_SHEETS else None

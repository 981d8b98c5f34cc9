"""Data sheets of GPUs: memory and peak speed."""

from dataclasses import dataclass
from typing import Literal

HardwareName = Literal["h200", "h100", "a100", "rtx4090", "rtx3090"]
# Words in the names of slower or faster variants without a data sheet here.
OTHER_VARIANTS = {"MIG", "Laptop", "D", "Ti"}


@dataclass(frozen=True)
class Hardware:
    """A GPU, or one process's cores of a CPU.

    Args:
        memory: bytes; on a CPU the memory of the machine, shared by its processes.
        peaks: FLOP/s of dense matrix products, by dtype name, such as "bfloat16".
    """

    name: str
    kind: Literal["gpu", "cpu"]
    memory: int
    peaks: dict[str, float]


def _gpu(name: str, gigabytes: int, bfloat16: float, float32: float) -> Hardware:
    """A data sheet. Peaks are in TFLOP/s, without sparsity; fp32 without TF32."""
    return Hardware(name, "gpu", gigabytes * 10**9, {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12})


HARDWARE: dict[HardwareName, Hardware] = {
    "h200": _gpu("H200", 141, 989, 67),
    "h100": _gpu("H100 SXM", 80, 989, 67),
    "a100": _gpu("A100 SXM 80 GB", 80, 312, 19.5),
    "rtx4090": _gpu("RTX 4090", 24, 165, 82.6),
    "rtx3090": _gpu("RTX 3090", 24, 71, 35.6),
}
# By the words in the name reported by CUDA, such as "NVIDIA H100 80GB HBM3": the more specific first.
DATA_SHEETS: dict[tuple[str, ...], Hardware] = {
    ("H200", "NVL"): _gpu("H200 NVL", 141, 835, 60),
    ("H100", "NVL"): _gpu("H100 NVL", 94, 835, 60),
    ("H100", "PCIe"): _gpu("H100 PCIe", 80, 756, 51),
    ("H200",): HARDWARE["h200"],
    ("H100",): HARDWARE["h100"],
    ("A100",): HARDWARE["a100"],
    ("4090",): HARDWARE["rtx4090"],
    ("3090",): HARDWARE["rtx3090"],
}


@dataclass(frozen=True)
class PeakShare:
    """The share of the peak speed that the matrix products of a step reach.

    Args:
        source: where it was measured; None for an assumption.
    """

    value: float
    source: str | None = None


# By the name or kind of hardware, and by what is trained: full weights, or adapters of one kind.
PEAK_SHARES: dict[tuple[str, str], PeakShare] = {
    ("cpu", "full"): PeakShare(0.50, "docs/performance.md"),
    ("cpu", "lora"): PeakShare(0.50),
    ("cpu", "qlora"): PeakShare(0.50),
    ("H200", "full"): PeakShare(0.45, "benchmarks/results/gpu-h200-2026-11-26.md"),
    ("H200", "qlora"): PeakShare(0.41, "benchmarks/results/gpu-h200-2026-11-26.md"),
    ("gpu", "full"): PeakShare(0.40),
    ("gpu", "lora"): PeakShare(0.40),
    ("gpu", "qlora"): PeakShare(0.32),
}


def data_sheet(name: str) -> Hardware | None:
    """The data sheet of a GPU by its CUDA name, such as "NVIDIA H200"; None if unknown."""
    if OTHER_VARIANTS & set(name.split()):
        return None
    return next((sheet for words, sheet in DATA_SHEETS.items() if all(word in name for word in words)), None)


def peak_flops(name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a GPU by its CUDA name; None if unknown."""
    sheet = data_sheet(name)
    return None if sheet is None else sheet.peaks["bfloat16"]

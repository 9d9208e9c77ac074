"""What the makers of GPUs state about them: arithmetic, memory and bandwidth, for bounds and shares of a peak."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GPUS", "Gpu", "gpu_of_driver"]


class Gpu(NamedTuple):
    """Numbers of data sheets, without sparsity.

    Attributes:
        bf16: operations per second of bfloat16 products with float32 sums.
        tf32: of float32 products with TF32 inputs.
        fp32: of float32 outside of the tensor cores.
        bandwidth: of the memory, in bytes per second.
        memory: in bytes.
        link: between the GPUs of a machine, bytes per second in one direction: NVLink, else PCI Express.
        drivers: names by which the driver calls it. A slice of a GPU has another name.
    """

    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: float
    link: float
    drivers: tuple[str, ...]

    def peak(self, precision: str) -> float:
        """Operations per second of products in a precision: bf16, tf32 or fp32."""
        return {"bf16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[precision]


# NVIDIA's data sheets and architecture papers of each GPU. Where they count sparsity, half the number; of links, whose
# directions they add up, too. NVLink bridges join two GPUs alone, and do not count.
GPUS: dict[str, Gpu] = {
    "a100": Gpu(312e12, 156e12, 19.5e12, 2.039e12, 80e9, 300e9, ("NVIDIA A100-SXM4-80GB",)),
    "a100-40gb": Gpu(
        312e12, 156e12, 19.5e12, 1.555e12, 40e9, 300e9, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")
    ),
    "a100-pcie": Gpu(312e12, 156e12, 19.5e12, 1.935e12, 80e9, 32e9, ("NVIDIA A100 80GB PCIe",)),
    "a10": Gpu(125e12, 62.5e12, 31.2e12, 600e9, 24e9, 32e9, ("NVIDIA A10",)),
    "l4": Gpu(121e12, 60e12, 30.3e12, 300e9, 24e9, 32e9, ("NVIDIA L4",)),
    "l40s": Gpu(362e12, 183e12, 91.6e12, 864e9, 48e9, 32e9, ("NVIDIA L40S",)),
    "h100": Gpu(989.4e12, 494.7e12, 66.9e12, 3.35e12, 80e9, 450e9, ("NVIDIA H100 80GB HBM3",)),
    "h100-pcie": Gpu(756e12, 378e12, 51e12, 2e12, 80e9, 64e9, ("NVIDIA H100 PCIe",)),
    "h100-nvl": Gpu(835e12, 417.5e12, 60e12, 3.9e12, 94e9, 64e9, ("NVIDIA H100 NVL",)),
    "h200": Gpu(989.4e12, 494.7e12, 66.9e12, 4.8e12, 141e9, 450e9, ("NVIDIA H200",)),
    "b200": Gpu(2250e12, 1125e12, 75e12, 8e12, 180e9, 900e9, ("NVIDIA B200",)),
    "rtx4090": Gpu(165.2e12, 82.6e12, 82.6e12, 1.008e12, 24e9, 32e9, ("NVIDIA GeForce RTX 4090",)),
}


def gpu_of_driver(name: str) -> Gpu | None:
    """The GPU that the driver calls by a name; None where it is not in the table."""
    return next((gpu for gpu in GPUS.values() if name in gpu.drivers), None)

"""A whole pretraining on many GPUs, from sizes and data sheets alone: time, exchange, loading, checkpoints.

docs/scaling.md has the formulas and what they give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denim.nim.autoencoder import AutoencoderConfig
from denim.nim.gpus import Gpu
from denim.nim.plan import FP32, Strategy, exchange_bytes, fitting_micro_batch, least_seconds, make_plan

__all__ = ["Cluster", "scaling_table"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the time of a training depends on beside its GPUs.

    Attributes:
        network: bytes per second, in one direction, between one machine and all others.
        machine: GPUs of a machine.
        share: share of the bound of the arithmetic that is reached, 0 < share <= 1.
        image_bytes: of an encoded image, in the mean.
        decoded: images that a core decodes and crops in a second.
        disk: bytes per second at which a checkpoint is written.
    """

    network: float = 400e9
    machine: int = 8
    share: float = 1.0
    image_bytes: float = 115e3
    decoded: float = 380.0
    disk: float = 1e9

    def __post_init__(self) -> None:
        for name in ("network", "machine", "share", "image_bytes", "decoded", "disk"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.share > 1:
            raise ValueError(f"share is at most 1, the bound itself, got {self.share}")


def scaling_table(
    architecture: AutoencoderConfig,
    gpu: Gpu,
    memory: float,
    cluster: Cluster,
    *,
    images: int,
    epochs: float,
    batch_size: int,
    devices: tuple[int, ...],
    precision: str = "bf16",
    mask_ratio: float = 0.75,
) -> list[dict[str, Any]]:
    """What a pretraining takes on some numbers of GPUs. Gradients are exchanged while they are computed.

    Args:
        architecture: of the model.
        gpu: numbers of its data sheet.
        memory: bytes of one device.
        cluster: network, disk, and what the images take.
        images: of an epoch.
        epochs: passes over the images.
        batch_size: images of an update, on all devices together.
        devices: numbers of devices.
        precision: bf16, tf32 or fp32.
        mask_ratio: share of hidden patches, for mae and dmae.

    Returns:
        For each number of devices: "devices"; "micro_batch" and "passes" of an update on a device, the fewest that fit;
        "updates" of the run; "compute" (seconds of an update at the share of the bound), "ddp" and "fsdp" (seconds of
        its exchange) and "ddp_bytes" and "fsdp_bytes" (that a device sends); "hours" of the run with DDP; "gpu_hours";
        "images", "bytes" and "cores" (of one machine: images and bytes per second, and cores that decode them);
        "checkpoint" (bytes) and "checkpoint_seconds".

    Raises:
        ValueError: fewer images than a batch, epochs that are not positive, a batch that cannot be cut so, or a model
            that does not fit on a device without FSDP.
    """
    if images < batch_size:
        raise ValueError(f"an epoch has {images} images, fewer than a batch of {batch_size}")
    if not epochs > 0:
        raise ValueError(f"epochs must be positive, got {epochs}")
    updates = int(epochs * (images // batch_size))
    rows = []
    for count in devices:
        if count < 1 or batch_size % count:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the {count} devices that share it")
        strategy, sharded = (Strategy(precision=precision, devices=count, fsdp=fsdp) for fsdp in (False, True))
        share = batch_size // count
        micro_batch = fitting_micro_batch(architecture, share, memory, strategy, mask_ratio=mask_ratio)
        passes = share // micro_batch
        plan = make_plan(architecture, micro_batch, strategy, passes=passes, mask_ratio=mask_ratio)
        least = least_seconds(architecture, micro_batch, strategy, gpu, passes=passes, mask_ratio=mask_ratio)
        compute = least / cluster.share
        sent = {
            name: exchange_bytes(architecture, each, passes=passes, mask_ratio=mask_ratio)
            for name, each in (("ddp", strategy), ("fsdp", sharded))
        }
        link = gpu.link if count <= cluster.machine else min(gpu.link, cluster.network)
        update = max(compute, sent["ddp"] / link)
        rate = batch_size / update * min(count, cluster.machine) / count
        checkpoint = FP32 * plan.parameters + 2 * FP32 * plan.trainable
        hours = updates * update / 3600
        rows.append(
            {
                "devices": count,
                "micro_batch": micro_batch,
                "passes": passes,
                "updates": updates,
                "compute": compute,
                "ddp": sent["ddp"] / link,
                "fsdp": sent["fsdp"] / link,
                "ddp_bytes": sent["ddp"],
                "fsdp_bytes": sent["fsdp"],
                "hours": hours,
                "gpu_hours": hours * count,
                "images": rate,
                "bytes": rate * cluster.image_bytes,
                "cores": rate / cluster.decoded,
                "checkpoint": checkpoint,
                "checkpoint_seconds": checkpoint / cluster.disk,
            }
        )
    return rows

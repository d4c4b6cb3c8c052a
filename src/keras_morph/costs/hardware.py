"""Hardware by two numbers of its data sheet, for the roofline of `Latency`."""

from dataclasses import dataclass

import numpy as np

from keras_morph.errors import KerasMorphError

__all__ = ["HARDWARE", "Hardware", "hardware_named"]

BYTES = {"float64": 8, "float32": 4, "tensorfloat32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Hardware:
    """A device as a roofline sees it.

    Attributes:
        name: what it is called.
        peak_flops: floating point operations per second at that precision, dense.
        bandwidth: bytes per second of its main memory.
        precision: number format of weights and activations.
        source: where the numbers come from.

    Example:
        >>> board = km.Hardware("my board", peak_flops=2e12, bandwidth=25e9, precision="int8", source="data sheet")
        >>> km.Latency(board)
        Latency('my board')
    """

    name: str
    peak_flops: float
    bandwidth: float
    precision: str = "float32"
    source: str = "given by the user"

    def __post_init__(self) -> None:
        for field in ("peak_flops", "bandwidth"):
            value = getattr(self, field)
            if not (np.isfinite(value) and value > 0):
                raise KerasMorphError(f"Hardware {self.name!r} expects a positive {field}. Received: {field}={value}.")
        if self.precision not in BYTES:
            raise KerasMorphError(
                f"Hardware {self.name!r} expects a precision of {', '.join(BYTES)}. Received: {self.precision!r}."
            )

    @property
    def bytes_per_element(self) -> int:
        """Bytes of one weight or activation."""
        return BYTES[self.precision]


HARDWARE = {
    device.name: device
    for device in (
        Hardware("V100", 125e12, 900e9, "float16", "NVIDIA V100 data sheet, SXM2, tensor cores"),
        Hardware("P100", 9.3e12, 732e9, "float32", "NVIDIA P100 data sheet, PCIe 16 GB"),
        Hardware("K80", 8.73e12, 480e9, "float32", "NVIDIA K80 data sheet, both GPUs, boost clock"),
        Hardware("P4", 5.5e12, 192e9, "float32", "NVIDIA P4 data sheet"),
        Hardware("T4", 65e12, 320e9, "float16", "NVIDIA T4 data sheet, tensor cores"),
        Hardware("A100", 312e12, 1555e9, "float16", "NVIDIA A100 data sheet, 40 GB, tensor cores, dense"),
        Hardware("H100", 989e12, 3350e9, "float16", "NVIDIA H100 data sheet, SXM5, tensor cores, dense"),
        Hardware("L4", 121e12, 300e9, "float16", "NVIDIA L4 data sheet, tensor cores, dense"),
        Hardware(
            "JetsonOrin", 42.5e12, 204.8e9, "float16", "Jetson AGX Orin 64 GB: 170 sparse INT8 TOPS of its GPU / 4"
        ),
        Hardware("TPUv4", 275e12, 1228e9, "bfloat16", "Google Cloud TPU v4 documentation, per chip"),
        Hardware("TPUv5e", 197e12, 819e9, "bfloat16", "Google Cloud TPU v5e documentation, per chip"),
        Hardware("Xeon8380", 5.9e12, 204.8e9, "float32", "40 cores x 2.3 GHz x 64 FLOPs per cycle; 8 x DDR4-3200"),
        Hardware("RaspberryPi4", 48e9, 12.8e9, "float32", "4 Cortex-A72 x 1.5 GHz x 8 FLOPs per cycle; LPDDR4-3200"),
    )
}


def hardware_named(name: str | Hardware) -> Hardware:
    """A device by its name; a Hardware is handed back.

    Raises:
        KerasMorphError: if the name is unknown.
    """
    if isinstance(name, Hardware):
        return name
    if name not in HARDWARE:
        raise KerasMorphError(
            f"Unknown hardware {name!r}. Expected one of {', '.join(HARDWARE)}, or "
            "Hardware(name, peak_flops, bandwidth) with the numbers of its data sheet."
        )
    return HARDWARE[name]

"""Every device has the figures of its data sheet, and those follow from what is built into it."""

import numpy as np
import pytest

import keras_morph as km

pytestmark = pytest.mark.once

# Units x operations per unit and cycle x cycles per second, and memory bits x bits per second and pin, as the makers
# publish them. An operation is half a multiply-add; a tensor core of V100 and T4 makes 64 multiply-adds per cycle.
BUILT = {
    "V100": (640 * 2 * 64 * 1.53e9, 4096 * 1.752e9 / 8),
    "P100": (3584 * 2 * 1.303e9, 4096 * 1.43e9 / 8),
    "K80": (2 * 2496 * 2 * 0.875e9, 2 * 384 * 5e9 / 8),
    "P4": (2560 * 2 * 1.063e9, 256 * 6e9 / 8),
    "T4": (320 * 2 * 64 * 1.59e9, 256 * 10e9 / 8),
    "A100": (432 * 2 * 256 * 1.41e9, 5120 * 2.43e9 / 8),
    "H100": (528 * 2 * 512 * 1.83e9, 5120 * 5.23e9 / 8),
    "L4": (232 * 2 * 128 * 2.04e9, 192 * 12.5e9 / 8),
    "JetsonOrin": (64 * 2 * 256 * 1.3e9, 256 * 6.4e9 / 8),
    "TPUv4": (8 * 2 * 128**2 * 1.05e9, 4 * 1024 * 2.4e9 / 8),
    "TPUv5e": (4 * 2 * 128**2 * 1.5e9, 2 * 1024 * 3.2e9 / 8),
    "Xeon8380": (40 * 64 * 2.3e9, 8 * 64 * 3.2e9 / 8),
    "RaspberryPi4": (4 * 8 * 1.5e9, 32 * 3.2e9 / 8),
}
TENSOR_CORES = {"V100", "T4", "A100", "H100", "L4", "JetsonOrin"}


def test_every_device_is_checked_here():
    assert BUILT.keys() == km.HARDWARE.keys()


@pytest.mark.parametrize("name", BUILT)
def test_peak_and_bandwidth_are_what_is_built_into_the_device(name):
    device = km.HARDWARE[name]
    np.testing.assert_allclose((device.peak_flops, device.bandwidth), BUILT[name], rtol=0.02)
    expected = "float16" if name in TENSOR_CORES else "bfloat16" if name.startswith("TPU") else "float32"
    assert device.precision == expected
    assert device.name == name


@pytest.mark.parametrize("name", BUILT)
def test_every_device_says_where_its_figures_come_from(name):
    source = km.HARDWARE[name].source
    assert source != km.Hardware("mine", 1, 1).source
    assert any(word in source for word in ("data sheet", "documentation", " x ", "TOPS"))


def test_the_devices_of_the_model_zoo_have_its_figures():
    v100, p100 = km.HARDWARE["V100"], km.HARDWARE["P100"]
    assert (v100.peak_flops, v100.bandwidth, v100.bytes_per_element) == (125e12, 900e9, 2)
    assert (p100.peak_flops, p100.bandwidth, p100.bytes_per_element) == (9.3e12, 732e9, 4)


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1), ("float64", 8)])
def test_bytes_of_a_precision(precision, size):
    assert km.Hardware("mine", 1e12, 1e9, precision).bytes_per_element == size


def test_a_device_of_ones_own_is_a_device():
    mine = km.Hardware("mine", peak_flops=2e12, bandwidth=5e10)
    assert km.Latency(mine).hardware is mine
    assert km.Latency("T4").hardware is km.HARDWARE["T4"]
    assert repr(km.Latency(mine)) == "Latency('mine')"
    assert repr(km.Latency(mine, batch_size=8)) == "Latency('mine', batch_size=8)"

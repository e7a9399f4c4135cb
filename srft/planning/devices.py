"""What a device can hold and how fast it is: the published figures of GPUs, and this machine's own."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# Shares of the published rates that products and traffic reach: of one H100, 708 of 989 TFLOP/s in bf16 products that
# keep it hot, and about 3 of 3.35 TB/s.
PRODUCT_SHARE = 0.72
TRAFFIC_SHARE = 0.88
# Bytes a second between a GPU and its host, by PCIe 4 or 5.
HOST_LINK = 25e9
GPUS_A_NODE = 8
_MEASURED_S = 0.05


@dataclass(frozen=True)
class Device:
    """One device of a plan.

    Args:
        name: As it is asked for.
        memory: Bytes.
        flops: Peak of bf16 products without sparsity, FLOP/s; of fp32 products for a CPU.
        traffic: Bytes a second from its memory.
        link: Bytes a second to another device of its node, one way.
        network: Bytes a second to a device of another node, one way.
        host: Bytes of its node's own memory that are for it.
        is_gpu: Whether it is one.
    """

    name: str
    memory: int
    flops: float
    traffic: float
    link: float
    network: float
    host: int = 0
    is_gpu: bool = True

    @property
    def products(self) -> float:
        """FLOP/s that products reach."""
        return self.flops * (PRODUCT_SHARE if self.is_gpu else 1.0)


def _gpu(name: str, gib: float, tflops: float, tbs: float, link: float, network: float, host_gib: float) -> Device:
    rates = tflops * 1e12, tbs * 1e12, link * 1e9, network * 1e9
    return Device(name, int(gib * 2**30), *rates, int(host_gib * 2**30))


# Memory in GiB as the driver shows it, bf16 TFLOP/s, TB/s; GB/s one way by NVLink or PCIe, and by the usual network; an
# eighth of the memory of the usual node, in GiB
_GPUS = [
    _gpu("B200", 179, 2250, 8.0, 900, 50, 250),
    _gpu("H200", 139, 989, 4.8, 450, 50, 250),
    _gpu("H100", 79, 989, 3.35, 450, 50, 250),
    _gpu("H20", 95, 148, 4.0, 450, 50, 250),
    _gpu("A100-80", 79, 312, 2.0, 300, 25, 125),
    _gpu("A100-40", 39, 312, 1.55, 300, 25, 125),
    _gpu("L40S", 44, 362, 0.86, 25, 12, 125),
    _gpu("RTX-4090", 23.5, 165, 1.0, 25, 12, 60),
]


def find_device(name: str, memory_gib: float | None = None) -> Device:
    """Return a device of the table, or this machine's CPU.

    Args:
        name: Such as "H100"; "cpu" is this machine, whose products are measured for a moment.
        memory_gib: Memory to plan with instead of the device's own, GiB, > 0.

    Raises:
        ValueError: For an unknown name or no memory.
    """
    if memory_gib is not None and memory_gib <= 0:
        raise ValueError(f"--gpu-memory must be above 0 GiB, got {memory_gib}")
    if name.lower() == "cpu":
        device = this_cpu()
    else:
        found = [device for device in _GPUS if device.name.lower() == name.lower()]
        if not found:
            names = ", ".join(device.name for device in _GPUS)
            raise ValueError(f"--gpu must be one of {names} or cpu, got {name!r}; take the nearest, and --gpu-memory")
        device = found[0]
    return device if memory_gib is None else replace(device, memory=int(memory_gib * 2**30))


def known_gpu(product: str) -> Device | None:
    """Return the device of the table that a driver's name means; None for one that is not in it.

    Args:
        product: Such as "NVIDIA H100 80GB HBM3".
    """
    words = product.upper().replace("-", " ").split()
    for device in _GPUS:
        family = device.name.upper().replace("-", " ").split()
        if all(any(part in word for word in words) for part in family):
            return device
    return None


def this_device(device: torch.device) -> Device:
    """Return the device that a run computes on, with the memory that it has.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError: For a GPU that is not in the table.
    """
    if device.type != "cuda":
        return this_cpu()
    properties = torch.cuda.get_device_properties(device)
    found = known_gpu(properties.name)
    if found is None:
        raise ValueError(
            f"the rates of {properties.name!r} are not known; plan with python -m srft.plan --gpu NAME --gpu-memory GIB"
        )
    return replace(found, memory=properties.total_memory)


def this_cpu(rate: float | None = None) -> Device:
    """Return this machine's CPU, with the memory that is free now.

    Args:
        rate: Of its products, FLOP/s; None measures those in fp32.
    """
    rate = rate or product_rate(torch.device("cpu"), torch.float32)
    # cores read about 10 GB/s each
    traffic = 10e9 * torch.get_num_threads()
    return Device("cpu", free_memory(), rate, traffic, 5e9, 1e9, is_gpu=False)


def free_memory() -> int:
    """Return the bytes that this machine's processes can still take."""
    try:
        with open("/proc/meminfo") as lines:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return found["MemAvailable"]
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of square products, FLOP/s, once in a process for each number of threads.

    Args:
        device: Where.
        dtype: Of both factors.
    """
    return _product_rate(device, dtype, torch.get_num_threads())


@lru_cache
def _product_rate(device: torch.device, dtype: torch.dtype, _threads: int) -> float:
    size = 512
    x = torch.ones(size, size, dtype=dtype, device=device)
    x @ x
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < _MEASURED_S:
        x @ x
        count += 1
    return 2 * size**3 * count / spent

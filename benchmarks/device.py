"""The facts that a figure means nothing without: device, versions, commit; and the clock of a device."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.peers import versions


def _git(*arguments: str) -> str:
    """What git says, or nothing where there is no git or no repository."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def _cpu_name() -> str:
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def facts(device: torch.device) -> dict:
    """Date, device, versions and commit of a run, as JSON."""
    found: dict[str, object] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}",
            "memory_bytes": properties.total_memory,
        }
    else:
        found |= {
            "name": _cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    return {
        "date": datetime.date.today().isoformat(),
        "device": found,
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "uncommitted_kernels": bool(_git("status", "--porcelain", "--", "../srft_kernels")),
    }


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, on a GPU the mean of ``repeats`` calls that follow one another, by its own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def load_average() -> float:
    """Of the last minute, one decimal."""
    return round(os.getloadavg()[0], 1)

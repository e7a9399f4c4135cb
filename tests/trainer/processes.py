"""A look at the processes that a run starts and leaves."""

from __future__ import annotations

from pathlib import Path


def state_and_parent(pid: int) -> tuple[str, int] | None:
    """Of a process that is alive; a zombie is not."""
    try:
        # the name may hold spaces; after it: state, parent
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else (state, int(parent))


def descendants(root: int) -> set[int]:
    """Live processes that a process started, and those that these did."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {pid: found[1] for pid in pids if (found := state_and_parent(pid))}
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {root}


def marked_processes(mark: str) -> set[int]:
    """Live processes with the mark in their environment, however they were started."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes() and state_and_parent(int(process.name)):
                found.add(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal itself by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)

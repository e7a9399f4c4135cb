"""The first 25 minutes on a GPU, most wanted first: python -m benchmarks.gpu_sweep --part 1, then 2, 3 and 4.

Every step is a process of its own with a limit of time. What it has found is on disk at once, in --out: STEP.json,
STEP.log with all that it printed, and a line in steps.jsonl. One that fails or hangs stops no other, and one that has
ended is not run again unless --again says so. This file imports no torch: it runs where torch does not.

--dry-run runs every step on a CPU, tiny and with Triton's interpreter, and two more that are made to fail and to hang.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_plan import Step, steps

ROOT = Path(__file__).parents[1]
# a part fits a command of ten minutes
PART_MINUTES = 9.5
# a step that would have less than this is not started
SHORTEST_S = 10
# of a log, what the screen shows of a failure
TAIL_LINES = 30
# a step with one of these is not run again
ENDED = ("ok", "failed", "timeout")
# the steps of a dry run that must not be ok
MADE_TO = {"x-fail": "failed", "x-hang": "timeout"}


def _command(step: Step, out: Path, without_ours: bool) -> list[str]:
    command = list(step.command)
    place = command.index("python") if "python" in command else None
    if place is None:
        command = [sys.executable, "-m", *command]
    else:
        command[place : place + 1] = [sys.executable, "-m"]
    if step.reads != "pytest":
        command.append(f"--out={out}")
    return command + ["--without-ours"] * (without_ours and "peer" in step.command)


def _end(process: subprocess.Popen) -> str:
    """Kill the process and all that it started; "" or what could not be done."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        return ", and could not be killed: the device may hang"
    return ""


def run(step: Step, limit_s: float, folder: Path, environment: dict[str, str], without_ours: bool) -> dict[str, Any]:
    """Run a step; its line for steps.jsonl. Nothing that it does raises here."""
    out, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
    out.unlink(missing_ok=True)
    command = _command(step, out, without_ours)
    line = {"step": step.name, "what": step.what, "command": command, "limit_s": round(limit_s), "log": log.name}
    began = time.monotonic()
    status, why = "ok", ""
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            status, why = "failed", f"not started: {error}"
            file.write(why)
        else:
            try:
                if code := process.wait(limit_s):
                    status, why = "failed", f"exit status {code}"  # negative: killed by that signal
            except subprocess.TimeoutExpired:
                status, why = "timeout", f"stopped after {limit_s:.0f} s{_end(process)}"
            except BaseException:
                _end(process)
                raise
    text = log.read_text(errors="replace")
    try:
        result = json.loads(out.read_text()) if out.exists() else None
        headline = HEADLINES[step.reads](result, text)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        result, headline = None, f"the result could not be read: {type(error).__name__}: {error}"
        status = "failed" if status == "ok" else status
    if status == "ok" and not headline:
        status, why = "failed", "ended without a result"
    return line | {
        "status": status, "why": f"{why}, {_last_line(text)}" if status == "failed" else why, "headline": headline,
        "seconds": round(time.monotonic() - began, 1), "result": result,
    }  # fmt: skip


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


def _of_json(result: dict | None, text: str) -> str:
    """What a result says in a line: its own headline, or its tables'."""
    if result is None:
        return ""
    if result.get("headline"):
        return result["headline"]
    if rates := [row for row in result.get("gemm", []) if "tflops" in row]:
        best = max(rates, key=lambda row: row["tflops"])
        missing = len(result["gemm"]) - len(rates)
        text = f"best {best['tflops']:.3g} TFLOP/s: {best['product']}, {best['rows']} rows, {best['output']}"
        return text + (f"; {missing} of {len(result['gemm'])} not there" if missing else "")
    return "; ".join(filter(None, map(_of_table, result.get("tables", []))))


def _of_table(table: dict) -> str:
    if "skipped" in table:
        return f"{table['head']} N={table['tokens']}: left out, {table['skipped']}"
    parts = []
    for row in table.get("rows", []):
        if row["status"] != "ok":
            parts.append(f"{row['name']} {row['status']}: {row['reason'][:100]}")
        elif "median_s" in row:
            hot = f", hot {row['hot_ratio']:.2f}" if "hot_ratio" in row else ""
            parts.append(f"{row['name']} {1000 * row['median_s']:.3g} ms ({row['ratio']:.2f}{hot})")
        elif "peak_bytes" in row:
            parts.append(f"{row['name']} {row['beyond_gradients_bytes'] / 1e9:.2f} GB beyond gradients")
    return f"N={table['tokens']}: " + ", ".join(parts) if parts else ""


def _of_pytest(result: None, text: str) -> str:
    """The closing line, or how many ran before the end, and the names of what failed."""
    closing = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error).*?)\s*=*$", text, re.MULTILINE)
    ran = {word: len(re.findall(rf"\b{word}\b +(?:tests/|\[)", text)) for word in ("PASSED", "FAILED", "ERROR")}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)|^\[gw\d+\].* FAILED (\S+)", text, re.MULTILINE)
    names = dict.fromkeys((first or second).rpartition("::")[2] for first, second in failed)
    if closing:
        return "; ".join([closing[-1], *names])
    said = ", ".join(f"{count} {word.lower()}" for word, count in ran.items() if count)
    return "; ".join([f"{said} before the end", *names]) if said else ""


def _of_tool(result: dict | None, text: str) -> str:
    """The closing line of a sanitizer, or a profiler's counters that are looked at first."""
    closing = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", text, re.MULTILINE)
    wanted = "Duration|DRAM Throughput|Registers Per Thread|Achieved Occupancy"
    counters = re.findall(rf"^\s+((?:{wanted}) .*)$", text, re.MULTILINE)
    found = closing[-1:] + [re.sub(r"\s{2,}", " ", counter.strip()) for counter in counters[:4]]
    return "; ".join(found)


HEADLINES = {"json": _of_json, "pytest": _of_pytest, "tool": _of_tool}


class Record:
    """What has been done, in a folder: steps.jsonl, summary.md, and an archive of all of it if one is wanted."""

    def __init__(self, folder: Path, archive: Path | None):
        self.folder, self.archive = folder, archive
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "steps.jsonl"
        self.lines: dict[str, dict] = {}
        if not self._path.exists():
            return
        text = self._path.read_text()
        if text and not text.endswith("\n"):
            # the machine went away while a line was written
            self._path.write_text(text + "\n")
        for written in text.splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(written)
                self.lines[line["step"]] = line

    def add(self, line: dict) -> None:
        """Put the line of a step on disk."""
        self.lines[line["step"]] = line
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        (self.folder / "summary.md").write_text(self.table())
        if self.archive:
            part = self.archive.with_suffix(".part")
            with tarfile.open(part, "w:gz") as tar:
                tar.add(self.folder, arcname="sweep")
            part.replace(self.archive)

    def table(self) -> str:
        """The last line of every step."""
        rows = ["| step | what | status | s | result |", "|---|---|---|---|---|"]
        for line in self.lines.values():
            said = "; ".join(filter(None, [line["why"], line["headline"]])).replace("|", "/")[:400]
            cells = [line["step"], line["what"], line["status"], f"{line['seconds']:.0f}", said]
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows) + "\n"


def _say(text: str) -> None:
    print(text, flush=True)


def _report(line: dict, folder: Path) -> None:
    """What a step has found, and of one that failed the end of its log."""
    _say(f"{line['step']}: {line['status']} after {line['seconds']:.0f} s. {line['why']} {line['headline']}".rstrip())
    if line["status"] in ("failed", "timeout"):
        text = (folder / line["log"]).read_text(errors="replace")
        for shown in text.strip().splitlines()[-TAIL_LINES:]:
            _say(f"    {shown[:300]}")
        _say(f"    (all of it: {folder / line['log']})")
    if line["step"] == "1a" and line["status"] != "ok":
        _say("#" * 100)
        _say("# 1a FAILED: the kernels of this package do not run here. From here on, products and peers alone.")
        _say("#" * 100)


def sweep(wanted: list[Step], record: Record, minutes: float, again: set[str], environment: dict[str, str]) -> None:
    """Run the steps that fit into the time."""
    began = time.monotonic()
    for step in wanted:
        before = record.lines.get(step.name, {"status": ""})
        if before["status"] in ENDED and not {step.name, "all", before["status"]} & again:
            _say(f"{step.name}: {before['status']} already, not run again (--again {step.name})")
            continue
        broken = record.lines.get("1a", {"status": "ok"})["status"] in ("failed", "timeout")
        left = 60 * minutes - (time.monotonic() - began)
        empty = {"step": step.name, "what": step.what, "log": "", "headline": "", "seconds": 0.0, "result": None}
        if broken and step.needs_ours:
            record.add(empty | {"status": "skipped", "why": f"needs our kernels; 1a: {record.lines['1a']['status']}"})
            _report(record.lines[step.name], record.folder)
        elif left < SHORTEST_S:
            record.add(empty | {"status": "not started", "why": f"the {minutes:g} minutes are over"})
            _report(record.lines[step.name], record.folder)
        else:
            limit_s = min(step.limit_s, left)
            _say(f"{step.name}: {step.what}, at most {limit_s:.0f} s; {left:.0f} s left of {minutes:g} minutes")
            record.add(run(step, limit_s, record.folder, environment, broken))
            _report(record.lines[step.name], record.folder)


def _stand_in(command: list[str]) -> None:
    """In a dry run the tools of the GPU machine: runs what they would watch, and ends as they do."""
    done = subprocess.run(command)
    print(f"========= ERROR SUMMARY: {int(done.returncode != 0)} errors")
    sys.exit(done.returncode)


def main() -> None:
    """Run the parts asked for, and end with a table."""
    if sys.argv[1:2] == ["--stand-in"]:
        _stand_in(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1,2,3,4", help="of 1, 2, 3, 4, comma-separated; default: all")
    parser.add_argument("--only", default="", help="names of steps, comma-separated; default: all of the parts")
    parser.add_argument("--minutes", type=float, help=f"for all that is run; default: {PART_MINUTES} a part")
    parser.add_argument("--out", type=Path, help="folder; default: runs/gpu-sweep, of a dry run runs/gpu-sweep-dry")
    parser.add_argument("--archive", type=Path, help="a .tgz of the folder, written after every step")
    parser.add_argument("--again", default="", help="steps to run again: names, failed, timeout, all")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, with Triton's interpreter")
    arguments = parser.parse_args()
    parts = {int(part) for part in arguments.part.split(",")}
    only = {*filter(None, arguments.only.split(","))}
    planned = steps(arguments.dry_run)
    if unknown := only - {step.name for step in planned} | {str(x) for x in parts - {1, 2, 3, 4}}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; steps: {', '.join(step.name for step in planned)}")
    wanted = [step for step in planned if step.part in parts and (not only or step.name in only)]
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if arguments.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    folder = ROOT / "runs" / ("gpu-sweep-dry" if arguments.dry_run else "gpu-sweep")
    record = Record(arguments.out or folder, arguments.archive)
    minutes = PART_MINUTES * len(parts) if arguments.minutes is None else arguments.minutes
    sweep(wanted, record, minutes, {*filter(None, arguments.again.split(","))}, environment)
    _say(f"\n{record.table()}\nin {record.folder}")
    statuses = {step.name: record.lines[step.name]["status"] for step in wanted}
    wrong = [name for name, status in statuses.items() if status != MADE_TO.get(name, "ok")]
    if wrong:
        sys.exit(f"not as they should be: {', '.join(f'{name} ({statuses[name]})' for name in wrong)}")


if __name__ == "__main__":
    main()

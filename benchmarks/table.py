"""Results as Markdown: python -m benchmarks.table [FILE.json ...], by default the newest in results/.

python -m benchmarks.table --fill README.md ... puts tables between the lines <!-- results: NAME.json ... --> and
<!-- end of results --> of a page, from the files in results/ that the first line names.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
BLOCK = re.compile(r"(<!-- results: ([^>]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def result_path(found: dict) -> Path:
    """A name by date, device and what was asked for."""
    options = found["command"]
    parts = [found["date"], found["device"]["name"], options["dtype"], options["names"], "N" + options["tokens"]]
    parts += [options["cases"], "" if "time" in options["what"] else options["what"]]
    return RESULTS / (re.sub(r"[^a-z0-9.]+", "-", "-".join(filter(None, parts)).lower()) + ".json")


def write(found: dict, path: Path) -> None:
    """Write a result so that whoever reads it, or ends this process, finds the whole of one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _ratio(row: dict, prefix: str = "") -> str:
    low, high = row[f"{prefix}ratio_range"]
    return f"{row[f'{prefix}ratio']:.2f} ({low:.2f} to {high:.2f})"


def _cells(row: dict, timed: bool, hot: bool, measured: bool, checked: bool) -> list[str]:
    if row["status"] != "ok":
        word = {"skipped": "left out", "wrong": "WRONG, not timed", "failed": "failed"}[row["status"]]
        return [f"{word}: {row['reason']}".replace("|", "/")]
    cells = []
    if timed and "seconds" not in row:
        cells += [""] * (7 if hot else 4)
    elif timed:
        cells += [_time(row["median_s"]), _ratio(row), f"{row['ratio_fastest']:.2f}", f"{row['tflops']:.3g}"]
        cells += [_time(row["hot_median_s"]), _ratio(row, "hot_"), f"{row['hot_tflops']:.3g}"] if hot else []
    if measured:
        cells += [f"{row[key] / 1e9:.2f}" if key in row else "" for key in ("beyond_gradients_bytes", "peak_bytes")]
    if checked:
        found = row.get("errors", {})
        cells += [f"{found[x][0]:.0e}, {found[x][1]:.0e}" if found else "" for x in ("dhidden", "dweight")]
    return cells


def _one(table: dict) -> str:
    """One head at one number of tokens."""
    title = f"`{table['head']}`, N={table['tokens']:,}, D={table['width']:,}, V={table['vocab']:,}, {table['dtype']}"
    if "skipped" in table:
        return f"{title}: left out, {table['skipped']}."
    rows = table["rows"]
    timed, hot = any("seconds" in row for row in rows), any("hot_seconds" in row for row in rows)
    measured, checked = any("peak_bytes" in row for row in rows), any("errors" in row for row in rows)
    lines = [f"{title}; sequences of {table['sequence']} tokens; load average {' / '.join(map(str, table['load']))}"]
    lines[0] += f"; medians of {table['rounds']} interleaved rounds." if timed else "."
    lines[0] = lines[0][:-1] + f"; errors against float64 at N={table['gate_tokens']:,}." if checked else lines[0]
    cold = "cold " if hot else ""
    columns = ["loss", "variant"]
    if timed:
        columns += [f"{cold}time", f"{cold}/ bare products (range)", "fastest / fastest", "TFLOP/s as 6NDV"]
        columns += ["hot time", "hot / bare products (range)", "hot TFLOP/s"] if hot else []
    if measured:
        columns += ["extra GB beyond gradients", "extra GB in all"]
    if checked:
        columns += ["error of dX: RMS, max", "error of dW: RMS, max"]
    columns += ["result"] if len(columns) == 2 else []
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row["case"], row["name"], *_cells(row, timed, hot, measured, checked)]
        lines.append("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")
    return "\n".join(lines)


def _gemm(rows: list[dict]) -> str:
    lines = ["| product | rows | output | time | TFLOP/s |", "|---|---|---|---|---|"]
    for row in rows:
        result = [_time(row["median_s"]), f"{row['tflops']:.0f}"] if "median_s" in row else [row["reason"], ""]
        lines.append("| " + " | ".join([row["product"], str(row["rows"]), row["output"], *result]) + " |")
    return "\n".join(lines)


def render(found: dict) -> str:
    """All tables of one file."""
    device = found["device"]
    threads = f", {device['threads']} threads of {device['cores']} cores" if "threads" in device else ""
    peers = ", ".join(f"{name} {version}" for name, version in device["peers"].items()) or "no peers installed"
    text = f"**{found['date']}, {device['name']} ({device['capability']}){threads}**, torch {device['torch']}; {peers}"
    text += f"; commit {found['commit']}" + (" with uncommitted kernels" if found["uncommitted_kernels"] else "") + "."
    parts = [text]
    if "gemm" in found:
        parts.append(_gemm(found["gemm"]))
    parts += [_one(table) for table in found["tables"] if table]
    parts += [f"- {line}" for line in found.get("notes", [])]
    return "\n\n".join(parts)


def filled(page: str) -> str:
    """``page`` with every block of results rendered from the files it names."""

    def block(match: re.Match) -> str:
        texts = [render(json.loads((RESULTS / name).read_text())) for name in match[2].split()]
        return match[1] + "\n" + "\n\n".join(texts) + "\n\n" + match[3]

    return BLOCK.sub(block, page)


def newest() -> list[Path]:
    """The files of the newest date in results/."""
    files = sorted(RESULTS.glob("*.json"), reverse=True)
    return [path for path in files if path.name[:10] == files[0].name[:10]]


def main() -> None:
    """Print tables, or write them into pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="results; with --fill, pages")
    parser.add_argument("--fill", action="store_true", help="write the tables into the pages given")
    arguments = parser.parse_args()
    if arguments.fill:
        for path in arguments.files or [FOLDER / "README.md"]:
            path.write_text(filled(path.read_text()))
        return
    for path in arguments.files or newest():
        print(render(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()

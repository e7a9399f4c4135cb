"""Time and memory of the variants as bars: python -m benchmarks.plot RESULT.json [--out PICTURE.png]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS, GRADIENTS = "#1b6ca8", "#9aa5b1", "#dde2e7"


def _names(rows: list[dict]) -> list[str]:
    several = len({row["case"] for row in rows}) > 1
    return [f"{row['case']} {row['name']}" if several else row["name"] for row in rows]


def _time(axes, rows: list[dict], key: str) -> None:
    rows = sorted((row for row in rows if key in row), key=lambda row: row[key])
    colours = [OURS if row["name"].startswith("ours") else OTHERS for row in rows]
    axes.barh(_names(rows), [row[key] for row in rows], color=colours)
    for number, row in enumerate(rows):
        axes.text(row[key], number, f" {row[key]:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(("hot " if key.startswith("hot") else "") + "time / bare matrix products")


def _memory(axes, rows: list[dict], gradients: int) -> None:
    rows = sorted((row for row in rows if "peak_bytes" in row), key=lambda row: row["peak_bytes"])
    colours = [OURS if row["name"].startswith("ours") else OTHERS for row in rows]
    axes.barh(_names(rows), gradients / 1e9, color=GRADIENTS)
    beyond = [row["beyond_gradients_bytes"] / 1e9 for row in rows]
    axes.barh(_names(rows), beyond, left=gradients / 1e9, color=colours)
    for number, own in enumerate(beyond):
        axes.text(gradients / 1e9 + own, number, f" {own:.2f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("extra peak GB: the two gradients (light), and beyond them")


def draw(found: dict, out: Path) -> None:
    """One line of panels for every table of a result."""
    panels = []
    for table in found["tables"]:
        rows = [row for row in table.get("rows", []) if row["status"] == "ok" and row["case"] != "products"]
        keys = [key for key in ("ratio", "hot_ratio") if any(key in row for row in rows)]
        keys += ["memory"] if any("peak_bytes" in row for row in rows) else []
        if keys:
            panels.append((table, rows, keys))
    if not panels:
        raise ValueError("nothing to draw: no table has a time or a peak of memory")
    width = max(len(keys) for _, _, keys in panels)
    heights = [0.5 + 0.22 * len(rows) for _, rows, _ in panels]
    figure, grid = plt.subplots(
        len(panels), width, figsize=(5.5 * width, 1 + sum(heights) + 0.4 * len(panels)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for line, (table, rows, keys) in zip(grid, panels, strict=True):
        for axes, key in zip(line, keys, strict=False):
            if key == "memory":
                _memory(axes, rows, table["gradient_bytes"])
            else:
                _time(axes, rows, key)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.12)
        for axes in line[len(keys) :]:
            axes.axis("off")
        cases = ", ".join(dict.fromkeys(row["case"] for row in table["rows"] if row["case"] != "products"))
        title = f"{cases}: {table['head']}, N={table['tokens']:,}, {table['dtype']}"
        line[0].set_title(title, loc="left", fontsize=10)
    figure.suptitle(f"{found['device']['name']}, {found['date']}, forward and backward", fontsize=11)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    """Draw one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="default: the name of the file, as .png beside it")
    arguments = parser.parse_args()
    out = arguments.out or arguments.file.with_suffix(".png")
    draw(json.loads(arguments.file.read_text()), out)
    print(out)


if __name__ == "__main__":
    main()

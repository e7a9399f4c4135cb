"""The paper's Table 2 (arXiv 2506.19767): accuracies in percent, of Qwen2.5-Math-7B trained in several ways."""

from __future__ import annotations

MATHEMATICS = ("aime24", "amc", "math500", "minerva", "olympiadbench")
ELSEWHERE = ("arc_c", "gpqa_d", "mmlu_pro")

# in the order of MATHEMATICS and ELSEWHERE
TABLE_2 = {
    "Qwen2.5-Math-7B": (11.4, 32.6, 48.8, 8.7, 15.8, 18.2, 11.1, 16.9),
    "Qwen2.5-Math-7B-Instruct": (12.9, 48.3, 81.2, 33.1, 39.8, 70.3, 24.7, 34.1),
    "SFT": (31.1, 62.8, 85.2, 39.1, 53.3, 76.2, 25.8, 45.7),
    "SFT with KL": (13.0, 45.2, 70.2, 26.5, 36.3, 33.3, 22.2, 30.4),
    "RL (GRPO)": (24.7, 61.6, 79.2, 33.7, 47.1, 75.6, 31.3, 42.1),
    "SimpleRL-Zero": (27.0, 54.9, 76.0, 25.0, 34.7, 30.2, 23.2, 34.5),
    "OpenReasoner-Zero": (16.5, 52.1, 82.4, 33.1, 47.1, 66.2, 29.8, 58.7),
    "PRIME-Zero": (17.0, 54.0, 81.4, 39.0, 40.3, 73.3, 18.2, 32.7),
    "Oat-Zero": (33.4, 61.2, 78.0, 34.6, 43.4, 70.1, 23.7, 41.7),
    "SFT, then RL": (32.5, 67.1, 84.2, 34.1, 54.6, 76.4, 37.9, 49.6),
    "LUFFY": (29.4, 65.6, 87.6, 37.5, 57.2, 80.5, 39.9, 53.0),
    "TAPO": (33.3, 77.5, 83.4, 38.2, 46.2, 81.6, 37.9, 49.6),
    "ReLIFT": (28.2, 64.8, 85.0, 37.1, 54.9, 74.9, 40.9, 51.9),
    "SRFT": (35.3, 74.3, 89.8, 39.7, 58.3, 85.3, 46.4, 55.9),
}


def published(row: str) -> dict[str, float]:
    """Return a row of the table by set.

    Args:
        row: Its name.
    """
    return dict(zip((*MATHEMATICS, *ELSEWHERE), TABLE_2[row], strict=True))

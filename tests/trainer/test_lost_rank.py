"""A rank that does not come is named, with the place where it was last."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from srft.policy.lost import LostRank, lost_ranks_named, note_place
from tests.ranks import results_of_two_ranks


def rank_main(rank: int, folder: Path) -> None:
    """Rank 1 comes too late to a collective; then it fails by itself, which is no matter of collectives."""
    said = []
    for case in ("own", "late"):
        # on a busy machine ranks need longer to meet than the deadline that is tried
        dist.init_process_group("gloo", init_method=f"file://{folder}/{case}", rank=rank, world_size=2)
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))
        note_place(rank, "step 3, rollout" if rank else "step 3, train")
        for place in ("step 4, rollout", "step 4, reward" * rank):
            note_place(rank, place, beside=True)
        try:
            with lost_ranks_named(rank, 2, 2.0):
                if case == "own":
                    raise RuntimeError("out of memory")
                time.sleep(5 * rank)
                dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            said.append([type(error) is LostRank, str(error)])
        if case == "own":
            dist.destroy_process_group()
    torch.save(json.dumps(said), folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[object]]]:
    return [json.loads(text) for text in results_of_two_ranks(__name__, tmp_path_factory.mktemp("ranks"))]


def test_rank_that_does_not_come_is_named(said: list[list[list[object]]]) -> None:
    """Who waited, for how long, for whom, and at what beside training; the last to come hears that it was given up."""
    assert said[0][1] == [
        True,
        "rank 0 waited at 'step 3, train', and another did not come within train.collective_deadline_s=2 s: "
        "rank 1, last at 'step 3, rollout; beside it step 4, reward'",
    ]
    until = "at 'step 3, rollout; beside it step 4, reward' until now"
    assert said[1][1] == [True, f"the other ranks gave up waiting for rank 1, {until}"]


def test_other_errors_stay_what_they_are(said: list[list[list[object]]]) -> None:
    """No diagnosis of ranks for what a rank found by itself."""
    assert [rank[0] for rank in said] == [[False, "out of memory"]] * 2

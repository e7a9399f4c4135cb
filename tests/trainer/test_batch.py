"""Packing: every sequence once, within the budget, and the same tensors as a naive construction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srft.batch import pack
from srft.responses import Response, Totals, count
from tests.trainer.tiny import CPU, random_groups, sequence

TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=9)
SEQUENCES = st.lists(
    st.builds(sequence, TOKENS, TOKENS, is_demo=st.booleans(), reward=st.sampled_from([0.0, 0.4, 0.5, 1.0])),
    min_size=1,
    max_size=12,
)


@given(SEQUENCES, st.integers(1, 60))
def test_every_sequence_once_within_the_budget(sequences: list[Response], budget: int) -> None:
    """Nothing is lost, doubled or split; a batch passes the budget only when it is one long sequence."""
    batches = pack(sequences, budget, CPU)
    assert sorted(id(s) for b in batches for s in b.sequences) == sorted(map(id, sequences))
    for batch in batches:
        assert len(batch.input_ids) <= budget or len(batch.sequences) == 1
    # first fit leaves at most one batch half empty
    assert sum(2 * len(b.input_ids) <= budget for b in batches) <= 1


@given(SEQUENCES, st.integers(1, 60))
def test_tensors_equal_a_naive_construction(sequences: list[Response], budget: int) -> None:
    """Token by token: what stands where, what predicts it, and what it carries."""
    for i, s in enumerate(sequences):
        s.advantage = 0.25 * i - 1
        s.rollout_logprobs = [] if s.is_demo else [-float(i) - t for t in range(len(s.response_ids))]
    for batch in pack(sequences, budget, CPU):
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        per_token: list[tuple[int, float, bool, bool, float]] = []
        bounds, loss_bounds = [0], [0]
        for s in batch.sequences:
            for position, token in enumerate(s.prompt_ids + s.response_ids):
                if position >= len(s.prompt_ids):
                    step = position - len(s.prompt_ids)
                    rows.append(len(ids) - 1)
                    logprob = 0.0 if s.is_demo else s.rollout_logprobs[step]
                    per_token.append((token, s.advantage, s.is_demo, s.reward >= 0.5, logprob))
                ids.append(token)
                positions.append(position)
            bounds.append(len(ids))
            loss_bounds.append(len(rows))
        labels, advantages, is_demo, is_correct, logprobs = map(list, zip(*per_token, strict=True))
        assert batch.input_ids.tolist() == ids
        assert batch.position_ids.tolist() == positions
        assert batch.loss_rows.tolist() == rows
        assert batch.cu_seqlens.tolist() == bounds and batch.cu_seqlens.dtype == torch.int32
        assert batch.loss_cu_seqlens.tolist() == loss_bounds and batch.loss_cu_seqlens.dtype == torch.int32
        assert batch.max_seqlen == max(map(len, batch.sequences))
        assert batch.labels.tolist() == labels
        assert batch.advantages.tolist() == advantages
        assert batch.is_demo.tolist() == is_demo
        assert batch.is_correct.tolist() == is_correct
        assert batch.rollout_logprobs.tolist() == logprobs
        assert batch.old_logprobs is None


def test_first_row_predicts_the_first_response_token() -> None:
    """By hand: prompt 5 6, response 7 8; then prompt 9, response 4."""
    (batch,) = pack([sequence([5, 6], [7, 8]), sequence([9], [4])], 10, CPU)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.loss_rows.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]


def test_old_logprobs_travel_with_their_sequences() -> None:
    """Each sequence's old log-probabilities stand at its own labels, whatever order packing chose."""
    sequences = [s for g in random_groups() for s in g.rollouts]
    for i, s in enumerate(sequences):
        s.old_logprobs = -float(i) - torch.arange(len(s.response_ids)) / 100
    for batch in pack(sequences, 40, CPU):
        assert batch.old_logprobs is not None
        bounds = batch.loss_cu_seqlens.tolist()
        for s, first, last in zip(batch.sequences, bounds, bounds[1:], strict=False):
            assert torch.equal(batch.old_logprobs[first:last], s.old_logprobs)


def test_count() -> None:
    """Tokens are the responses' alone, apart for rollouts and demonstrations."""
    sequences = [
        sequence([1] * 9, [2, 3, 4]),
        sequence([1], [2]),
        sequence([1], [2] * 5, is_demo=True, reward=1.0),
    ]
    assert count(sequences) == Totals(rollout_tokens=4, demo_tokens=5, rollout_sequences=2, demo_sequences=1)
    assert count([]) == Totals(0, 0, 0, 0)


@pytest.mark.parametrize(("reward", "correct"), [(0.0, False), (0.49, False), (0.5, True), (1.0, True)])
def test_is_correct(reward: float, correct: bool) -> None:
    """A reward counts as accepted from one half up."""
    assert sequence([1], [2], reward=reward).is_correct is correct

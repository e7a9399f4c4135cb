"""The order of prompts and the seeds of samples: epochs, resume at any point, fixed values."""

from __future__ import annotations

import json

import pytest

from srft.data.sampler import PromptSampler, sample_seed


def test_sampler_visits_every_prompt_once_an_epoch() -> None:
    """Whatever the batch sizes, each epoch is a permutation, and two epochs are ordered differently."""
    sampler = PromptSampler(10, seed=5)
    drawn = [index for size in (3, 4, 5, 8, 10) for index in sampler.next(size)]
    epochs = [drawn[0:10], drawn[10:20], drawn[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert PromptSampler(10, seed=6).next(10) != epochs[0]


@pytest.mark.parametrize("stop", [0, 1, 3, 7])
def test_sampler_resumes_anywhere(stop: int) -> None:
    """A sampler loaded from a state goes on exactly as the one that saved it, also mid-epoch."""
    whole = PromptSampler(7, seed=1)
    batches = [whole.next(4) for _ in range(10)]
    first = PromptSampler(7, seed=1)
    for _ in range(stop):
        first.next(4)
    second = PromptSampler(7, seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.next(4) for _ in range(10 - stop)] == batches[stop:]


def test_sampler_order_is_fixed() -> None:
    """The order is part of what a seed means; a change of it would silently change every resumed run."""
    assert PromptSampler(8, seed=0).next(8) == [5, 0, 3, 6, 4, 7, 2, 1]


def test_sampler_refusals() -> None:
    """Batches larger than the data, no data, and a state of other data or another seed are errors."""
    sampler = PromptSampler(4, seed=0)
    with pytest.raises(ValueError, match="a batch of 5 prompts from 4"):
        sampler.next(5)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSampler(0, seed=0)
    with pytest.raises(ValueError, match="num_prompts=5, this run 4"):
        sampler.load_state_dict(PromptSampler(5, seed=0).state_dict())
    with pytest.raises(ValueError, match="seed=1, this run 0"):
        sampler.load_state_dict(PromptSampler(4, seed=1).state_dict())


def test_sample_seeds_differ_in_every_part_and_fit_63_bits() -> None:
    """Run seed, step, prompt and sample index each change the seed; the value is the same everywhere."""
    seeds = {
        sample_seed(s, t, uid, k)
        for s in range(3)
        for t in range(11)
        for uid in ("a:1", "a:11")
        for k in range(12)
    }
    assert len(seeds) == 3 * 11 * 2 * 12
    assert all(0 <= value < 2**63 for value in seeds) and max(seeds) > 2**61
    assert sample_seed(0, 1, "chain:7", 2) == 9152259900630540904

"""What becomes of an update whose loss or gradient is not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from srft.learning import update
from srft.methods import assign_advantages
from srft.record.metrics import combined
from tests.trainer.tiny import learner_of, plain_model, policy, random_groups, tiny_config


def test_a_gradient_that_is_not_finite_stops_the_step() -> None:
    """The weights stay as they were, and the error names the step."""
    trained = policy(plain_model())
    with torch.no_grad():
        trained.get_output_embeddings().weight[3] = float("nan")
    before = copy.deepcopy(trained.state_dict())
    optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
    sequences = assign_advantages(random_groups(), tiny_config().method)
    with pytest.raises(FloatingPointError, match="step 5"):
        update(learner_of(tiny_config("train.max_skipped_updates=0"), trained, optimizer), sequences, 5)
    for name, value in trained.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_updates_that_are_not_finite_are_left_out_and_counted() -> None:
    """Two in a row are; a sound one between starts the count anew; the third in a row ends the run."""
    trained, config = policy(plain_model()), tiny_config("train.max_skipped_updates=2")
    learner = learner_of(config, trained, torch.optim.SGD(trained.parameters(), lr=0.1))
    sequences = assign_advantages(random_groups(), config.method)
    weight = trained.get_output_embeddings().weight

    def skipped(step: int, *, broken: bool) -> float:
        kept, before = weight.detach().clone(), trained.model.norm.weight.detach().clone()
        with torch.no_grad():
            weight[3] = float("inf") if broken else kept[3]
        figures = update(learner, sequences, step)
        assert torch.equal(before, trained.model.norm.weight) is broken
        assert math.isfinite(figures["grad_norm"].value) is not broken
        with torch.no_grad():
            weight[3] = kept[3]
        return combined([figures])["updates/skipped"]

    assert [skipped(step, broken=step != 3) for step in range(1, 6)] == [1, 1, 0, 1, 1]
    with pytest.raises(FloatingPointError, match="step 6: .* after 2 such updates in a row that were left out"):
        skipped(6, broken=True)

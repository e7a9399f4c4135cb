"""Completions that go on over steps: their tokens, when they are learned from, what is saved, what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from srft.config import Config
from srft.data.prompts import Prompt
from srft.engine.base import Completion, Ended, Sampling
from srft.engine.hf import HfEngine
from srft.learning import _parts
from srft.methods import StepInfo
from srft.policy.parallel import World
from srft.record.rollouts import read_rows, step_file
from srft.responses import Group, Response
from srft.rollout import Actor, judge, roll_out
from srft.stop import Stopped
from tests.trainer.chat import char_tokenizer
from tests.trainer.runs import arguments, assert_same_run, comparable_rows, during_call, kill_runs, train, weights
from tests.trainer.test_max_lag import options
from tests.trainer.test_stop import terminated
from tests.trainer.tiny import FakePool, example, learner_of, plain_model, tiny_config

MOST = 12
EOS = 1


class Telling(HfEngine):
    """Counts its weights, keeps the seeds, and tells of every completion, those cut by the limit too, as vLLM does."""

    seeds: list[int]

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        drawn = super().generate(prompts, sampling, seeds)
        self.seeds += [seed for row in seeds for seed in row]
        self.version += 1
        for p, row in enumerate(drawn):
            for k, completion in enumerate(row):
                if ended is not None:
                    ended(p, k, completion.token_ids)
        return drawn


def actor_of(sampling: Sampling, begun: list[str] | None = None) -> Actor:
    """A model of random weights that reads characters."""
    tokenizer = char_tokenizer()
    model = plain_model(vocab=len(tokenizer))
    engine = Telling(model, dtype=torch.float32, pad_token_id=0, max_batch=64, tokenizer=tokenizer)
    engine.seeds = []
    begin = None if begun is None else (lambda item: begun.append(item[0]))
    return Actor(engine, sampling, tokenizer, FakePool(), begin=begin)


def config_of(*words: str) -> Config:
    return tiny_config(f"rollout.max_new_tokens={MOST}", f"rollout.max_lag={MOST}", *words)


def in_parts(config: Config, actor: Actor, prompts: list[Prompt], tokens: int | None) -> list[Group]:
    """The groups once all have ended, some tokens a step; what a step takes up stays as it was."""
    rollout = config.rollout.model_copy(update={"partial_tokens": tokens})
    config = config.model_copy(update={"rollout": rollout})
    groups = roll_out(config, actor, prompts, StepInfo(1, 50, MOST, {}))
    steps = 1
    while any(group.is_open for group in groups):
        before = [group.copy() for group in groups]
        steps += 1
        later = roll_out(config, actor, [], StepInfo(steps, 50, MOST, {}), (), groups)
        assert groups == before
        groups = later
    assert steps <= rollout.segments
    return groups


def told(groups: Sequence[Group]) -> list[Any]:
    """What a verifier and an update see, without the log-probabilities."""
    return [
        (s.prompt_ids, s.response_ids, s.text, s.truncated, s.prefix_tokens, s.num_sampled)
        for group in groups
        for s in group.rollouts
    ]


PROMPTS = [Prompt(example(i), ids, [[5, 9, 4, 7, EOS]]) for i, ids in enumerate(([5, 6, 7], [9], [3, 4, 5, 8], [11]))]


@pytest.mark.parametrize("name", ["grpo", "prefix_rft"])
@pytest.mark.parametrize("least", [0, 4, MOST])
def test_parts_are_the_whole(name: str, least: int) -> None:
    """At the most likely token, whatever the parts: the same tokens, ends and texts, log-probabilities to rounding.

    Stop tokens, and a text of three characters, so that it begins in one part and ends in another.
    """
    config = config_of(f"method.name={name}", "train.rollouts_per_prompt=3")
    plain = actor_of(Sampling(0.0, MOST, ()))
    said = [s.text for g in in_parts(config, plain, PROMPTS, None) for s in g.rollouts]
    stops = {s.response_ids[6] for s in in_parts(config, plain, PROMPTS, None)[0].rollouts}
    sampling = Sampling(0.0, MOST, tuple(stops), (said[-1][4:7], said[4][1:4]), least)
    whole = in_parts(config, actor_of(sampling), PROMPTS, None)
    if least == 0:
        assert {s.truncated for g in whole for s in g.rollouts} == {True, False}
    for tokens in range(1, MOST + 1):
        actor = actor_of(sampling)
        parts = in_parts(config, actor, PROMPTS, tokens)
        assert told(parts) == told(whole)
        for one, other in zip(parts, whole, strict=True):
            for s, t in zip(one.rollouts, other.rollouts, strict=True):
                assert s.rollout_logprobs == pytest.approx(t.rollout_logprobs, abs=1e-5)
                assert len({v for v, _ in s.versions}) == len(s.versions) == -(-s.num_sampled // tokens)
                assert all(n == tokens for _, n in s.versions[:-1])


def test_every_part_has_a_seed_of_its_own() -> None:
    """The same on every call, that of the first part is that of a whole completion, and none comes twice."""
    config, sampling = config_of("method.name=grpo", "train.rollouts_per_prompt=4"), Sampling(1.0, MOST, (EOS,))
    whole, parts, again = (actor_of(sampling) for _ in range(3))
    in_parts(config, whole, PROMPTS, None)
    first = in_parts(config, parts, PROMPTS, 3)
    assert first == in_parts(config, again, PROMPTS, 3)
    seeds: list[int] = parts.engine.seeds  # type: ignore[attr-defined]
    assert len(set(seeds)) == len(seeds) > 3 * 16
    assert seeds[:16] == whole.engine.seeds  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokens", [None, 1, 5, 6])
def test_what_is_judged_early_is_whole(tokens: int | None) -> None:
    """All but the few that may have ended with a part; and each rollout is judged once, when it has ended."""
    begun: list[str] = []
    config = config_of("method.name=grpo", "train.rollouts_per_prompt=4")
    sampling = Sampling(1.0, MOST, (EOS, 2, 3), ("4",))
    groups = in_parts(config, actor_of(sampling, begun), PROMPTS, tokens)
    texts = [s.text for group in groups for s in group.rollouts]
    assert set(begun) <= set(texts) and len(begun) == len(set(begun)) > (0 if tokens == 1 else 6)
    assert {s.text for group in groups for s in group.rollouts if s.truncated} <= set(begun)
    opened = replace(groups[0].rollouts[0], seed=1)
    judge([Group(PROMPTS[0], [opened, groups[0].rollouts[1]])], FakePool())
    assert not opened.is_rewarded and groups[0].rollouts[1].is_rewarded and not groups[0].rollouts[1].lacks_verdict


def test_updates_share_groups_of_any_number_and_ranks(seed: int) -> None:
    """In the order in which they were drawn, whoever has them, as evenly as they divide."""

    class Two(World):
        def gather(self, value: Any) -> list[Any]:
            # those with rollouts, and then those of demonstrations alone
            return next(asked)

    for updates, counts in ((2, (3, 2)), (3, (0, 4)), (4, (1, 1)), (2, (0, 0)), (2, (4, 4))):
        config = tiny_config("method.name=grpo", f"train.updates_per_step={updates}", "train.prompts_per_step=12")
        drawn = iter(torch.randperm(sum(counts)).tolist())
        ranks = [sorted((next(drawn), 0) for _ in range(count)) for count in counts]
        found: list[list[int]] = [[] for _ in range(updates)]
        for rank, own in enumerate(ranks):
            asked: Iterator[Any] = iter([ranks, [[], []]])
            groups = [Group(PROMPTS[0], [Response([1], [2], False, False, [], "")], drawn=when) for when in own]
            learner = replace(learner_of(config, None, None), world=Two(rank, 2))  # type: ignore[arg-type]
            for number, part in enumerate(_parts(learner, groups)):
                found[number] += [group.drawn[0] for group in part]
        assert sorted(i for part in found for i in part) == list(range(sum(counts)))
        assert [i for part in found for i in sorted(part)] == list(range(sum(counts)))
        assert max(map(len, found)) - min(map(len, found)) <= 1


STEPS = 5
# some 12 tokens to an end
STOP = [*"0123456789+-*=#abcdefgh"]


def run_options(folder: Path, lag: int, **changes: object) -> dict[str, Any]:
    """A run whose completions take up to four steps, of which many take less."""
    parts = {"rollout__partial_tokens": 8, "rollout__stop": STOP, "train__steps": STEPS, "train__record_rollouts": True}
    return options(folder, lag) | parts | changes


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one piece, whose batches are made beside the step before."""
    folder = tmp_path_factory.mktemp("ahead") / "run"
    return train(folder, **run_options(folder, 4))


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose batches are made when they are learned from, in two updates each."""
    folder = tmp_path_factory.mktemp("in_turn") / "run"
    return train(folder, **run_options(folder, 3), method__name="grpo", train__updates_per_step=2)


@pytest.mark.parametrize("which", ["ahead", "in_turn"])
def test_rows_tell_of_every_token(which: str, request: pytest.FixtureRequest) -> None:
    """Groups that ended and that go on, and the lag of what has a gradient: by the versions in the record."""
    run: Path = request.getfixturevalue(which)
    lag, opened, several = 4 if which == "ahead" else 3, 0, 0
    for row in comparable_rows(run)[1:]:
        assert row["groups/ended"] + row["groups/open"] == opened + 4
        step, opened = row["step"], row["groups/open"]
        rows = [one for one in read_rows(step_file(run, step)) if not one["is_demo"]]
        assert len(rows) == 3 * row["groups/ended"]
        counted = [one for one in rows if which == "ahead" or one["advantage"]]
        behind = [step - 1 - version for one in counted for version in one["versions"]]
        assert max([step - 1 - one["version"] for one in rows], default=0) <= lag
        several += sum(len(set(one["versions"])) > 1 for one in rows)
        assert all(len(one["versions"]) == len(one["response_ids"]) for one in rows)
        assert all(one["versions"] == sorted(one["versions"]) and one["version"] == one["versions"][0] for one in rows)
        if counted:
            assert row["lag/mean"] == pytest.approx(sum(behind) / len(behind))
            assert row["lag/older"] == pytest.approx(sum(map(bool, behind)) / len(behind))
            assert row["lag/max"] == max(behind)
    assert several > 5


def test_a_step_without_an_ended_group_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing is learned in it; the run goes on."""
    run = train(tmp_path / "run", **run_options(tmp_path / "run", 31, rollout__partial_tokens=1, train__steps=2))
    assert [row["groups/open"] for row in comparable_rows(run)[1:]] == [4, 8]
    assert "Step 2: no group has ended, 8 go on, so nothing was learned." in capsys.readouterr().out


@pytest.mark.parametrize("which", ["ahead", "in_turn"])
def test_two_pieces_are_the_whole(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Stopped by a signal in mid-step, ended after it, killed while a batch is made: the same rows and weights."""
    run: Path = request.getfixturevalue(which)
    method: dict[str, Any] = {} if which == "ahead" else {"method__name": "grpo", "train__updates_per_step": 2}
    folder = tmp_path / "run"
    changes = run_options(folder, 4 if which == "ahead" else 3) | method
    with pytest.MonkeyPatch.context() as patch:
        during_call(patch, "srft.train.learn", 2, terminated)
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            train(folder, **changes)
    train(folder, **changes | {"train__steps": 3, "train__eval_every": 3}, train__resume=True)
    kill_runs([("srft.rollouts.judge", 2, arguments(folder, **changes, train__resume=True))])
    with pytest.raises(ValueError, match="belongs to a run with other options: rollout.partial_tokens was 8, now 11"):
        train(folder, **changes | {"rollout__partial_tokens": 11}, train__resume=True)
    again = train(folder, **changes, train__resume=True)
    assert weights(again) == weights(run)
    for step in range(1, STEPS + 1):
        assert read_rows(step_file(again, step)) == read_rows(step_file(run, step))
    # which is evaluated more often
    rows, those = ({row["step"]: row for row in comparable_rows(one)} for one in (again, run))
    for step in range(STEPS + 1):
        assert {k: v for k, v in rows[step].items() if "eval" not in k} == {
            k: v for k, v in those[step].items() if "eval" not in k
        }


def test_a_replay_has_the_same_bits(in_turn: Path, tmp_path: Path) -> None:
    """Groups are learned from in the steps in which they ended, by their oldest token not too old."""
    changes = run_options(in_turn.parents[1], 3) | {"train__replay": in_turn, "train__record_rollouts": False}
    again = train(tmp_path / "run", **changes, method__name="grpo", train__updates_per_step=2)
    assert weights(again) == weights(in_turn)
    for row, other in zip(comparable_rows(again), comparable_rows(in_turn), strict=True):
        assert row == {name: other[name] for name in row}
    with pytest.raises(ValueError, match="3 behind the one that learns, and rollout.max_lag=1.*set it to 3"):
        late = {"rollout__max_lag": 1, "rollout__partial_tokens": 16, "method__name": "grpo"}
        train(tmp_path / "late", **changes | late)


def test_parts_at_least_as_long_as_completions_change_nothing(tmp_path: Path) -> None:
    """Not a bit, without a lag."""
    run = run_options(tmp_path / "run", 0, train__steps=2)
    runs = [train(tmp_path / str(tokens), **run | {"rollout__partial_tokens": tokens}) for tokens in (32, 100)]
    assert_same_run(*runs)
    assert not [name for name in comparable_rows(runs[0])[-1] if name in ("groups/open", "lag/max")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rollout.max_lag=2"], "takes 4 steps, .* first tokens are 3 .*max_lag to at least 3.*tokens to at least 4"),
        ([], "rollout.max_lag=0; set rollout.max_lag to at least 3, or rollout.partial_tokens to at least 12"),
        (["rollout.max_lag=3", "env.name=calculator"], "env.name=calculator with these options wants the completions"),
        (["rollout.max_lag=3", "train.rollouts_only=true"], "train.rollouts_only=True with these options wants"),
        (["rollout.max_lag=3", "method.name=dapo"], "method.name=dapo with these options wants"),
        (["rollout.max_lag=3", "method.name=relift"], "method.name=relift with these options wants"),
        (["rollout.max_lag=3", "method.name=sft"], "does not weight rollouts of an older policy"),
    ],
)
def test_what_does_not_go_together(words: list[str], said: str) -> None:
    """Is refused before work starts, with what to do."""
    with pytest.raises(ValueError, match=said):
        tiny_config("rollout.partial_tokens=3", *words)


def test_what_goes_together_after_all() -> None:
    """Methods whose number of groups is settled, and parts that are whole completions."""
    for words in (["method.name=dapo", "method.max_resamples=0"], ["method.name=relift", "method.buffer_size=4"]):
        config = tiny_config("rollout.partial_tokens=3", "rollout.max_lag=5", *words)
        assert (config.rollout.segments, config.rollout.steps_ahead) == (4, 2)
    assert tiny_config("rollout.partial_tokens=12", "method.name=dapo").rollout.segments == 1

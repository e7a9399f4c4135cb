"""A step's groups: which demonstrations join, what a verifier is shown, and what ends a completion."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from srft.data.examples import Example
from srft.data.prompts import Prompt, build_prompts
from srft.data.templates import PromptFormat
from srft.engine.base import Completion, Ended, Sampling
from srft.engine.sampling import describe_ends, make_sampling
from srft.evaluation.held_out import evaluate
from srft.methods import StepInfo
from srft.policy.parallel import ALONE, World
from srft.responses import Group
from srft.rewards.pool import RewardPool
from srft.rollout import Actor, judge, resample, roll_out
from tests.trainer.chat import CHATML, R1, char_tokenizer
from tests.trainer.runs import small_config
from tests.trainer.tiny import FakeEngine, FakePool, plain_model

QUESTION = [{"role": "user", "content": "2+3?"}]


def test_other_demonstrations_at_every_visit(tmp_path: Path) -> None:
    """Of more demonstrations than are joined each has its turn, by the seed alone; all of them keep their order."""
    example = Example("f:0", "2+3=", "5", ["#5", "so #5", "thus #5"], {})
    prompt = Prompt(example, [1], [[1, 2], [1, 3], [1, 4]])

    def chosen(step: int, demos: int) -> list[str]:
        config = small_config(tmp_path, method__name="sft", train__demos_per_prompt=demos)
        actor = Actor(FakeEngine({}), Sampling(1.0, 4, (1,)), char_tokenizer(), FakePool())
        (group,) = roll_out(config, actor, [prompt], StepInfo(step, 20, 4, {}))
        for demo in group.demos:
            assert demo.response_ids == prompt.demo_ids[example.demos.index(demo.text)]
        return [demo.text for demo in group.demos]

    once = [chosen(step, 1) for step in range(20)]
    assert {demo for demos in once for demo in demos} == set(example.demos)
    assert once == [chosen(step, 1) for step in range(20)]
    assert all(chosen(step, 3) == example.demos for step in range(3))


@pytest.mark.parametrize(
    ("said", "text", "reward"),
    [
        ("so #5", "<think>\nso #5", 0.0),
        ("so #4</think>#5", "<think>\nso #4</think>#5", 1.0),
        ("so #5</think>#4", "<think>\nso #5</think>#4", 0.0),
        ("x</think>#5;#6", "<think>\nx</think>#5;", 1.0),
    ],
    ids=["unclosed", "right", "wrong", "stopped"],
)
def test_thought_that_the_prompt_opened_is_judged_as_opened(
    tmp_path: Path, said: str, text: str, reward: float
) -> None:
    """In training and evaluation alike, a right answer inside a thought that is never closed earns nothing."""
    tokenizer = char_tokenizer(R1)
    config = small_config(tmp_path, method__name="grpo", train__rollouts_per_prompt=2)
    (prompt,), _ = build_prompts(
        [Example("f:0", QUESTION, "5;" if ";" in said else "5", [], {})], PromptFormat(tokenizer),
        max_prompt_tokens=99, max_demo_tokens=9,
    )  # fmt: skip
    ids = tokenizer.encode(said, add_special_tokens=False)
    engine = FakeEngine({tuple(prompt.prompt_ids): Completion(ids, [0.0] * len(ids), "stop", 0)})
    sampling = Sampling(1.0, 40, (1,), (";",))
    with RewardPool("exact", 1, 5.0) as pool:
        actor = Actor(engine, sampling, tokenizer, pool)
        (group,) = roll_out(config, actor, [prompt], StepInfo(1, 1, 40, {}))
        assert [s.text for s in group.rollouts] == [text] * 2
        judge([group], pool)
        assert [s.reward for s in group.rollouts] == [reward] * 2
        assert evaluate(actor, [prompt])["eval/accuracy"] == reward


class SeedEngine(FakeEngine):
    """Answers with a digit that the seed decides, right two times of three; the seed is also its log-probability."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        ids = char_tokenizer().encode("567", add_special_tokens=False)
        return [[Completion([ids[seed % 3 > 0]], [float(seed)], "stop", 0) for seed in row] for row in seeds]


class Threads(World):
    """Two ranks that are threads."""

    met, said = Barrier(2), ["", ""]

    def gather(self, value: object) -> list[object]:
        self.said[self.rank] = copy.deepcopy(value)
        self.met.wait(timeout=20)
        found = list(self.said)
        self.met.wait(timeout=20)
        return found


def resampled(folder: Path, world: World, most: int) -> tuple[list[Group], list[Group], list[int]]:
    """A batch of five of seven prompts, drawn again and again in order: the groups, those that gave way, the draws."""
    config = small_config(
        folder, method__name="dapo", method__max_resamples=most, train__prompts_per_step=5, train__rollouts_per_prompt=2
    )
    prompts = [Prompt(Example(f"f:{i}", "2+3=", "6", [], {}), [1], []) for i in range(7)]
    drawn: list[int] = []

    def draw(number: int) -> list[Prompt]:
        drawn.append(number)
        return [prompts[i % 7] for i in range(sum(drawn) - number, sum(drawn))]

    pool = FakePool()
    actor = Actor(SeedEngine({}), Sampling(1.0, 4, (1,)), char_tokenizer(), pool, world)
    now = StepInfo(1, 1, 4, {})
    groups = roll_out(config, actor, draw(5), now)
    judge(groups, pool)
    return groups, resample(config, actor, groups, draw, now), drawn


def told(group: Group) -> tuple[str, list[list[float]], list[float]]:
    return group.prompt.example.id, [s.rollout_logprobs for s in group.rollouts], [s.reward for s in group.rollouts]


def test_groups_without_a_contrast_give_way(tmp_path: Path) -> None:
    """In their own places, to as many prompts as follow, until all have one or the rounds are over."""
    first, none, drawn = resampled(tmp_path, ALONE, 0)
    alike = [place for place, group in enumerate(first) if len({s.reward for s in group.rollouts}) == 1]
    assert none == [] and drawn == [5] and 0 < len(alike) < 5
    once, gave_way, drawn = resampled(tmp_path, ALONE, 1)
    assert drawn == [5, len(alike)] and [told(g) for g in gave_way] == [told(first[place]) for place in alike]
    assert [told(g) for i, g in enumerate(once) if i not in alike] == [
        told(g) for i, g in enumerate(first) if i not in alike
    ]
    last, gave_way, drawn = resampled(tmp_path, ALONE, 20)
    assert all(len({s.reward for s in group.rollouts}) == 2 for group in last)
    assert len(gave_way) == sum(drawn[1:]) and len(drawn) > 2
    # no seed comes twice, also where a prompt does
    seeds = [tuple(s.rollout_logprobs) for group in last + gave_way for s in group.rollouts]
    assert len(seeds) == len(set(seeds)) and sum(drawn) > 7


def test_ranks_resample_as_one_process(tmp_path: Path) -> None:
    """The same groups in the same places of the batch, those that gave way too, and as many draws on each rank."""
    groups, gave_way, drawn = resampled(tmp_path, ALONE, 20)
    with ThreadPoolExecutor(2) as both:
        ranks = list(both.map(lambda rank: resampled(tmp_path, Threads(rank, 2), 20), range(2)))
    placed = [told(ranks[place % 2][0][place // 2]) for place in range(5)]
    assert placed == [told(group) for group in groups]
    assert sorted(told(g) for of_rank in ranks for g in of_rank[1]) == sorted(map(told, gave_way))
    assert [of_rank[2] for of_rank in ranks] == [drawn, drawn]


def test_sampling_takes_end_tokens_from_tokenizer_model_and_template(tmp_path: Path) -> None:
    """Each of the three, an option's text, and the sentence that says so."""
    tokenizer = char_tokenizer(CHATML)
    model = plain_model(vocab=len(tokenizer))
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", "<|im_end|>", "<end_of_turn>")}
    model.generation_config.eos_token_id = [ids["<eos>"], ids["<end_of_turn>"]]
    sampling = make_sampling(small_config(tmp_path, rollout__stop="</answer>"), tokenizer, model)
    assert sampling == Sampling(1.0, 32, tuple(sorted(ids.values())), ("</answer>",))
    said = describe_ends(sampling, tokenizer)
    assert all(name in said for name in (*ids, "'</answer>'"))
    model.generation_config.eos_token_id = None
    plain = make_sampling(small_config(tmp_path), char_tokenizer(), model)
    assert plain.stop_token_ids == (1,)

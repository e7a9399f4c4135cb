"""What is told of models: shifts of probabilities, the map, the weights of tokens, and the command on a small run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from srft.analysis.command import main
from srft.analysis.map import Point, distance, draw_map, thinned
from srft.analysis.policies import (
    Policy,
    encode,
    load_policy,
    model_of,
    refuse_other_words,
    sample,
    score,
    start_of,
    token_texts,
)
from srft.analysis.shift import Shift, by_token, draw_histograms, histogram, make_shifts, summarise
from srft.analysis.weights import Weighed, weigh
from srft.analysis.weights import summarise as summarise_weights
from srft.data.examples import Example
from srft.learning import accumulate
from srft.policy.model import byte_tokenizer
from tests.trainer.runs import small_config, train
from tests.trainer.tiny import learner_of, members, plain_model, policy, random_groups, tiny_config

BYTES = 258


def asked(*overrides: str, seed: int = 0) -> Policy:
    """A model of bytes with random weights."""
    config = tiny_config("rollout.temperature=0.8", *overrides)
    return Policy(f"seed {seed}", config, policy(plain_model(vocab=BYTES, seed=seed)), byte_tokenizer())


def problems(count: int) -> list[Example]:
    return [Example(f"t:{i}", f"{i}+1=", str(i + 1), [f"{i + 1}"], {}) for i in range(count)]


def test_identical_models_shift_nothing() -> None:
    """Exactly 0 for every token, however long the responses are; another model shifts them."""
    tuned, same, other = asked(), asked(), asked(seed=1)
    prompts = encode(tuned, problems(9))
    responses = sample(tuned, prompts)
    tokens = [token_texts(tuned, one.response_ids) for one in responses]
    after = [each.logprobs for each in score(tuned, responses)]
    names = [str(prompt.example.prompt) for prompt in prompts]

    def shifts(base: Policy) -> list[Shift]:
        return make_shifts(names, responses, tokens, [each.logprobs for each in score(base, responses)], after)

    found = summarise(shifts(same))
    assert found["mean_abs"] == 0.0 == found["over_0.01"] and found["responses"] == 9
    assert found["tokens"] == sum(len(one.response_ids) for one in responses)
    assert all((shift.moved == 0).all() for shift in shifts(same))
    assert summarise(shifts(other))["mean_abs"] > 0.01


def test_shifts_in_numbers() -> None:
    """Shares, the bins of the histogram, and the tokens that moved most, on probabilities by hand."""
    shifts = [
        Shift("p", ["a"] * 5, np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([0.7, 0.8, 0.9, 1.0, 1.0])),
        Shift("q", [*"bbbbbc"], np.full(6, 0.5), np.array([0.5, 0.5, 0.5, 0.5, 0.35, 0.495])),
    ]
    found = summarise(shifts)
    assert found["raised"] == pytest.approx(5 / 11) and found["lowered"] == pytest.approx(1 / 11)
    assert found["over_0.1"] == pytest.approx(6 / 11) and found["over_0.5"] == pytest.approx(4 / 11)
    assert found["mean"] == pytest.approx((2.9 - 0.155) / 11) and found["mean_abs"] == pytest.approx(3.055 / 11)
    edges, shares = histogram(shifts)
    assert shares.sum() == pytest.approx(1) and shares[(edges[:-1] < 0) & (edges[1:] > 0)] == pytest.approx(5 / 11)
    assert [(row[0], row[1]) for row in by_token(shifts)] == [("a", 5), ("b", 5)]
    assert by_token(shifts)[1][2] == pytest.approx(-0.03)
    bars = draw_histograms({"tuned": shifts}, "base").figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(shares.tolist())


def test_a_model_is_as_far_from_its_own_responses_as_it_is_undecided() -> None:
    """Its distance is the engine's own estimate of its entropy, and within sampling error the entropy itself."""
    model = asked()
    responses = sample(model, encode(model, problems(200)))
    scores = score(model, responses)
    drawn = np.concatenate([one.rollout_logprobs for one in responses])
    assert distance(scores) == pytest.approx(-drawn.mean(), abs=1e-5)
    entropy = np.concatenate([each.entropy for each in scores])
    gap = -np.concatenate([each.logprobs for each in scores]) - entropy
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap)) < 0.2 * entropy.mean()
    other = asked(seed=1)
    assert distance(score(other, responses)) > distance(scores) + 0.1


def test_scores_do_not_depend_on_the_packing() -> None:
    """Responses come back in order, whatever fits into one pass."""
    model, narrow = asked(), asked("train.tokens_per_microbatch=20")
    responses = sample(model, encode(model, problems(12)))
    for whole, part in zip(score(model, responses), score(narrow, responses), strict=True):
        np.testing.assert_allclose(whole.logprobs, part.logprobs, atol=1e-5)
        np.testing.assert_allclose(whole.entropy, part.entropy, atol=1e-5)


def test_the_map_has_every_distance_of_every_point() -> None:
    """Ways between the first reference and each other, and curves over the steps, with the numbers of the points."""
    points = [
        Point("srft", step, {"demonstrations": 2.0 - step, "the start": 1.0 + step, "teacher": 3.0}) for step in (0, 1)
    ] + [Point("grpo", 0, {"demonstrations": 2.0, "the start": 1.0, "teacher": 3.0})]
    ways, curves = draw_map(points)
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in ways.figure.axes] == [
        ("to demonstrations (nats per token)", "to the start"), ("to demonstrations (nats per token)", "to teacher"),
    ]  # fmt: skip
    line = ways.figure.axes[0].get_lines()[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2.0, 1.0], [1.0, 2.0])
    assert [list(ax.get_lines()[0].get_ydata()) for ax in curves.figure.axes] == [[2.0, 1.0], [1.0, 2.0], [3.0, 3.0]]
    assert len(draw_map([Point("srft", 0, {"demonstrations": 2.0})])) == 1
    assert thinned([0, 1, 2, 3, 4, 5], 3) == [0, 2, 5] and thinned([0, 4], 12) == [0, 4]


@pytest.mark.parametrize(
    "options",
    [
        ["method.entropy_scope=token"],
        ["method.entropy_scope=sequence"],
        ["method.entropy_scope=batch"],
        ["method.entropy_scope=batch", "method.entropy_source=demos"],
        ["method.entropy_scope=batch", "method.entropy_source=own"],
        ["method.weights=fixed"],
        ["method.preset=official", "method.self_rollout=likelihood"],
    ],
)
def test_weights_are_those_of_training(options: list[str]) -> None:
    """Their means are what an update logs, in every scope."""
    config = tiny_config("method.name=srft", *options)
    model = policy(plain_model())
    learner = learner_of(config, model, torch.optim.SGD(model.parameters(), lr=1.0))
    # of one kind each, as the weights are asked for: demonstrations, and right rollouts
    sequences = [s for s in members(random_groups(6)) if s.is_demo or s.is_correct]
    figures, _ = accumulate(learner, sequences, 1)
    entropies = [each.entropy for each in score(Policy("", config, model, byte_tokenizer()), sequences)]
    is_demo = [s.is_demo for s in sequences]
    weights = weigh(config.method, entropies, is_demo, {})
    for kind, name in ((True, "weight/sft"), (False, "weight/rl")):
        used = np.concatenate([used for (_, used), demo in zip(weights, is_demo, strict=True) if demo is kind])
        assert used.mean() == pytest.approx(figures[name].value, rel=1e-5)
    sign = 1 if config.method.preset == "official" else -1
    for (own, _), entropy, demo in zip(weights, entropies, is_demo, strict=True):
        assert own == pytest.approx(0.5 * np.exp(sign * entropy) if demo else 0.1 * np.exp(entropy))


def test_weights_by_averages_over_steps_are_taken_from_the_record() -> None:
    """What the last row says, for every token; the token's own entropy still tells what it would have weighed."""
    config = tiny_config("method.name=srft", "method.weights=trend")
    ((own, used),) = weigh(config.method, [np.array([0.0, 1.0])], [True], {"weight/sft": 0.4, "weight/rl": 0.2})
    assert used.tolist() == [0.4, 0.4] and own == pytest.approx([0.5, 0.5 / math.e])
    found = summarise_weights([Weighed("", ["a", "b"], True, np.array([0.0, 1.0]), own, used)], 0.5)
    assert found == pytest.approx(
        {"tokens": 2, "entropy": 0.5, "own": own.mean(), "used": 0.4, "unmoved": 0.5, "halved": 0.5, "doubled": 0.0}
    )


def test_models_of_other_words_are_refused() -> None:
    """One line that says what to do."""
    model, words = asked(), byte_tokenizer()
    refuse_other_words("base", words, model)
    words.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="base and seed 0 have other tokenizers.*one family"):
        refuse_other_words("base", words, model)


def test_tokens_are_read_one_by_one() -> None:
    """Special ones by their names, and a byte that is no character by its own."""
    model = asked()
    ids = model.tokenizer.encode("a é")
    assert token_texts(model, [*ids, model.tokenizer.eos_token_id]) == ["a", " ", "Ã", "©", "<eos>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of SRFT with a checkpoint each."""
    folder = tmp_path_factory.mktemp("run")
    return train(folder, train__keep_checkpoints=9, train__page=False, train__grad_terms_every=1)


def test_a_run_is_told_from_its_records_and_models(run: Path, tmp_path: Path) -> None:
    """Its own start is found, every checkpoint is on the map, and the weights of tokens and the page are there."""
    main([str(run), "--problems", "8", "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert [(point["run"], point["step"]) for point in numbers["map"]] == [("run", 0), ("run", 1), ("run", 2)]
    assert all(list(point["distances"]) == ["demonstrations", "the start"] for point in numbers["map"])
    start = numbers["map"][0]["distances"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # the same demonstrations of the same problems as in the run's own evaluations
    for point in numbers["map"]:
        assert point["distances"]["demonstrations"] == pytest.approx(rows[point["step"]]["eval/demo_loss"], rel=1e-5)
    assert start["the start"] < start["demonstrations"]
    assert {path.stem for path in tmp_path.glob("*.png")} >= {
        "entropy", "weights", "grad_terms", "cosine", "held_out_problems", "token_weights", "map", "distances"
    }  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "Entropy weights, token by token" in page and 'class="tokens"' in page and "<script" not in page


def test_models_are_compared_on_the_problems_of_a_run(run: Path, tmp_path: Path) -> None:
    """A run stands for its model, which beside itself has moved no token; beside its first checkpoint it has."""
    first = run / "checkpoints" / "step_000001"
    main([str(run), str(run / "model"), str(first), "--prompts", str(run), "--problems", "4", "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "numbers.json").read_text())["shift"]
    assert [found["responses"] for found in numbers.values()] == [4, 4]
    same, other = numbers.values()
    assert same["mean_abs"] == 0.0 and other["mean_abs"] > 0
    assert (tmp_path / "probability_shift.png").exists()


def test_models_are_compared_on_any_prompts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a file, within the limits of the command line; a model that is not there is one line."""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": "1"}) + "\n" for i in range(3)))
    out = tmp_path / "out"
    words = [f"base={run}", str(run), "--prompts", str(source), "rollout.max_new_tokens=5", "--out", str(out)]
    main(words)
    assert "run beside base" in (out / "report.html").read_text()
    (found,) = json.loads((out / "numbers.json").read_text())["shift"].values()
    assert found["responses"] == 3 and found["tokens"] <= 15
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(run), f"{tmp_path}/none", *words[2:]])
    assert stopped.value.code == 2 and "cannot load" in capsys.readouterr().err


def test_where_a_run_began_and_what_it_came_to(run: Path, tmp_path: Path) -> None:
    """Its model, else its newest checkpoint; a built model without a warm start is built again."""
    assert model_of(str(run)) == str(run / "model") and model_of("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has neither model/ nor a checkpoint"):
        model_of(str(tmp_path))
    (tmp_path / "checkpoints" / "step_000007").mkdir(parents=True)
    assert model_of(str(tmp_path)).endswith("step_000007")
    assert start_of(small_config(tmp_path)) == "tiny"
    assert start_of(small_config(tmp_path, model__name=str(run / "model"))) == str(run / "model")
    assert start_of(small_config(tmp_path, model__warm_start__max_steps=1)) is None


def test_positions_and_template_are_those_of_the_runs_checkpoint_alone(tmp_path: Path) -> None:
    """Another model, such as a reference, is as its own files say."""
    for name in ("own", "other"):
        plain_model(vocab=259).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    config = small_config(
        tmp_path, model__name=tmp_path / "own", model__rope_theta=40000, model__chat_template="{{ messages }}"
    )
    own, other = (load_policy(str(tmp_path / name), name, config) for name in ("own", "other"))
    assert own.model.config.rope_parameters["rope_theta"] == 40000 and own.tokenizer.chat_template == "{{ messages }}"
    assert other.model.config.rope_parameters["rope_theta"] == 10000 and other.tokenizer.chat_template is None

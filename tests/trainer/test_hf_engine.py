"""The in-process engine: probabilities, sampling, stopping, independence of batch mates, new weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from srft.engine import hf
from srft.engine.base import Sampling
from srft.engine.cache import RoomyLayer, make_cache
from srft.engine.hf import HfEngine
from tests.trainer.architectures import build
from tests.trainer.tiny import VOCAB, plain_model, policy

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], [11, 12]]
STOPS = (1, 2, 3)


def engine_of(model: transformers.PreTrainedModel, max_batch: int = 64) -> HfEngine:
    return HfEngine(model, dtype=torch.float32, pad_token_id=0, max_batch=max_batch)


def plain_logprobs(
    model: transformers.PreTrainedModel, ids: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """[T-1, V] log-probabilities from one plain forward pass."""
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, :-1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_plain_forward_pass(temperature: float) -> None:
    """Each token's log-probability is that of the distribution it was drawn from; greedy reports temperature 1."""
    model = plain_model()
    drawn = engine_of(policy(model)).generate(
        PROMPTS, Sampling(temperature, 12, STOPS), [[10 * p + k for k in range(3)] for p in range(4)]
    )
    for prompt, completions in zip(PROMPTS, drawn, strict=True):
        assert len(completions) == 3
        for c in completions:
            every = plain_logprobs(model, prompt + c.token_ids, temperature or 1.0)[len(prompt) - 1 :]
            expected = every[torch.arange(len(c.token_ids)), c.token_ids]
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=0, atol=1e-5)
            if temperature == 0:
                assert c.token_ids == every.argmax(-1).tolist()


@pytest.mark.parametrize(
    "name",
    ["gpt2", "opt", "stablelm", "mistral-window", "gemma3", "cohere2", "granite", "smollm3", "deepseek-v3", "llama4",
     "qwen2-moe", "jetmoe"],
)  # fmt: skip
def test_samples_have_the_log_probabilities_of_a_whole_forward(name: str) -> None:
    """Left padding, caches and windows of each kind of model change nothing, on either side of a window of 16."""
    engine, generator = engine_of(policy(build(name))), torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 96, (n,), generator=generator).tolist() for n in (1, 3, 9, 20, 31)]
    drawn = engine.generate(prompts, Sampling(1.0, 20, tuple(range(1, 10))), [[10 * p, 10 * p + 1] for p in range(5)])
    for prompt, completions in zip(prompts, drawn, strict=True):
        for c in completions:
            (scored,) = engine.score([prompt + c.token_ids])
            torch.testing.assert_close(c.logprobs, scored[len(prompt) - 1 :], rtol=0, atol=1e-4)


def test_the_head_multiplies_one_copy_of_its_weight() -> None:
    """Of a prompt only the last hidden state goes to the head: with the strides of them all, it takes a copy a row."""
    engine, seen = engine_of(policy(plain_model())), []
    engine._model.lm_head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    engine.generate(PROMPTS, Sampling(1.0, 3, STOPS), [[k] for k in range(4)])
    assert seen[0].shape[:2] == (4, 1)
    assert all(hidden_states.is_contiguous() for hidden_states in seen)


def test_a_copy_in_bf16_keeps_its_frequencies() -> None:
    """Rotary frequencies rounded to bf16 turn late positions by radians; transformers keeps them in fp32."""
    model, ids = plain_model(), [3 + i % 30 for i in range(60)]
    model.model.rotary_emb.inv_freq.mul_(1 + 2**-9)  # a quarter of a bf16 step: rounding moves every frequency
    kept = HfEngine(policy(model), dtype=torch.bfloat16, pad_token_id=0, max_batch=4)
    assert kept._model.dtype == torch.bfloat16
    assert torch.equal(kept._model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert kept._model.config._attn_implementation == "sdpa"
    expected = torch.tensor(engine_of(policy(model)).score([ids])[0])
    assert float((torch.tensor(kept.score([ids])[0]) - expected).square().mean().sqrt()) < 0.1


def test_stop_token_ends_a_completion_and_stays() -> None:
    """The stop token is the last and only one; without it the completion has the full length."""
    drawn = engine_of(plain_model()).generate(PROMPTS, Sampling(1.0, 9, STOPS), [list(range(20))] * 4)
    finishes = set()
    for c in (c for row in drawn for c in row):
        finishes.add(c.finish)
        assert len(c.token_ids) == len(c.logprobs)
        assert not set(c.token_ids[:-1]) & set(STOPS)
        assert (c.token_ids[-1] in STOPS) == (c.finish == "stop")
        assert c.finish == "stop" or len(c.token_ids) == 9
    assert finishes == {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_nothing_ends_before_the_least_number_of_tokens(temperature: float) -> None:
    """So many are drawn without the stop tokens, whose log-probabilities are of the others alone; then they may end."""
    model, stops = plain_model(), (1, 2, 3, 5, 8, 13, VOCAB + 40)
    sampling = Sampling(temperature, 12, stops, min_new_tokens=5)
    drawn = engine_of(policy(model)).generate(PROMPTS, sampling, [[10 * p + k for k in range(6)] for p in range(4)])
    lengths, lost = set(), 0.0
    for prompt, completions in zip(PROMPTS, drawn, strict=True):
        for c in completions:
            lengths.add(len(c.token_ids))
            assert not set(c.token_ids[:5]) & set(stops) and (c.token_ids[-1] in stops) == (c.finish == "stop")
            every = plain_logprobs(model, prompt + c.token_ids, temperature or 1.0)[len(prompt) - 1 :]
            own = every[torch.arange(len(c.token_ids)), c.token_ids]
            every[:5, stops[:-1]] = -torch.inf
            every = every.log_softmax(-1)
            expected = every[torch.arange(len(c.token_ids)), c.token_ids]
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, rtol=0, atol=1e-5)
            lost = max(lost, float((expected - own)[:5].max()))
            if temperature == 0:
                assert c.token_ids == every.argmax(-1).tolist()
    assert min(lengths) == 6 if temperature else min(lengths) > 5
    assert lost > 0.01


def test_all_of_a_batch_may_be_of_one_length() -> None:
    """With as many at least as at most, as a measurement of speed wants it."""
    (drawn,) = engine_of(plain_model()).generate([[5, 6]], Sampling(1.0, 9, STOPS, (), 9), [list(range(30))])
    assert {(len(c.token_ids), c.finish) for c in drawn} == {(9, "length")}


@pytest.mark.parametrize("max_batch", [64, 3, 1])
def test_a_sample_depends_on_its_prompt_and_seed_alone(max_batch: int) -> None:
    """Batch mates, batch size and order change nothing; another seed does."""
    model, sampling = plain_model(), Sampling(1.0, 12, STOPS)
    seeds = [[100 * p + k for k in range(5)] for p in range(4)]
    together = engine_of(model).generate(PROMPTS, sampling, seeds)
    other = engine_of(model, max_batch)
    backwards = other.generate(PROMPTS[::-1], sampling, seeds[::-1])[::-1]
    assert [[c.token_ids for c in row] for row in backwards] == [
        [c.token_ids for c in row] for row in together
    ]
    alone = other.generate([PROMPTS[2]], sampling, [[203]])
    assert alone[0][0].token_ids == together[2][3].token_ids
    assert len({tuple(c.token_ids) for c in together[0]}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_match_probabilities(temperature: float) -> None:
    """Pearson's statistic of 4,000 draws over 7 tokens, first and second position."""
    model = plain_model(vocab=7)
    draws = 4000
    (drawn,) = engine_of(model, max_batch=draws).generate(
        [[2, 3]], Sampling(temperature, 2, ()), [list(range(draws))]
    )
    common = max(range(7), key=[c.token_ids[0] for c in drawn].count)
    for prefix, tokens in (
        ([2, 3], [c.token_ids[0] for c in drawn]),
        ([2, 3, common], [c.token_ids[1] for c in drawn if c.token_ids[0] == common]),
    ):
        expected = plain_logprobs(model, [*prefix, 0], temperature)[-1].exp() * len(tokens)
        found = torch.bincount(torch.tensor(tokens), minlength=7)
        # tokens expected less than 5 times are counted together
        rare = expected < 5
        observed = torch.cat([found[~rare].float(), found[rare].sum()[None].float()])
        wanted = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
        statistic = ((observed - wanted).square() / wanted.clamp(min=1.0)).sum().item()
        # the 99.99 % quantile for 6 degrees of freedom
        assert statistic < 27.9
        assert int((~rare).sum()) >= 3


@pytest.mark.parametrize("vocab", [3000, 3072])
def test_a_large_vocabulary_is_drawn_from_as_a_small_one(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block the same tokens as from all at once, up to rounding; never one without a probability."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2000, vocab, generator=generator)
    # whole blocks, the first and the last of the others' tokens
    logits[:, :1024] = logits[:, 1024] = logits[:, 2040:2050] = logits[:, -7:] = -torch.inf
    uniform = torch.rand(2000, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2.0**-24])
    token, logprob = hf._draw(logits, 0.7, uniform)
    torch.testing.assert_close(logprob, (logits / 0.7).log_softmax(-1).gather(-1, token[:, None])[:, 0])
    assert logprob.isfinite().all()
    monkeypatch.setattr(hf, "_BLOCK", vocab)
    whole, _ = hf._draw(logits, 0.7, uniform)
    assert int((token != whole).sum()) <= 2 and token[0] == whole[0] and len(whole.unique()) > 500


def test_a_cache_with_room_holds_what_one_without_does() -> None:
    """While it grows beyond its memory twice, and rows are dropped and doubled."""
    config = plain_model().config
    roomy, plain = make_cache(config), transformers.DynamicCache(config=config)
    assert all(type(layer) is RoomyLayer for layer in roomy.layers)
    rows, step = 4, torch.Generator().manual_seed(0)
    for t in range(120):
        new = torch.randn(2, rows, 2, 5 if t == 0 else 1, 6, generator=step)
        for layer in (0, 1):
            found = roomy.update(new[0] + layer, new[1], layer)
            for x, y in zip(found, plain.update(new[0] + layer, new[1], layer), strict=True):
                assert torch.equal(x, y)
        if t in (0, 3, 40, 90):
            kept = torch.tensor({0: [0, 0, 1, 2, 3, 3], 3: [5, 1, 1], 40: [2, 0, 1], 90: [1]}[t])
            rows = len(kept)
            for cache in (roomy, plain):
                cache.batch_select_indices(kept)
    assert roomy.get_seq_length() == 124


def test_completions_of_a_prompt_share_its_forward_pass() -> None:
    """The first pass has each prompt of a batch once, and the later ones a row for every completion."""
    engine, seen = engine_of(policy(plain_model())), []
    engine._model.register_forward_pre_hook(
        lambda _model, _args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    engine.generate([PROMPTS[0], PROMPTS[2], PROMPTS[0]], Sampling(1.0, 3, ()), [[1, 2, 3], [4, 5], [6]])
    assert seen == [(2, 8), (6, 1), (6, 1)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_weights_reach_every_layer_and_the_head(tied: bool) -> None:
    """After an update the engine scores and samples as the new policy, and its own copy leaves the policy alone."""
    old, new = plain_model(tied=tied, seed=0), plain_model(tied=tied, seed=1)
    engine = engine_of(policy(old))
    before = engine.score(PROMPTS[2:3])
    engine.update_weights(policy(new).state_dict().items(), 4)
    assert engine.version == 4
    expected = plain_logprobs(new, PROMPTS[2])[torch.arange(7), PROMPTS[2][1:]]
    torch.testing.assert_close(torch.tensor(engine.score(PROMPTS[2:3])[0]), expected, rtol=0, atol=1e-5)
    assert before != engine.score(PROMPTS[2:3])
    ((greedy,),) = engine.generate(PROMPTS[:1], Sampling(0.0, 5, ()), [[0]])
    ((fresh,),) = engine_of(new).generate(PROMPTS[:1], Sampling(0.0, 5, ()), [[0]])
    assert greedy.token_ids == fresh.token_ids
    assert greedy.version == 4


def test_engine_keeps_its_weights_until_told() -> None:
    """Training the policy does not change what the engine samples from."""
    trained = policy(plain_model())
    engine = engine_of(trained)
    before = engine.score(PROMPTS[:1])
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(1.5)
    assert engine.score(PROMPTS[:1]) == before


def test_score() -> None:
    """One number a token after the first, for sequences of unlike lengths."""
    model, sequences = plain_model(), [[5, 6], [3, 4, 5, 6, 7, 8], [9, 8, 7]]
    for ids, row in zip(sequences, engine_of(model).score(sequences), strict=True):
        expected = plain_logprobs(model, ids)[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(row), expected, rtol=0, atol=1e-5)


def test_unknown_weight_and_empty_prompt_are_errors() -> None:
    """A tensor the model lacks, or a prompt with nothing to condition on."""
    engine = engine_of(plain_model())
    with pytest.raises(KeyError):
        engine.update_weights([("model.nothing.weight", torch.zeros(1))], 1)
    with pytest.raises(ValueError, match="at least one token"):
        engine.generate([[]], Sampling(1.0, 4, ()), [[0]])
    assert VOCAB > max(STOPS)

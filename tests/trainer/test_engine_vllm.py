"""The vLLM engine answers exactly: log-probabilities, samples, stops, and all of it after weight updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from srft.engine import vllm as client
from srft.engine.base import Sampling
from srft.engine.vllm import VllmEngine
from tests.trainer.many_syncs import many_syncs
from tests.trainer.tiny_vllm import EOS, MAX_LEN, VOCAB, assert_gone, save_model, start, tiny_model

pytestmark = pytest.mark.vllm

LAUNCHER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK"}
# fp32 in both, in another order of sums
FP32_BOUND = 1e-4


def expected_logprobs(
    model: transformers.PreTrainedModel, token_ids: list[int], temperature: float = 1.0
) -> Tensor:
    """[len-1] log-probability of each token but the first, from a plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0].float() / temperature
    return logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def score_error(model: transformers.PreTrainedModel, engine: VllmEngine) -> float:
    """Largest difference between the engine's scores and a plain forward."""
    scores = engine.score(SEQUENCES)
    return max(
        (expected_logprobs(model, sequence) - torch.tensor(row)).abs().max().item()
        for sequence, row in zip(SEQUENCES, scores, strict=True)
    )


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SEQUENCES = [random_tokens(count, seed=count) for count in (2, 17, 140, MAX_LEN - 1)]
PROMPTS = [random_tokens(17, seed=17), random_tokens(140, seed=140), random_tokens(1, seed=2)]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[transformers.PreTrainedModel, VllmEngine]]:
    """An fp32 engine with a tokenizer, started under a launcher's environment, and the model it serves.

    That is tied, whose updates are the harder ones. An untied one is served in bf16 below, and in whole runs.
    """
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(tied=True, seed=0)
    save_model(model, folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER_VARIABLES:
            patch.setenv(name, "3")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        engine = start(folder, num_threads=2, tokenizer=tokenizer)
    yield model, engine
    engine.close()


def test_child_environment_has_no_launcher_variables(served: tuple) -> None:
    """The child inherits nothing by which torch.distributed could find the trainer's group."""
    environment = Path(f"/proc/{served[1].pid}/environ").read_bytes().decode().split("\0")
    names = {line.split("=")[0] for line in environment}
    assert not names & LAUNCHER_VARIABLES
    assert "OMP_NUM_THREADS=2" in environment


def test_score_equals_forward(served: tuple) -> None:
    """Scores are the log-softmax of a plain fp32 forward; one token has none."""
    model, engine = served
    assert score_error(model, engine) < FP32_BOUND
    # a prefix that a rollout left in the cache hides no token
    engine.generate(SEQUENCES[:3], Sampling(1.0, 4, ()), [[1], [1], [1]])
    assert score_error(model, engine) < FP32_BOUND
    assert engine.score([[3], [3, 4]])[0] == []


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0], ids=lambda t: f"T{t}")
def test_completions_carry_their_logprobs(served: tuple, temperature: float) -> None:
    """Each log-probability is under softmax(logits / temperature), and of softmax(logits) when greedy."""
    model, engine = served
    sampling = Sampling(temperature, max_new_tokens=20, stop_token_ids=(EOS, 9))
    seeds = [[1, 2, 3], [], [2**63 - 1, 7]]
    groups = engine.generate(PROMPTS, sampling, seeds)
    assert [len(group) for group in groups] == [3, 0, 2]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = expected_logprobs(model, prompt + completion.token_ids, temperature or 1.0)
            expected = expected[-len(completion.token_ids) :]
            assert (expected - torch.tensor(completion.logprobs)).abs().max() < FP32_BOUND
            assert completion.version == engine.version
    if temperature == 0:
        first = groups[0][0].token_ids
        with torch.no_grad():
            best = model(torch.tensor([PROMPTS[0] + first])).logits[0].argmax(-1)
        assert first == best[len(PROMPTS[0]) - 1 : -1].tolist()


def test_same_seeds_same_completions(served: tuple) -> None:
    """A completion depends on its own seed alone, not on the call or its neighbours."""
    engine = served[1]
    sampling = Sampling(1.0, max_new_tokens=16, stop_token_ids=(EOS,))
    together = engine.generate(PROMPTS[:2], sampling, [[11, 12, 13], [11, 15]])
    assert engine.generate(PROMPTS[:2], sampling, [[11, 12, 13], [11, 15]]) == together
    alone = engine.generate([PROMPTS[0]], sampling, [[13]])
    assert alone[0][0].token_ids == together[0][2].token_ids
    assert together[0][0].token_ids != together[0][1].token_ids


def test_each_completion_is_told_as_it_ends(served: tuple) -> None:
    """By its place, the shorter ones first; and nothing of a call that asks for no telling."""
    engine, sampling, seeds = served[1], Sampling(1.0, 30, (EOS, 9)), [[11, 12, 13], [], [11, 15, 16]]
    told: list[tuple[int, int, list[int]]] = []
    drawn = engine.generate(PROMPTS, sampling, seeds, lambda p, k, ids: told.append((p, k, ids)))
    assert sorted(told) == [(p, k, c.token_ids) for p, row in enumerate(drawn) for k, c in enumerate(row)]
    assert len({len(ids) for _, _, ids in told}) > 1
    assert engine.generate(PROMPTS, sampling, seeds) == drawn and len(told) == 6


def test_a_long_prompt_leaves_less_room(served: tuple) -> None:
    """Its completions end where the model does, and say that they were cut."""
    prompts = [random_tokens(MAX_LEN - room, seed=room) for room in (1, 3, 50)]
    drawn = served[1].generate(prompts, Sampling(1.0, 4, ()), [[1]] * 3)
    assert [(len(c.token_ids), c.finish) for (c,) in drawn] == [(1, "length"), (3, "length"), (4, "length")]


def test_samples_follow_the_distribution(served: tuple) -> None:
    """Frequencies over 2000 seeds match softmax(logits / T): no top-k, no penalty, no other temperature.

    The batch has more prompt tokens than one step takes, on which vLLM on CPU fails if it may cut prompts.
    """
    model, engine = served
    count, temperature = 2000, 1.5
    groups = engine.generate(PROMPTS[:1], Sampling(temperature, 1, ()), [list(range(count))])
    drawn = torch.bincount(torch.tensor([c.token_ids[0] for c in groups[0]]), minlength=VOCAB) / count
    with torch.no_grad():
        expected = (model(torch.tensor(PROMPTS[:1])).logits[0, -1] / temperature).softmax(-1)
    # half as much again as the mean total variation of a sample of this size, many standard deviations off
    bound = 1.5 * (expected * (1 - expected) / (2 * torch.pi * count)).sqrt().sum()
    assert (drawn - expected).abs().sum() / 2 < bound < 0.15


def test_only_given_tokens_stop(served: tuple) -> None:
    """A stop token ends a completion and stays in it; the model's own EOS does not stop by itself."""
    engine = served[1]
    seeds = [list(range(64))]
    free = engine.generate(PROMPTS[:1], Sampling(1.5, 30, ()), seeds)[0]
    assert all(c.finish == "length" and len(c.token_ids) == len(c.logprobs) == 30 for c in free)
    assert any(EOS in c.token_ids[:-1] for c in free)
    for whole, cut in zip(
        free, engine.generate(PROMPTS[:1], Sampling(1.5, 30, (EOS, 9)), seeds)[0], strict=True
    ):
        ends = [i for i, token in enumerate(whole.token_ids) if token in (EOS, 9)]
        assert cut.token_ids == (whole.token_ids[: ends[0] + 1] if ends else whole.token_ids)
        assert len(cut.logprobs) == len(cut.token_ids)
        assert cut.finish == ("stop" if ends else "length")
    # a stop token on the last permitted position stops
    (last,) = engine.generate(PROMPTS[:1], Sampling(0.0, 1, tuple(range(VOCAB))), [[0]])[0]
    assert last.finish == "stop" and len(last.token_ids) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.5], ids=lambda t: f"T{t}")
def test_nothing_ends_before_the_least_number_of_tokens(served: tuple, temperature: float) -> None:
    """Stop tokens are not drawn among them, and log-probabilities are of the other tokens alone, as those of hf are."""
    model, engine = served
    ends = (EOS, *range(9, 40))
    (found,) = engine.generate(PROMPTS[:1], Sampling(temperature, 12, ends, (), 5), [list(range(32))])
    lost = 0.0
    for c in found:
        assert len(c.token_ids) > 5 and not set(c.token_ids[:5]) & set(ends)
        assert (c.token_ids[-1] in ends) == (c.finish == "stop")
        with torch.no_grad():
            every = model(torch.tensor([PROMPTS[0] + c.token_ids])).logits[0, len(PROMPTS[0]) - 1 : -1].float()
        every = (every / (temperature or 1.0)).log_softmax(-1)
        places = torch.arange(len(c.token_ids)), torch.tensor(c.token_ids)
        own = every[places]
        every[:5, ends] = -torch.inf
        expected = every.log_softmax(-1)[places]
        assert (expected - torch.tensor(c.logprobs)).abs().max() < FP32_BOUND
        lost = max(lost, float((expected - own).max()))
    assert lost > 0.01
    assert temperature == 0 or min(len(c.token_ids) for c in found) == 6


def test_texts_that_may_not_end_yet(served: tuple) -> None:
    """What the first tokens complete is passed by; the next that is completed ends."""
    engine, seeds = served[1], [list(range(32))]
    (free,) = engine.generate(PROMPTS[:1], Sampling(1.5, 20, ()), seeds)
    ends = {c.token_ids[i] for c in free[:4] for i in (2, 7, 12)}
    texts = tuple(f"w{i}" for i in ends)
    tokenizer = transformers.AutoTokenizer.from_pretrained(engine.model_dir)
    (found,) = engine.generate(PROMPTS[:1], Sampling(1.5, 20, (), texts, 6), seeds)
    early = 0
    for whole, cut in zip(free, found, strict=True):
        if EOS in whole.token_ids[:6]:
            # which vLLM does not draw there although it ends nothing
            continue
        begun = [tokenizer.decode(whole.token_ids[:n], skip_special_tokens=True) for n in range(21)]
        new = (n for n in range(7, 21) if any(t in begun[n][max(0, len(begun[6]) - len(t) + 1) :] for t in texts))
        assert cut.token_ids == whole.token_ids[: next(new, 20)]
        early += any(t in begun[6] for t in texts)
    assert early


def test_texts_stop(served: tuple) -> None:
    """A completion is the free one up to the token that completes a stop text, or a stop token, whichever is first."""
    engine, seeds = served[1], [list(range(64))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(engine.model_dir)

    def text(token_ids: list[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    free = engine.generate(PROMPTS[:1], Sampling(1.5, 30, ()), seeds)[0]
    # one text of two tokens, one that ends within a token
    stops = (text(free[0].token_ids[3:5]), text(free[1].token_ids[6:8])[:-1])
    found = engine.generate(PROMPTS[:1], Sampling(1.5, 30, (9,), stops), seeds)[0]
    kinds = set()
    for whole, cut in zip(free, found, strict=True):
        begun = [text(whole.token_ids[:n]) for n in range(1, 31)]
        by_text = next((n for n, said in enumerate(begun, 1) if any(stop in said for stop in stops)), 31)
        by_token = (whole.token_ids.index(9) + 1) if 9 in whole.token_ids else 31
        count = min(by_text, by_token)
        assert cut.token_ids == whole.token_ids[:count]
        assert len(cut.logprobs) == len(cut.token_ids)
        assert cut.finish == ("stop" if count < 31 else "length")
        kinds.add("length" if count == 31 else "text" if by_text < by_token else "token")
    assert kinds == {"length", "text", "token"}


@pytest.mark.parametrize("source", ["parameters", "state-dict", "float64", "many-files"])
def test_update_is_exact(served: tuple, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update, scores and completions are those of the new weights, head and prefix cache included.

    Without ``_repack_heads`` in the worker, the cases that do not send the head by its own name fail.
    """
    model, engine = served
    sampling = Sampling(1.0, 8, ())
    engine.generate(PROMPTS[:2], sampling, [[1], [2]])
    before = engine.score(SEQUENCES[:1])
    version = engine.version + 1
    model.load_state_dict(tiny_model(tied=True, seed=version).state_dict())
    tensors = model.named_parameters()
    if source == "state-dict":
        tensors = model.state_dict().items()
    if source == "float64":
        # strided, too
        tensors = ((name, t.double().mT.contiguous().mT if t.ndim == 2 else t) for name, t in tensors)
    if source == "many-files":
        monkeypatch.setattr(client, "_FILE_BYTES", 10_000)
    engine.update_weights(tensors, version)
    assert engine.version == version
    assert abs(engine.score(SEQUENCES[:1])[0][0] - before[0][0]) > 0.01
    assert score_error(model, engine) < FP32_BOUND
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS[:2], sampling, [[1], [2]]), strict=False):
        expected = expected_logprobs(model, prompt + group[0].token_ids)[-8:]
        assert (expected - torch.tensor(group[0].logprobs)).abs().max() < FP32_BOUND
        assert group[0].version == version
    assert not [path for folder in engine.folders for path in folder.iterdir()]


def test_many_syncs(served: tuple) -> None:
    """Each of twenty unlike policies is served: the canary lets all of them pass, within rounding in fp32."""
    model, engine = served
    version = engine.version
    seen = many_syncs(20, model, engine, "float32")
    assert seen.worst <= FP32_BOUND and engine.version == version + 20
    engine.update_weights(model.named_parameters(), version + 21)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate([[1]], Sampling(1.0, 4, ()), []), "one list per prompt"),
        (lambda e: e.generate([[1]], Sampling(0.001, 4, ()), [[1]]), "temperature must be 0 or in"),
        (lambda e: e.generate([[1]], Sampling(1.0, 0, ()), [[1]]), "max_new_tokens must be > 0"),
        (lambda e: e.generate([[1]], Sampling(1.0, 4, (), (), 5), [[1]]), r"min_new_tokens must be in \[0, max_new"),
        (lambda e: e.generate([[1]], Sampling(1.0, 4, ()), [[-1]]), "every seed must be in"),
        (lambda e: e.generate([[1] * MAX_LEN], Sampling(1.0, 4, ()), [[1]]), "1 to 191 tokens"),
        (lambda e: e.generate([[]], Sampling(1.0, 4, ()), [[1]]), "1 to 191 tokens"),
        (lambda e: e.generate([[VOCAB]], Sampling(1.0, 4, ()), [[1]]), "tokens must be in"),
        (lambda e: e.score([[1] * MAX_LEN]), "1 to 191 tokens"),
    ],
    ids=["seeds", "temperature", "no-room", "least", "negative-seed", "too-long", "empty", "vocabulary", "long-score"],
)
def test_bad_calls_are_refused(served: tuple, call: Callable[[VllmEngine], object], message: str) -> None:
    """What vLLM would cut, clamp or crash on is a ValueError, and the engine goes on."""
    with pytest.raises(ValueError, match=message):
        call(served[1])
    assert len(served[1].score([[1, 2]])[0]) == 1


def test_bfloat16_engine_follows_updates(tmp_path: Path) -> None:
    """One of an untied model, given fp32 weights, scores within bf16 error of them, ever again.

    Without a tokenizer it refuses stop texts, and a missing weight closes it.
    """
    engine = start(save_model(tiny_model(tied=False, seed=0), tmp_path), dtype="bfloat16")
    with pytest.raises(ValueError, match="stop texts need the engine's tokenizer"):
        engine.generate(PROMPTS[:1], Sampling(1.5, 30, (), ("x",)), [[1]])
    model = tiny_model(tied=False, seed=1)
    engine.update_weights(model.named_parameters(), 1)
    assert score_error(model, engine) < 0.3
    assert score_error(tiny_model(tied=False, seed=0), engine) > 1.0
    many_syncs(10, model, engine, "bfloat16")
    kept = [(name, tensor) for name, tensor in model.named_parameters() if "norm" not in name]
    with pytest.raises(RuntimeError, match="lacks .*model.norm.weight"):
        engine.update_weights(kept, 12)
    with pytest.raises(RuntimeError, match="engine is closed"):
        engine.score([[1, 2]])
    assert engine.version == 11
    assert_gone(engine.pid)

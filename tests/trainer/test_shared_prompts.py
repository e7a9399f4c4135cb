"""A prompt is computed once for all its sequences in a micro-batch, and nothing that is learned changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from srft.batch import Batch, pack, shared_cost
from srft.learning import accumulate, learn
from srft.methods import assign_advantages
from srft.policy import attention, prefixes, proof
from srft.policy.exchange import assignment, numbered_prompts
from srft.policy.forwards import packed_forward
from srft.policy.model import allow_sharing
from srft.policy.optimizer import make_optimizer
from srft.policy.prefixes import PaddedPrefixes, Prefixes, prefixes_of, select_repeated
from srft.policy.proof import prove
from srft.responses import Response
from tests.trainer.architectures import build
from tests.trainer.flash_stand_ins import MODULES, attend
from tests.trainer.layout_ranks import without_casts
from tests.trainer.runs import train
from tests.trainer.test_selftest import BOTH, prepared, run_config
from tests.trainer.tiny import (
    CPU,
    flat_gradient,
    learner_of,
    members,
    plain_model,
    policy,
    random_groups,
    relative_error,
    sequence,
    tiny_config,
)

TOKENS = st.lists(st.integers(2, 9), min_size=1, max_size=7)
GROUPS = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=5)), min_size=1, max_size=5)
# tokens of prompts, and of the responses to each: groups of one, equal ones, a long prompt, single tokens
SIZES = [(5, [3, 1, 3]), (1, [2, 2]), (4, [6]), (12, [1, 4, 2, 1]), (2, [1])]


def sequences_of(groups: list[tuple[list[int], list[list[int]]]]) -> list[Response]:
    return [sequence(list(prompt), response) for prompt, responses in groups for response in responses]


@given(GROUPS, st.integers(1, 60))
def test_every_sequence_reads_what_it_is(groups: list[tuple[list[int], list[list[int]]]], budget: int) -> None:
    """Token by token through the bounds; each prompt once a micro-batch, within the budget."""
    sequences = sequences_of(groups)
    batches = pack(sequences, budget, CPU, share_prompts=True)
    assert sorted(id(s) for b in batches for s in b.sequences) == sorted(map(id, sequences))
    for batch in batches:
        prompts = {tuple(s.prompt_ids) for s in batch.sequences}
        computed = sum(map(len, prompts)) + sum(len(s.response_ids) for s in batch.sequences)
        assert len(batch.input_ids) == len(batch.position_ids) == computed
        again = [shared_cost(len(s.prompt_ids)) for s in batch.sequences]
        once = [shared_cost(len(prompt)) for prompt in prompts]
        assert computed + sum(again) - sum(once) <= budget or len(batch.sequences) == 1
        assert batch.max_seqlen == max(map(len, batch.sequences)) == int(batch.cu_seqlens_k.diff().max())
        assert (batch.cu_seqlens_k is batch.cu_seqlens) == (len(prompts) == len(batch.sequences))
        shared = prefixes_of(batch.cu_seqlens, batch.cu_seqlens_k)
        read, places = batch.input_ids, batch.position_ids
        if shared is not None:
            read, places = shared.joined(read, places)
        lengths = list(map(len, batch.sequences))
        assert [x.tolist() for x in read.split(lengths)] == [s.prompt_ids + s.response_ids for s in batch.sequences]
        assert [x.tolist() for x in places.split(lengths)] == [list(range(n)) for n in lengths]
        for s, place in batch.responses():
            at = batch.loss_rows[place]
            assert batch.input_ids[at].tolist() == (s.prompt_ids + s.response_ids)[len(s.prompt_ids) - 1 : -1]
            assert batch.position_ids[at].tolist() == list(range(len(s.prompt_ids) - 1, len(s) - 1))


def test_groups_stay_together_and_one_that_is_too_large_is_split() -> None:
    """By hand: 10 + 3·4 tokens and 2·2 for keys held again; then the prompt twice."""
    sequences = sequences_of([([7] * 10, [[2] * 4, [3] * 4, [4] * 4]), ([8], [[5] * 9])])
    assert [len(b.input_ids) for b in pack(sequences, 26, CPU, share_prompts=True)] == [22, 10]
    assert [len(b.input_ids) for b in pack(sequences, 25, CPU, share_prompts=True)] == [18 + 0, 14 + 10]
    assert [len(b.input_ids) for b in pack(sequences, 36, CPU, share_prompts=True)] == [32]
    assert [len(b.input_ids) for b in pack(sequences, 36, CPU)] == [28, 24]


def test_a_conversation_shares_its_prompt_too() -> None:
    """Of turns that were said to the policy nothing is learned, the first turn's first token is read off the prompt."""
    said = Response([5, 6], [2, 3, 4, 7], False, False, [], "", spans=[2, 1, 1])
    (batch,) = pack([said, sequence([5, 6], [9])], 20, CPU, share_prompts=True)
    assert batch.input_ids.tolist() == [5, 6, 2, 3, 4, 7, 9]
    assert batch.loss_rows.tolist() == [1, 2, 4, 1] and batch.labels.tolist() == [2, 3, 7, 9]


def shared_row(sizes: list[tuple[int, list[int]]]) -> Prefixes:
    """Bounds of a packed row of groups whose prompts and responses have these lengths."""
    reads = [(prompt * (i > 0), prompt + n) for prompt, responses in sizes for i, n in enumerate(responses)]
    own = torch.tensor([0, *(n - shared for shared, n in reads)]).cumsum(0).int()
    found = prefixes_of(own, torch.tensor([0, *(n for _, n in reads)]).cumsum(0).int())
    assert found is not None
    return found


def repeated(row: Prefixes) -> tuple[Tensor, Tensor]:
    """Which token of the row each sequence reads, one after the other, and where its own stand in that: by loops."""
    read: list[int] = []
    own: list[int] = []
    bounds = row.cu_seqlens.tolist()
    begin = 0
    for first, last, width in zip(bounds, bounds[1:], row.cu_seqlens_k.diff().tolist(), strict=False):
        shared = width - (last - first)
        begin = begin if shared else first
        own += range(len(read) + shared, len(read) + width)
        read += [*range(begin, begin + shared), *range(first, last)]
    return torch.tensor(read), torch.tensor(own)


def tensors(row: Prefixes, value_width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2."""
    total = int(row.cu_seqlens[-1])
    shapes = (4, 8), (2, 8), (2, value_width)
    return [torch.randn(1, heads, total, n, dtype=dtype, requires_grad=True) for heads, n in shapes]


def expected_of(row: Prefixes, inputs: list[Tensor], left: int | None, softcap: float, sinks: Tensor | None) -> Tensor:
    """Every sequence with a copy of its prompt, in plain attention."""
    read, own = repeated(row)
    q, k, v = (x[0].transpose(0, 1)[read] for x in inputs)
    return attend(q, k, v, row.cu_seqlens_k, 0.3, left, softcap, sinks)[own]


def assert_same(actual: Tensor, expected: Tensor, leaves: list[Tensor], bound: float) -> None:
    """Values and gradients, of leaves of size 1; where a token sees itself alone, gradients of queries are 0."""
    direction = torch.randn(expected.shape, dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad((y * direction).sum(), leaves) for y in (actual, expected))
    for one, other in zip([actual.detach(), *ours], [expected.detach(), *theirs], strict=True):
        assert float((one - other).abs().max()) <= bound * max(1.0, float(other.abs().max()))


LENGTHS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=40)
@given(LENGTHS, st.sampled_from([None, 1, 4, 17]), st.booleans(), st.booleans())
def test_by_length_equals_copies_of_the_prompt(
    sizes: list[tuple[int, list[int]]], window: int | None, capped: bool, with_sinks: bool
) -> None:
    """Output and gradients in float64, for any groups, windows that end within the prompt, caps and sinks."""
    # at the end a prompt that is filled up to one of more tokens than follow it
    row = shared_row([*sizes, (8, [2, 1]), (5, [1, 1])])
    inputs = tensors(row, 8, torch.float64)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    softcap = 1.5 if capped else None
    actual, _ = attention._packed_attention(
        "sdpa", torch.nn.Module(), *inputs, None, scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sinks,
        cu_seq_lens_q=row.cu_seqlens, cu_seq_lens_k=row.cu_seqlens_k, max_length_q=int(row.cu_seqlens_k.diff().max()),
    )  # fmt: skip
    left = None if window is None else window - 1
    expected = expected_of(row, inputs, left, softcap or 0.0, sinks)
    assert_same(actual[0], expected, [*inputs, *([sinks] if sinks is not None else [])], 1e-12)


def test_positions_alone_tell_what_is_shared() -> None:
    """Layers that hand on no bounds hand on positions."""
    row = shared_row(SIZES)
    read, own = repeated(row)
    widths = row.cu_seqlens_k.diff().tolist()
    positions = torch.cat([torch.arange(n) for n in widths])[own]
    cu_seqlens, cu_seqlens_k, longest = attention._bounds_of(positions[None])
    assert cu_seqlens.tolist() == row.cu_seqlens.tolist() and cu_seqlens_k.tolist() == row.cu_seqlens_k.tolist()
    assert longest == max(widths) and len(read) == sum(widths)


@pytest.mark.parametrize("value_width", [8, 6])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kernel", ["varlen", *MODULES])
def test_what_a_kernel_is_asked_for_is_the_same_attention(
    kernel: str, window: int | None, value_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries are the last of the keys' tokens, as each documents causal attention of fewer queries than keys."""
    row = shared_row(SIZES)
    inputs, longest = tensors(row, value_width, torch.float32), int(row.cu_seqlens_k.diff().max())
    if kernel == "varlen":

        def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
            assert max_q == max_k == longest and enable_gqa and len(k) == cu_k[-1] and len(q) == cu_q[-1]
            left = None if window_size[0] < 0 else window_size[0]
            return attend(q, k, v, cu_q, scale, left, 0.0, None, cu_k)

        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
        actual = attention._on_gpu(*inputs, 0.3, window, row.cu_seqlens, longest, row)
    else:
        monkeypatch.setitem(sys.modules, *MODULES[kernel])
        actual = attention._by_package(kernel, *inputs, 0.3, window, row.cu_seqlens, longest, None, None, row)
    expected = expected_of(row, inputs, None if window is None else window - 1, 0.0, None)
    assert_same(actual, expected, inputs, 1e-6)


def test_gradients_of_a_row_taken_often_are_added_up_in_fp32() -> None:
    """4,096 halves are 2,048 in bf16 too, which alone stops at 128: the next half rounds away."""
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    select_repeated(x, torch.zeros(4096, dtype=torch.int64)).backward(torch.full((4096, 3), 0.5, dtype=torch.bfloat16))
    assert x.grad is not None and x.grad.tolist() == [[2048.0] * 3, [0.0] * 3]


def logprobs_and_gradient(
    model: torch.nn.Module, batches: list[Batch], sequences: list[Response], weights: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of every token, and of their sum by these weights."""
    model.zero_grad()
    found: dict[int, Tensor] = {}
    for batch in batches:
        logprobs, _ = packed_forward(model, batch, next(model.parameters()).dtype)
        (logprobs * torch.cat([weights[id(s)] for s in batch.sequences])).sum().backward()
        found |= {id(s): logprobs[place].detach() for s, place in batch.responses()}
    return torch.cat([found[id(s)] for s in sequences]), flat_gradient(model)


EXACT = ("qwen2", "gpt2", "opt")
"""In float64 from end to end; the others' norms and rotary embeddings compute in fp32 whatever they are given."""


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, "model.attention=sdpa") for name in (*EXACT, "llama", "mistral-window", "gemma3", "gpt-oss")),
        ("qwen2", "model.gradient_checkpointing=true"),
    ],
)
def test_a_model_learns_the_same(name: str, option: str) -> None:
    """Log-probabilities and gradients in float64, in one micro-batch and in many, against a copy of each prompt."""
    model = policy(plain_model() if name == "qwen2" else build(name), option)
    model = (without_casts(model) if name == "qwen2" else model).double()
    if name == "gpt-oss":
        model.set_experts_implementation("eager")  # grouped products have no float64
    sequences = members(random_groups(6, rollouts=4))
    weights = {id(s): torch.randn(len(s.response_ids), dtype=torch.float64) for s in sequences}
    expected = logprobs_and_gradient(model, pack(sequences, 10_000, CPU), sequences, weights)
    for budget in (10_000, 60):
        batches = pack(sequences, budget, CPU, share_prompts=True)
        assert sum(len(b.input_ids) for b in batches) < 0.8 * sum(map(len, sequences))
        actual = logprobs_and_gradient(model, batches, sequences, weights)
        for ours, theirs in zip(actual, expected, strict=True):
            assert relative_error(ours, theirs) <= (1e-12 if name in EXACT else 1e-6)


def test_a_step_is_the_same() -> None:
    """SRFT and its figures, with log-probabilities from before the step, in fp32."""
    found = {}
    for shares in (False, True):
        config = tiny_config("method.preset=official", "train.updates_per_step=2", "train.tokens_per_microbatch=60")
        model = policy(plain_model())
        allow_sharing(model, shares)
        learner = learner_of(config, model, make_optimizer(model, config))
        found[shares] = learn(learner, groups := random_groups(), 1)
        found[shares]["entropies"] = sum(s.entropy for s in members(groups))
    assert found[False].pop("tokens/shared") == 0 < found[True].pop("tokens/shared") < 1
    assert found[True] == pytest.approx(found[False], rel=1e-5, abs=1e-6)


def test_ranks_keep_groups_together_as_far_as_it_pays() -> None:
    """One rank has a prompt's sequences until it has its share; a group for two ranks is divided."""
    one, two = [(0, 100)] * 4, [(0, 100)] * 4 + [(1, 100)] * 4
    assert assignment([[110] * 4, [110] * 4], [one, one]) == [[0] * 4, [1] * 4]
    assert assignment([[110] * 8, []], [two, []]) == [[0] * 4 + [1] * 4, []]
    assert assignment([[110] * 4, []], [one, []]) == [[0, 1, 0, 1], []]
    assert assignment([[110] * 8, []]) == [[0, 1] * 4, []]
    sequences = [sequence([1, 2], [3]), sequence([5], [3]), sequence([1, 2], [4])]
    assert numbered_prompts(sequences, share=True) == [(0, 2), (1, 1), (0, 2)]
    assert numbered_prompts(sequences, share=False) == [(0, 0), (1, 0), (2, 0)]


def test_the_loss_of_routers_counts_a_token_for_each_reader() -> None:
    """Value, load and gradient of a whole update, in several micro-batches, by the weight that shows."""
    found = {}
    for shares in (False, True):
        config = tiny_config("model.router_aux_coef=0.5", "train.tokens_per_microbatch=60")
        model = policy(build("qwen2-moe"))
        allow_sharing(model, shares)
        learner = learner_of(config, model, make_optimizer(model, config))
        figures, count = accumulate(learner, assign_advantages(random_groups(), config.method), 1)
        assert count > 2
        found[shares] = figures["loss/router_aux"].value, flat_gradient(model)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    assert relative_error(found[True][1], found[False][1]) <= 2e-6


def test_the_proof_finds_a_router_s_loss_that_counts_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token once, however many read it."""
    monkeypatch.setattr(Prefixes, "readers", lambda row: torch.ones(int(row.cu_seqlens[-1]), dtype=torch.int64))
    said, shares = proved(build("mixtral"))
    assert not shares and ": its auxiliary loss of the router is then " in said


def proved(model: transformers.PreTrainedModel, *options: str) -> tuple[str, bool]:
    """What the proof says of sharing, and what holds from then on."""
    config = run_config(*options)
    ready = prepared(model, config)
    found = prove(ready, config)
    assert found.sharing in found.sentence() and found.sharing in found.table()
    return found.sharing, ready.srft_traits.shares_prompts


def test_the_proof_allows_it() -> None:
    """Where it is as exact as the rest, and where a prompt has several sequences; beside the loss of routers too."""
    assert proved(plain_model(), BOTH) == ("The prompt of a group is computed once.", True)
    assert proved(plain_model(), "method.name=sft") == ("", False)
    assert proved(build("mixtral"))[1]


def misplaced(self: PaddedPrefixes, tokens: int, window: int | None) -> Tensor:
    """As a kernel that takes the first query for the first key's."""
    keys = self.rows.shape[1] + tokens
    return torch.ones(tokens, keys, dtype=torch.bool).tril().expand(1, 1, tokens, keys)


@pytest.mark.parametrize(("broken", "says"), [("visible", "log-probabilities in float32"), ("select", "gradients")])
def test_what_fails_with_shared_prompts_alone_is_trained_without(
    broken: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong mask, and gradients that are not added up: said with the reason, and off; the model is not refused."""
    if broken == "visible":
        monkeypatch.setattr(PaddedPrefixes, "visible", misplaced)
    else:
        monkeypatch.setattr(prefixes, "select_repeated", lambda x, index: x[index].detach())
    said, shares = proved(plain_model())
    assert not shares and said.startswith("A prompt is computed for each of its sequences, not once for all: its ")
    assert says in said and "\n" not in said


def test_an_exception_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a layer that wants as many keys as queries."""
    monkeypatch.setattr(Prefixes, "padded", lambda *_: [][0])
    said, shares = proved(plain_model())
    assert not shares and "its forward fails with IndexError: list index out of range" in said


def test_a_run_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of a run from the prompts up, the policy's copy as reference, with and without."""
    found = []
    for name in ("with", "without"):
        folder = train(tmp_path, name=name, train__steps=3, method__name="grpo", method__kl_coef=0.1, data__limit=8)
        found.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        monkeypatch.setattr(proof, "_allow_sharing", lambda *_: "")
    shared, alone = found
    assert all(a["tokens/shared"] == 0 < s["tokens/shared"] for s, a in zip(shared[1:], alone[1:], strict=True))
    for s, a in zip(shared[1:], alone[1:], strict=True):
        keys = [key for key in a if key.startswith(("loss/", "entropy/", "kl/", "grad_norm", "reward/mean", "ratio/"))]
        assert len(keys) > 5
        assert {key: s[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=1e-4, abs=1e-6)

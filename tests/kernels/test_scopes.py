"""Coefficients that a sequence or the batch decides: every sweep that can know them gives the same result."""

import pytest
import torch

import srft_kernels
from srft_kernels import reference
from srft_kernels.head import chunks as chunked_head
from srft_kernels.head import loss as known_loss
from srft_kernels.head import sweep
from srft_kernels.head.sweep import When
from srft_kernels.rows import gpu as row_kernels
from tests.kernels.cases import assert_matches_reference, case_id, grpo, make_case, policy, run, srft, token_loss
from tests.numerics import assert_accurate

# 16 rows fit in a workspace of no bytes: sequences of 60, 30, 9, 31 rows are 4, 2, 1 and 2 chunks
BOUNDS = torch.tensor([0, 60, 90, 90, 99, 130], dtype=torch.int32)
# every token has a weight: those of the sequence that waits are demonstrations, which by default have none
GSPO = {"policy": "gspo", "policy_weights": torch.linspace(0.01, 0.04, 130)}
RATIO_OF_A_SEQUENCE = {**GSPO, "sft_weights": None, "sft_entropy_coefs": None}
RATIO_AND_KL = {**RATIO_OF_A_SEQUENCE, "kl_weights": torch.full((130,), 0.03), "with_ref": True}
SCOPES = [
    (srft, {"entropy_scope": "sequence"}),
    (srft, {"entropy_scope": "batch"}),
    (srft, {"entropy_scope": "batch", "self_rollout": "ratio", "off_policy": True, "sft_entropy_sign": 1}),
    (srft, {"entropy_scope": "sequence", "demo_gamma": 0.1, "everything": True, "temperature": 0.7}),
    (srft, {"entropy_scope": "batch", "logit_softcap": 3.0}),
    (srft, {"preset": "upt"}),
    (srft, {"preset": "upt", "entropy_scope": "batch"}),
    (grpo, {"loss_type": "gspo"}),
    (grpo, {"loss_type": "gspo", "kl_coef": 0.3, "with_ref": True, "clip_low": 0.05}),
    (grpo, {"loss_type": "gspo", "everything": True}),
    (token_loss, {"entropy_scope": "sequence"}),
    (token_loss, {"entropy_scope": "batch", "policy": "cispo", "temperature": 0.7}),
    (token_loss, {**GSPO, "sft_entropy_coefs": None, "policy_prob_factor": "p"}),
    (token_loss, RATIO_OF_A_SEQUENCE),
    (token_loss, RATIO_AND_KL),
    (token_loss, {**RATIO_OF_A_SEQUENCE, "shaped_weights": torch.linspace(-0.02, 0.02, 130), "shaping_gamma": 0.1}),
    (token_loss, {**GSPO, "everything": True}),
    (token_loss, {**GSPO, "entropy_scope": "batch", "batch_entropy": 0.8}),
    (policy, {}),
]
scopes = pytest.mark.parametrize(
    ("op", "options"), SCOPES, ids=lambda x: x.__name__ if callable(x) else case_id(x)
)


def long_case(dtype=torch.float32, ignored=0.2, **options):
    """130 tokens whose first sequence takes four chunks, with classes that change between sequences."""
    case = make_case((130, 97, 24), dtype, ignored=ignored, seed=3, **options)
    case.cu_seqlens = BOUNDS
    sequence = torch.searchsorted(BOUNDS[1:-1].contiguous(), torch.arange(130), right=True)
    case.is_demo, case.is_correct = sequence % 2 == 0, sequence % 4 == 1
    return case


def with_ref(case, options):
    """The options, their vectors cut to its tokens and beside them, with its ref_logprobs where they are asked for."""

    def of_case(x):
        return x[: len(case.labels)].to(case.labels.device) if isinstance(x, torch.Tensor) else x

    options = {name: of_case(x) for name, x in options.items()}
    if options.pop("with_ref", False):
        options["ref_logprobs"] = case.ref_logprobs
    return options


@pytest.fixture
def sweeps(monkeypatch):
    """Chunks of 16 rows, of which three may wait; when coefficients were known, and whether those of several chunks."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(sweep, "DEFERRED_CHUNKS", 3)
    seen, visits = set(), sweep._visits

    def watched(unit, when):
        seen.add((when, len(unit) > 1))
        return visits(unit, when)

    monkeypatch.setattr(sweep, "_visits", watched)
    return seen


@scopes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("budget", [0, 2**31], ids=["stats-first", "deferred"])
def test_matches_reference(op, options, dtype, budget, sweeps, monkeypatch):
    """Every scope over chunks of 16 rows, with and without room for weight gradients that wait."""
    monkeypatch.setattr(known_loss, "CPU_DEFERRED_BYTES", budget)
    # without ignored rows the chunks are where BOUNDS says
    case = long_case(dtype, ignored=0.0)
    assert_matches_reference(op, case, **with_ref(case, options))
    entropy_grad = op is policy or options.get("preset") == "upt" or bool(options.get("everything") and op is grpo)
    # the Triton path keeps dead rows: two parts would cost as much as a second projection
    one_part = options == {"loss_type": "gspo"} or options is RATIO_OF_A_SEQUENCE
    # a factor with a coefficient of its own for each token is no scalar of a sequence, unless H is given
    own_factors = op is token_loss and not {"sft_entropy_coefs", "batch_entropy"} & options.keys()
    waits = (not row_kernels.INTERPRETED or one_part) and not own_factors
    assert ((When.DEFERRED, True) in sweeps) == (budget > 0 and not entropy_grad and waits)
    assert (When.SEEN, True) in sweeps or options.get("entropy_scope") == "batch"


@scopes
def test_ignored_rows_and_no_bias(op, options, sweeps):
    """The same with ignored tokens, also at the edges of sequences, and without a bias."""
    case = long_case(bias=False)
    assert_matches_reference(op, case, **with_ref(case, options))


@pytest.mark.parametrize(
    ("op", "options"), [(grpo, {"loss_type": "gspo"}), (token_loss, RATIO_OF_A_SEQUENCE)], ids=["grpo", "token_loss"]
)
def test_a_waiting_ratio_moves_with_some_tokens(op, options, sweeps):
    """A label that policy and sampler rule out is in the mean log-ratio of its sequence, and has no gradient of it."""
    case = long_case(ignored=0.0)
    out = torch.arange(130) % 9 == 4
    case.bias[5] = -torch.inf
    case.labels = torch.where(out, 5, torch.where(case.labels == 5, 6, case.labels))
    case.old_logprobs = case.old_logprobs.masked_fill(out, -torch.inf)
    assert_matches_reference(op, case, **options)
    assert (When.DEFERRED, True) in sweeps


def test_a_row_whose_terms_cancel_is_held_to_their_noise(monkeypatch):
    """Where KL and policy term leave 1 % of each other, two last places of a log-probability are no fault, 20 are."""
    case = long_case(scale=3.0, ignored=0.0)
    options, row = with_ref(case, RATIO_AND_KL), 35
    gold, baseline = (run(token_loss, reference, case.to(dtype), **options) for dtype in (torch.float64, torch.float32))
    size = gold["dhidden"].square().mean(1).sqrt()
    # 1 ulp is 2^-20 here
    assert size[row] < 2e-3 * size.square().mean().sqrt() and 8 < -gold["logprobs"][row] < 16
    plain = reference.streams.token_statistics

    def gradient(ulps):
        def off(*inputs, **options):
            logprobs, entropy = plain(*inputs, **options)
            return logprobs + 2.0**-20 * ulps * (torch.arange(130) == row), entropy

        monkeypatch.setattr(reference.streams, "token_statistics", off)
        return run(token_loss, reference, case, **options)["dhidden"]

    for ulps in (-2, -1, 1, 2):
        assert_accurate("dhidden", gradient(ulps), gold["dhidden"], baseline["dhidden"], gradient=True)
    for ulps in (-20, 20):
        with pytest.raises(AssertionError, match=f"row {row} "):
            assert_accurate("dhidden", gradient(ulps), gold["dhidden"], baseline["dhidden"], gradient=True)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_part_of_a_deferred_unit(frozen, sweeps):
    """A frozen weight needs no waiting gradient; frozen hidden states leave the others unchanged."""
    case = long_case(ignored=0.0)
    names, grads = ("hidden", "weight", "bias"), []
    for leaves in (set(names), set(names) - {frozen}):
        copies = {name: getattr(case, name).clone().requires_grad_(name in leaves) for name in names}
        srft_kernels.linear_srft_loss(
            copies["hidden"], copies["weight"], case.labels, case.advantages, is_demo=case.is_demo,
            is_correct=case.is_correct, cu_seqlens=BOUNDS, bias=copies["bias"],
        ).loss.backward()  # fmt: skip
        grads.append({name: x.grad for name, x in copies.items()})
    assert grads[1][frozen] is None and (When.DEFERRED, True) in sweeps
    for name in set(names) - {frozen}:
        assert torch.equal(grads[0][name], grads[1][name])


@pytest.mark.parametrize("limit", [7, 16, 40, 200])
@pytest.mark.parametrize("even", [True, False], ids=["even", "full"])
def test_units_cover_every_row_once(limit, even):
    """Chunks are at most ``limit`` rows, in order, and split no sequence that would fit."""
    bounds, sizes = BOUNDS.tolist(), chunked_head.Chunking(limit, limit + limit // 2, not even, even)
    for scope in ("token", "sequence", "batch"):
        units = sweep._units(scope, bounds, 130, sizes)
        rows = [row for unit in units for chunk in unit for row in range(chunk.start, chunk.stop)]
        assert rows == list(range(130))
        assert all(chunk.stop - chunk.start <= limit for unit in units for chunk in unit)
        if scope == "sequence":
            assert all(unit[0].start in bounds and unit[-1].stop in bounds for unit in units)
            assert all(len(unit) == 1 or unit[-1].stop - unit[0].start > limit for unit in units)
    assert sweep._units("batch", None, 0, sizes) == sweep._units("token", None, 0, sizes) == []

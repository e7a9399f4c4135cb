"""Each wrong argument raises a ValueError that names it, from the op and from the reference alike."""

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import srft_kernels
from srft_kernels import LoraDelta, _checks, reference
from tests.kernels.cases import cross_entropy, each_op, grpo, logprobs, make_case, policy, run, srft, token_loss

CASE = make_case((8, 11, 4))
MODULES = pytest.mark.parametrize("module", [srft_kernels, reference], ids=["op", "reference"])


class FakeDTensor(torch.Tensor):
    """A tensor that looks like a DTensor."""

    def full_tensor(self):
        """Never called."""


@MODULES
@each_op
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": CASE.hidden[None]}, r"hidden_states must be \[N, D\], got \[1, 8, 4\]"),
        ({"hidden": CASE.hidden.long()}, "hidden_states must be bf16, fp16, fp32 or fp64, got torch.int64"),
        ({"weight": CASE.weight.t()}, r"lm_head_weight must be \[V, D\] .*D=4, got \[4, 11\]"),
        ({"weight": CASE.weight.double()}, "lm_head_weight must have the dtype of hidden_states"),
        ({"weight": CASE.weight.to("meta")}, "lm_head_weight must be on the device"),
        ({"weight": CASE.weight.as_subclass(FakeDTensor)}, "got a DTensor; call the op through FusedLMHead"),
        ({"labels": CASE.labels[:-1]}, r"labels must be \[N\]=\[8\], got \[7\]"),
        ({"labels": CASE.labels.int()}, "labels must be int64, got torch.int32"),
        ({"labels": CASE.labels.tolist()}, "labels must be a tensor, got list"),
        ({"labels": CASE.labels.clone().fill_(11)}, r"labels must be in \[0, V=11\) or ignore_index=-100, got 11"),
        ({"labels": CASE.labels.clone().fill_(-1)}, r"labels must be in \[0, V=11\) or ignore_index=-100, got -1"),
        ({"bias": CASE.bias[:-1]}, r"bias must be floating point \[V\]=\[11\]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_head_arguments(module, op, changes, message):
    """Rank, shape, dtype, device and kind of the tensors that every op shares."""
    with pytest.raises(ValueError, match=message):
        op(module, replace(CASE, **changes))


@MODULES
@each_op
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number > 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"temperature": torch.zeros(8)}, "temperature must be > 0"),
        ({"temperature": torch.ones(7)}, r"temperature must be a float or \[N\]=\[8\], got \[7\]"),
        ({"logit_softcap": -1.0}, "logit_softcap must be a number > 0"),
        ({"logit_scale": 0.0}, "logit_scale must be a number > 0, got 0.0"),
        ({"logit_scale": None}, "logit_scale must be a number > 0, got None"),
        ({"logit_scale": float("inf")}, "logit_scale must be finite, got inf; a model that divides"),
    ],
    ids=str,
)
def test_logit_options(module, op, options, message):
    """Temperature, softcap and scale."""
    with pytest.raises(ValueError, match=message):
        op(module, CASE, **options)


@MODULES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of 'grpo', .*'reinforce', got 'ppo'"),
        ({"max_log_ratio": 0.0}, "max_log_ratio must be a number > 0"),
        ({"max_log_ratio": float("nan")}, "max_log_ratio must be a number > 0"),
        ({"clip_low": 0.0}, "clip_low must be a number > 0"),
        ({"clip_high": -0.1}, "clip_high must be a number > 0"),
        ({"dual_clip": 1.0}, "dual_clip must be a number > 1"),
        ({"kl_coef": 0.1}, "ref_logprobs is required by kl_coef=0.1"),
        ({"kl_coef": -0.1}, "kl_coef must be a finite number >= 0"),
        ({"entropy_coef": float("nan")}, "entropy_coef must be a finite number"),
        ({"num_tokens": -1}, "num_tokens must be a number >= 0"),
        ({"num_tokens": torch.ones(2)}, "num_tokens must be a number >= 0 or a 0-d tensor"),
        ({"token_weights": torch.ones(3)}, r"token_weights must be \[N\]=\[8\], got \[3\]"),
        ({"ref_logprobs": torch.ones(8, 1)}, r"ref_logprobs must be \[N\]=\[8\]"),
        ({"rollout_weights": 2.0}, r"rollout_weights must be a tensor \[N\]"),
    ],
    ids=str,
)
def test_grpo_options(module, options, message):
    """Every argument of linear_grpo_loss."""
    with pytest.raises(ValueError, match=message):
        grpo(module, CASE, **options)


@MODULES
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (None, 'cu_seqlens is required by loss_type="gspo"'),
        (torch.tensor([0, 7]), "cu_seqlens must rise from 0 to N=8"),
        (torch.tensor([0, 6, 4, 8]), "cu_seqlens must rise from 0 to N=8"),
        (torch.tensor([0.0, 8.0]), "cu_seqlens must be int32 or int64"),
        (torch.tensor(8), r"cu_seqlens must be a \[B\+1\] tensor"),
    ],
    ids=str,
)
def test_cu_seqlens(module, cu_seqlens, message):
    """Bounds are needed by sequence scopes only, and must fit the tokens."""
    case = replace(CASE, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=message):
        grpo(module, case, loss_type="gspo")
    with pytest.raises(ValueError, match=message.replace('loss_type="gspo"', 'entropy_scope="sequence"')):
        srft(module, case)
    srft(module, case, entropy_scope="token")


@MODULES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "iclr"}, "preset must be one of 'paper', 'official', 'upt', got 'iclr'"),
        ({"entropy_scope": "group"}, "entropy_scope must be one of 'token', 'sequence', 'batch'"),
        ({"self_rollout": "clip"}, "self_rollout must be one of 'likelihood', 'ratio'"),
        ({"sft_entropy_sign": 2}, "sft_entropy_sign must be one of -1, 0, 1"),
        ({"demo_gamma": -0.1}, "demo_gamma must be a finite number >= 0, got -0.1"),
        ({"demo_gamma": "preset"}, "demo_gamma must be a finite number >= 0, got 'preset'"),
        ({"sft_weights": torch.ones(3)}, r"sft_weights must be \[N\]=\[8\], got \[3\]"),
        ({"batch_entropy": 0.5}, 'batch_entropy is read only with entropy_scope="batch"'),
        ({"sft_coef": -0.5}, "sft_coef must be a finite number >= 0"),
        ({"rl_coef": float("inf")}, "rl_coef must be a finite number >= 0"),
        ({"negative_coef": -1.0}, "negative_coef must be a finite number >= 0"),
        ({"max_log_ratio": -1.0}, "max_log_ratio must be a number > 0"),
        ({"num_demo_tokens": -1}, "num_demo_tokens must be a number >= 0"),
        ({"num_rollout_tokens": "all"}, "num_rollout_tokens must be a number >= 0"),
    ],
    ids=str,
)
def test_srft_options(module, options, message):
    """Every switch of linear_srft_loss."""
    with pytest.raises(ValueError, match=message):
        srft(module, CASE, **options)


@MODULES
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "grpo"}, "policy must be one of 'clip', 'cispo', 'reinforce', 'gspo', got 'grpo'"),
        ({"policy": "gspo", "cu_seqlens": None}, 'cu_seqlens is required by policy="gspo"'),
        ({"entropy_scope": "sequence", "cu_seqlens": None}, 'cu_seqlens is required by entropy_scope="sequence"'),
        ({"entropy_scope": "group"}, "entropy_scope must be one of 'token', 'sequence', 'batch', got 'group'"),
        ({"batch_entropy": 0.5}, 'batch_entropy is read only with entropy_scope="batch", got \'token\'; drop one'),
        ({"batch_entropy": -0.5, "entropy_scope": "batch"}, "batch_entropy must be a number >= 0"),
        ({"policy_prob_factor": "1-p"}, r"policy_prob_factor must be one of 'one', 'p', 'p\(1-p\)', got '1-p'"),
        ({"sft_prob_factor": None}, "sft_prob_factor must be one of 'one', .* got None"),
        ({"clip_low": 0.0}, "clip_low must be a number > 0"),
        ({"clip_high": -0.1}, "clip_high must be a number > 0"),
        ({"dual_clip": 1.0}, "dual_clip must be a number > 1, got 1.0; None turns it off"),
        ({"max_log_ratio": 0.0}, "max_log_ratio must be a number > 0"),
        ({"shaping_gamma": 0.0, "shaped_weights": torch.ones(8)}, "shaping_gamma must be a number > 0, got 0.0"),
        ({"shaping_gamma": 0.1}, "shaping_gamma is read only with shaped_weights; pass shaped_weights or drop"),
        ({"sft_weights": None}, "sft_entropy_coefs is read only with sft_weights"),
        ({"policy_weights": None, "policy_entropy_coefs": torch.ones(8)}, "policy_entropy_coefs is read only with"),
        ({"policy_weights": None, "policy_prob_factor": "p"}, "policy_prob_factor is read only with policy_w"),
        ({"policy_weights": None, "policy": "reinforce"}, "policy is read only with policy_weights; pass"),
        ({"policy_weights": None, "dual_clip": 3.0}, "dual_clip is read only with policy_weights"),
        ({"sft_weights": None, "sft_entropy_coefs": None, "sft_prob_factor": "p"}, "sft_prob_factor is read only with"),
        ({"sft_weights": torch.ones(8) * 1j}, "sft_weights must be real, got torch.complex64; pass sft_weights.real"),
        ({"kl_weights": torch.ones(8)}, "ref_logprobs is required by kl_weights; pass it or drop kl_weights"),
        ({"advantages": None}, "advantages is required by policy_weights; pass it or drop policy_weights"),
        ({"policy_weights": torch.ones(3)}, r"policy_weights must be \[N\]=\[8\], got \[3\]"),
        ({"entropy_weights": 2.0}, r"entropy_weights must be a tensor \[N\]=\[8\], got float"),
        (
            {"policy_weights": None, "sft_weights": None},
            "one of policy_weights, sft_weights, shaped_weights, kl_weights, entropy_weights must be given, got None",
        ),
    ],
    ids=str,
)
def test_token_loss_options(module, options, message):
    """Every argument of linear_token_loss, and which need which."""
    with pytest.raises(ValueError, match=message):
        token_loss(module, CASE, **options)


@MODULES
def test_srft_flags_must_be_bool(module):
    """Flags as floats are an error, not a guess."""
    with pytest.raises(ValueError, match=r"is_demo must be bool, got torch.float32; use is_demo.bool\(\)"):
        srft(module, replace(CASE, is_demo=CASE.is_demo.float()))
    with pytest.raises(ValueError, match="advantages must be a tensor, got None"):
        srft(module, replace(CASE, advantages=None))


def test_objective_must_return_a_scalar():
    """A user's loss that is not reduced, or not a tensor, is refused."""
    arguments = (CASE.hidden, CASE.weight, CASE.labels)
    with pytest.raises(ValueError, match=r"objective must return a 0-d tensor, got \(8,\)"):
        srft_kernels.linear_policy_loss(*arguments, lambda logprobs, entropy: logprobs)
    with pytest.raises(ValueError, match="objective must return a 0-d tensor, got float"):
        srft_kernels.linear_policy_loss(*arguments, lambda logprobs, entropy: 1.0)
    with pytest.raises(ValueError, match="objective must be callable"):
        srft_kernels.linear_policy_loss(*arguments, "grpo")


class OnGpu(torch.Tensor):
    """A CPU tensor that says, as all that is made of it, that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def asserted(monkeypatch):
    """What was to be asserted on the device: (holds, message)."""
    calls = []
    monkeypatch.setattr(torch, "_assert_async", lambda holds, message: calls.append((bool(holds), message)))
    return calls


@pytest.mark.parametrize(
    ("labels", "temperature", "message"),
    [
        ([0, 10, -100], 1.0, None),
        ([0, 11, -100], 1.0, r"labels must be in \[0, V=11\) or ignore_index=-100"),
        ([0, -1, -100], 1.0, r"labels must be in \[0, V=11\) or ignore_index=-100"),
        ([0, 1, -100], [1.0, 0.5, 0.0], None),
        ([0, 1, -100], [1.0, 0.0, 1.0], "temperature must be > 0 and finite"),
        ([0, 1, -100], [1.0, float("nan"), 1.0], "temperature must be > 0 and finite"),
        ([0, 1, -100], [1.0, float("inf"), 1.0], "temperature must be > 0 and finite"),
    ],
    ids=str,
)
def test_rows_are_checked_where_they_are(asserted, labels, temperature, message):
    """On a CPU a ValueError, on a GPU an assertion on the device, which the host does not wait for."""
    labels = torch.tensor(labels)
    temperature = torch.tensor(temperature) if isinstance(temperature, list) else temperature
    on_gpu = temperature.as_subclass(OnGpu) if isinstance(temperature, torch.Tensor) else temperature
    _checks.check_rows(labels.as_subclass(OnGpu), -100, 11, on_gpu)
    assert all(holds for holds, _ in asserted) == (message is None)
    assert message is None or any(re.search(message, text) for holds, text in asserted if not holds)
    logits, hidden, weight = torch.zeros(3, 11), torch.zeros(3, 4), torch.zeros(11, 4)
    for module in (srft_kernels, reference):
        for call in (
            lambda m: m.logprobs_from_logits(logits, labels, temperature=temperature),
            lambda m: m.linear_logprobs(hidden, weight, labels, temperature=temperature),
        ):
            with nullcontext() if message is None else pytest.raises(ValueError, match=message):
                call(module)


COUNTS = [
    (cross_entropy, "num_tokens", {}),
    (grpo, "num_tokens", {}),
    (srft, "num_rollout_tokens", {}),
    (srft, "num_demo_tokens", {}),
    (srft, "batch_entropy", {"entropy_scope": "batch"}),
    (token_loss, "batch_entropy", {"entropy_scope": "batch"}),
]


@MODULES
@pytest.mark.parametrize(("op", "name", "options"), COUNTS, ids=lambda x: x if isinstance(x, str) else "")
def test_counts_are_numbers_that_count(module, op, name, options, asserted):
    """A negative or infinite number, NaN, a bool or a vector is no count, as a number and as a tensor."""
    number = f"{name} must be a number >= 0 or a 0-d tensor of one"
    for value in (-5, -0.5, float("nan"), float("inf")):
        for given in (value, torch.tensor(value), torch.tensor(float(value), dtype=torch.float64), np.float32(value)):
            with pytest.raises(ValueError, match=number):
                op(module, CASE, **options, **{name: given})
        _checks.check_count(name, torch.tensor(float(value)).as_subclass(OnGpu))
        assert asserted.pop()[0] is False and not asserted
    _checks.check_count(name, torch.tensor(3).as_subclass(OnGpu))
    assert asserted == [(True, asserted[0][1])] and name in asserted[0][1]
    for given in (True, np.bool_(True), torch.tensor(True), torch.ones(1), torch.tensor(1j), "all"):
        with pytest.raises(ValueError, match=number):
            op(module, CASE, **options, **{name: given})


NUMBERS = [
    (cross_entropy, {"num_tokens": 3, "temperature": 0.5, "logit_softcap": 4.0, "ignore_index": -100}),
    (
        grpo,
        {"num_tokens": 3, "clip_low": 0.25, "clip_high": 0.5, "dual_clip": 2.0, "entropy_coef": 0.25, "kl_coef": 0.5,
         "ref_logprobs": CASE.ref_logprobs, "max_log_ratio": 4.0},
    ),
    (srft, {"num_demo_tokens": 3, "num_rollout_tokens": 5, "sft_coef": 0.25, "rl_coef": 0.5, "sft_entropy_sign": 1,
            "negative_coef": 0.5, "demo_gamma": 0.5, "entropy_coef": 0.25, "entropy_scope": "batch",
            "batch_entropy": 0.5}),
    (token_loss, {"clip_low": 0.25, "dual_clip": 2.0, "max_log_ratio": 4.0, "shaping_gamma": 0.5, "batch_entropy": 0.5,
                  "entropy_scope": "batch", "shaped_weights": CASE.weights}),
    (logprobs, {"temperature": 2, "logit_softcap": 4, "lora": LoraDelta(torch.ones(1, 4), torch.ones(11, 1), 0.5)}),
    (policy, {"temperature": 0.5, "logit_softcap": 4.0}),
]  # fmt: skip


def as_numpy(value, kind):
    """``value`` with every number of Python as one of numpy's; an int stays one."""
    if isinstance(value, LoraDelta):
        return value._replace(scale=kind(value.scale))
    if not isinstance(value, int | float):
        return value
    return np.int64(value) if isinstance(value, int) and kind is np.float64 else kind(value)


@MODULES
@pytest.mark.parametrize(("op", "options"), NUMBERS, ids=lambda x: getattr(x, "__name__", ""))
def test_numbers_of_numpy_are_numbers(module, op, options):
    """numpy's scalars and 0-d arrays give what Python's numbers give, wherever a number is taken."""
    expected = run(op, module, CASE, **options)
    for kind in (np.asarray, np.float64, lambda x: (np.float32 if isinstance(x, float) else np.int32)(x)):
        actual = run(op, module, CASE, **{name: as_numpy(x, kind) for name, x in options.items()})
        assert all(torch.equal(actual[name], x) for name, x in expected.items())


@MODULES
@pytest.mark.parametrize(
    ("op", "name"),
    [(grpo, x) for x in ("temperature", "logit_softcap", "ignore_index", "clip_low", "dual_clip", "max_log_ratio")]
    + [(grpo, "kl_coef"), (grpo, "entropy_coef"), (srft, "sft_coef"), (srft, "rl_coef"), (srft, "demo_gamma")]
    + [(token_loss, x) for x in ("clip_high", "dual_clip", "max_log_ratio")],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_bools_are_no_numbers(module, op, name):
    """True measures nothing, although Python takes it for 1."""
    for value in (True, np.bool_(True)):
        with pytest.raises(ValueError, match=f"{name} must be a"):
            op(module, CASE, **{name: value})

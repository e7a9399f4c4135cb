"""The heads named after Liger's equal Liger's: in float64 by its formulas, in fp32 by its code, side by side."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_kernels.integrations import _liger_grpo
from srft_kernels.integrations.liger import (
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearGRPOFunction,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
    liger_fused_linear_grpo,
)
from tests.kernels.liger_peer import assert_same, needs_liger
from tests.numerics import assert_accurate

B, T, H, V = 4, 6, 12, 37
OBJECTIVES = [
    (loss_type, level)
    for loss_type, level in itertools.product(_liger_grpo.LOSS_TYPES, _liger_grpo.LEVELS)
    if level == "token" or loss_type not in ("cispo", "sapo", "vespo")
]
SWITCHES = {
    "beta": st.sampled_from([0.0, 0.3]),
    "delta": st.sampled_from([None, 0.9, 1.1, 1.7]),
    "epsilon_low": st.sampled_from([0.2, 0.4]),
    "epsilon_high": st.sampled_from([0.2, 1.25]),
    "temperature": st.sampled_from([1.0, 0.75]),
    "use_bias_correction_kl": st.booleans(),
}
CALL = {
    "old": st.booleans(),
    "ref": st.sampled_from([None, "logps", "input"]),
    "is_ratio": st.sampled_from([None, "B", "B1", "BT"]),
    "bias": st.booleans(),
    "num_items": st.sampled_from([None, 31, "tensor"]),
    "seed": st.integers(0, 2**16),
}


def make_batch(seed=0, dtype=torch.float64, *, old=True, ref="logps", is_ratio="BT", bias=True, num_items=None):
    """Keyword arguments of a call, by Liger's names; ratios on both sides of a clip, one sequence without tokens."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=g, dtype=torch.float64) * scale

    hidden, weight, offset = normal(B, T, H), normal(V, H, scale=0.5), normal(V)
    ids = torch.randint(V, (B, T), generator=g)
    mask = (torch.rand(B, T, generator=g) < 0.7).long()
    mask[0], mask[2] = 1, 0
    advantages = normal(B)
    advantages[0], advantages[1] = advantages[0].abs(), -advantages[1].abs()
    logits = hidden @ weight.T + (offset if bias else 0.0)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old_logps, ref_logps = logps + normal(B, T, scale=0.4), logps + normal(B, T, scale=0.4)
    other = {"ref_input": hidden + normal(B, T, H, scale=0.1), "ref_weight": weight * 1.1, "ref_bias": offset * 0.9}
    sizes = {"B": (B,), "B1": (B, 1), "BT": (B, T)}
    ratios = torch.rand(sizes.get(is_ratio, ()), generator=g, dtype=torch.float64) + 0.5
    given = {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": ids,
        "attention_mask": mask,
        "advantages": advantages,
        "bias": offset if bias else None,
        "old_per_token_logps": old_logps if old else None,
        "ref_per_token_logps": ref_logps if ref == "logps" else None,
        "vllm_is_ratio": None if is_ratio is None else ratios,
        **({k: x for k, x in other.items() if bias or k != "ref_bias"} if ref == "input" else {}),
    }
    given = {k: x.to(dtype) if x is not None and x.is_floating_point() else x for k, x in given.items()}
    return {**given, "num_items_in_batch": torch.tensor(29) if num_items == "tensor" else num_items}


LEAVES = ("_input", "lin_weight", "bias")


def run(loss_class, options, batch, scale=1.5):
    """Loss, metrics and gradients, by name, of an upstream gradient of ``scale``."""
    batch = {k: x.clone().requires_grad_() if k in LEAVES and x is not None else x for k, x in batch.items()}
    loss, metrics = loss_class(compiled=False, max_completion_length=7, **options)(**batch)
    (loss * scale).backward()
    results = {"loss": loss.detach(), **{f"metric {i}": m for i, m in enumerate(metrics)}}
    return results | {f"d{k}": batch[k].grad for k in LEAVES if batch[k] is not None}


def liger_in_float64(options, batch, scale=1.5):
    """As ``run``, by Liger's own loss formula on materialised float64 logits."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction as Liger

    batch = {k: x.clone().requires_grad_() if k in LEAVES and x is not None else x for k, x in batch.items()}
    temperature = options["temperature"]

    def logps(hidden, weight, bias):
        logits = (F.linear(hidden, weight, bias) / temperature).log_softmax(-1)
        return logits.gather(-1, batch["selected_token_ids"][..., None])[..., 0]

    ref = batch["ref_per_token_logps"]
    if "ref_input" in batch:
        ref = logps(batch["ref_input"], batch["ref_weight"], batch.get("ref_bias"))
    is_ratio = batch["vllm_is_ratio"]
    if is_ratio is not None and is_ratio.dim() == 1:
        is_ratio = is_ratio[:, None]
    mask = batch["attention_mask"].double()
    given = {k: v for k, v in options.items() if k not in ("use_ref_model", "temperature")}
    loss, metrics = Liger.ppo_loss_fn(
        per_token_logps=logps(batch["_input"], batch["lin_weight"], batch["bias"]),
        attention_mask=mask,
        full_attention_mask=mask,
        advantages=batch["advantages"],
        old_per_token_logps=batch["old_per_token_logps"],
        ref_per_token_logps=ref if options["use_ref_model"] else None,
        vllm_is_ratio=is_ratio,
        num_items_in_batch=batch["num_items_in_batch"],
        max_completion_length=7,
        **given,
    )
    (loss * scale).backward()
    results = {"loss": loss.detach(), **{f"metric {i}": m.detach() for i, m in enumerate(metrics)}}
    return results | {f"d{k}": batch[k].grad for k in LEAVES if batch[k] is not None}


@needs_liger
@pytest.mark.parametrize(("loss_type", "level"), OBJECTIVES)
@settings(max_examples=20)
@given(switches=st.fixed_dictionaries(SWITCHES), call=st.fixed_dictionaries(CALL))
def test_grpo_equals_liger(loss_type, level, switches, call):
    """Loss, metrics and gradients equal Liger's formula in float64 and Liger's code in fp32."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Liger

    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "use_ref_model": call["ref"] is not None,
        **switches,
    }
    batch = make_batch(**call)
    assert_same(run(LigerFusedLinearGRPOLoss, options, batch), liger_in_float64(options, batch), 1e-12)
    batch = make_batch(**call, dtype=torch.float32)
    assert_same(run(LigerFusedLinearGRPOLoss, options, batch), run(Liger, options, batch), 3e-5)


@needs_liger
@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_shape_parameters_reach_the_formula(loss_type):
    """The temperatures of SAPO and the gamma parameters of VESPO mean what they mean in Liger."""
    options = {"loss_type": loss_type, "beta": 0.0, "use_ref_model": False, "temperature": 1.0}
    if loss_type == "sapo":
        options |= {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.25}
    else:
        options |= {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.25}
    batch = make_batch(3, ref=None)
    assert_same(run(LigerFusedLinearGRPOLoss, options, batch), liger_in_float64(options, batch), 1e-12)


@needs_liger
@pytest.mark.parametrize("num_items", [None, 31])
def test_tokens_of_the_batch_are_shared_by_the_ranks(monkeypatch, num_items):
    """With two ranks the denominator of dapo is half of all tokens, as Liger has it."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op=None: x.mul_(5))
    options = {"loss_type": "dapo", "beta": 0.0, "use_ref_model": False, "temperature": 1.0}
    batch = make_batch(1, ref=None, num_items=num_items)
    assert_same(run(LigerFusedLinearGRPOLoss, options, batch), liger_in_float64(options, batch), 1e-12)


@needs_liger
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_bf16_is_at_least_as_accurate_as_liger(loss_type):
    """In bf16 the error against float64 on the same inputs is within that of Liger."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Liger

    options = {"loss_type": loss_type, "beta": 0.0, "use_ref_model": False, "temperature": 1.0, "epsilon_high": 2.0}
    batch = make_batch(0, torch.bfloat16, ref=None)
    # logps of the batch are fp32 in practice; bf16 ones would put the ratio on a coarse grid
    batch["old_per_token_logps"] = make_batch(0, torch.float32, ref=None)["old_per_token_logps"]
    exact = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in batch.items()}
    gold = liger_in_float64(options, exact)
    ours, liger = (run(c, options, batch) for c in (LigerFusedLinearGRPOLoss, Liger))
    for name in ("dlin_weight", "d_input", "dbias"):
        assert_accurate(name, ours[name], gold[name], liger[name], gradient=True)
        assert (ours[name] - gold[name]).norm() <= 1.05 * (liger[name] - gold[name]).norm()
    assert (ours["loss"] - gold["loss"]).abs() <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": x} for x in ("grpo", "bnpo", "dr_grpo", "dapo")),
        {"importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"delta": 1.5},
        {"beta": 0.1},
    ],
    ids=str,
)
def test_common_objectives_are_fused(monkeypatch, options):
    """The objectives that linear_grpo_loss has are given to it, which needs one pass over the logits."""
    monkeypatch.setattr(_liger_grpo, "linear_policy_loss", None)
    run(LigerFusedLinearGRPOLoss, {"beta": 0.0} | options, make_batch())


@needs_liger
def test_signatures_are_those_of_liger():
    """Every argument has the name, place and default that Liger gives it."""
    import liger_kernel.chunked_loss.grpo_loss as grpo
    import liger_kernel.ops.fused_linear_scaled_cross_entropy as scaled
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as LigerCrossEntropy

    def arguments(function, skip=()):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name not in skip]

    for ours, theirs in (
        (LigerFusedLinearGRPOLoss.__init__, grpo.LigerFusedLinearGRPOLoss.__init__),
        (LigerFusedLinearGRPOLoss.forward, grpo.LigerFusedLinearGRPOLoss.forward),
        (LigerFusedLinearGRPOFunction.apply, grpo.LigerFusedLinearGRPOFunction.forward),
        (liger_fused_linear_grpo, grpo.LigerFusedLinearGRPOFunction.forward),
        (
            LigerFusedLinearScaledCrossEntropyFunction.apply,
            scaled.LigerFusedLinearScaledCrossEntropyFunction.apply,
        ),
        (
            LigerFusedLinearScaledCrossEntropyTPFunction.apply,
            scaled.LigerFusedLinearScaledCrossEntropyTPFunction.apply,
        ),
        (LigerFusedLinearCrossEntropyLoss.__init__, LigerCrossEntropy.__init__),
        (LigerFusedLinearCrossEntropyLoss.forward, LigerCrossEntropy.forward),
    ):
        assert arguments(ours) == arguments(theirs, skip=("cls", "ctx"))
    ours, theirs = (c(delta=1.5, compiled=False) for c in (LigerFusedLinearGRPOLoss, grpo.LigerFusedLinearGRPOLoss))
    assert {k: v for k, v in vars(ours).items() if k[0] != "_"} == {
        k: v for k, v in vars(theirs).items() if k[0] != "_"
    }


def test_what_stands_at_padding_is_not_read():
    """NaN among the log-probabilities of padding, and any hidden state there, leave every result as it is."""
    options = {"loss_type": "grpo", "beta": 0.1}
    batch = make_batch()
    expected = run(LigerFusedLinearGRPOLoss, options, batch)
    padding = batch["attention_mask"] == 0
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        batch[name] = batch[name].masked_fill(padding, math.nan)
    batch["_input"] = batch["_input"].masked_fill(padding[..., None], 1e4)
    actual = run(LigerFusedLinearGRPOLoss, options, batch)
    assert all(torch.equal(x, expected[name]) for name, x in actual.items())
    assert not actual["d_input"][padding].any()


def test_frozen_weight_gets_no_gradient():
    """A weight that needs no gradient gets none, and the gradient of the input stays the same."""
    batch = make_batch()
    expected = run(LigerFusedLinearGRPOLoss, {}, batch)
    hidden = batch["_input"].clone().requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss()(**batch | {"_input": hidden})
    (loss * 1.5).backward()
    assert batch["lin_weight"].grad is None
    torch.testing.assert_close(hidden.grad, expected["d_input"])


def test_weight_of_another_dtype_is_rounded_as_in_liger():
    """A weight kept in fp32 beside bf16 hidden states is used in bf16 and gets its gradient in fp32."""
    batch = make_batch(dtype=torch.bfloat16)
    expected = run(LigerFusedLinearGRPOLoss, {}, batch)
    actual = run(LigerFusedLinearGRPOLoss, {}, batch | {"lin_weight": batch["lin_weight"].float()})
    assert actual["dlin_weight"].dtype == torch.float32
    torch.testing.assert_close(actual["dlin_weight"], expected["dlin_weight"].float())


def test_reference_log_probabilities_are_preferred():
    """With both forms of the reference, a warning says that the log-probabilities are read."""
    batch = make_batch(ref="input") | {"ref_per_token_logps": make_batch()["ref_per_token_logps"]}
    with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
        both = run(LigerFusedLinearGRPOLoss, {}, batch)
    assert_same(both, run(LigerFusedLinearGRPOLoss, {}, make_batch()), 0.0)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"loss_type": "ppo"}, {}, "loss_type must be one of 'grpo'"),
        ({"importance_sampling_level": "word"}, {}, "importance_sampling_level must be one of"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, {}, "is not supported for loss_type='cispo'"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, {}, "max_completion_length is required"),
        ({}, {"ref_per_token_logps": None}, "use_ref_model=True needs ref_per_token_logps, or ref_input"),
        ({}, {"_input": torch.zeros(B * T, H)}, r"_input must be \[B, T, H\], got \[24, 12\]"),
        ({}, {"advantages": torch.zeros(B, T)}, r"advantages must be \[4\], as _input, got \[4, 6\]"),
        ({}, {"attention_mask": torch.ones(B, T + 1)}, r"attention_mask must be \[4, 6\]"),
        ({}, {"vllm_is_ratio": torch.ones(B, 2)}, r"vllm_is_ratio must be \[B, T\]=\[4, 6\], \[B, 1\] or \[B\]"),
        ({"temperature": 0.0}, {}, "temperature must be a number > 0"),
        ({"delta": 0.0}, {}, "delta must be positive, got 0.0"),
        ({"sapo_temperature_neg": 0.0}, {}, "sapo_temperature_neg must be positive"),
    ],
)
def test_wrong_arguments_are_named(options, change, message):
    """A ValueError says what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**{"max_completion_length": 7} | options)(**make_batch() | change)


@pytest.mark.parametrize(
    "function",
    [
        LigerFusedLinearGRPOFunction,
        LigerFusedLinearScaledCrossEntropyFunction,
        LigerFusedLinearScaledCrossEntropyTPFunction,
    ],
)
def test_a_loss_of_ones_own_is_not_replaced(function):
    """In Liger a subclass may bring its own formula, which no part of this package would call."""
    with pytest.raises(ValueError, match=f"Own cannot change {function.__name__}.*derive it from liger_kernel's own"):
        type("Own", (function,), {"ppo_loss_fn": staticmethod(lambda *args, **kwargs: 0)})

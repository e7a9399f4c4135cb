"""GRPOTrainer whose gradient is that of linear_grpo_loss against GRPOTrainer alone."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL, which `make test` installs", allow_module_level=True)

import trl

from srft_kernels.integrations import trl as ours
from tests.kernels.trl_runs import (
    BATCH,
    CASES,
    LENGTH,
    assert_training_agrees,
    drop_masked_positions,
    make_trainer,
    save_model,
)

pytestmark = pytest.mark.filterwarnings("ignore")
FUSED = {name: CASES[name] for name in CASES if name not in ("grpo-kl", "high-entropy-tokens", "entropy-bonus")}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Spare these tiny models the cost of handing work to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("compact", [False, True], ids=["all-positions", "compacted"])
@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
def test_training_agrees(folder: Path, options: dict, compact: bool) -> None:
    """The gradient of ``linear_grpo_loss`` trains as that of TRL's own loss, whichever rows TRL hands over."""
    assert_training_agrees(folder, options, functools.partial(ours.patch_grpo_trainer, fused_loss=True), compact)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": "sapo"}, "loss_type='sapo'"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 2.0}, "'sequence'"),
        ({"loss_type": "cispo"}, "epsilon_high <= 1"),
        ({"delta": 1.1}, "delta < 1"),
        ({"top_entropy_quantile": 0.4}, "top_entropy_quantile < 1"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "use_bias_correction_kl"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_losses_that_are_not_fused_are_refused(folder: Path, options: dict, reason: str) -> None:
    """What ``linear_grpo_loss`` does not have is named, for a trainer at once and for the class at the first step."""
    trainer = make_trainer(folder, **options)
    with pytest.raises(ValueError, match=f"does not cover .*{reason}.*pass fused_loss=False"):
        ours.patch_grpo_trainer(trainer, fused_loss=True)
    with pytest.raises(ValueError, match="does not cover"), ours.patch_grpo_trainer(fused_loss=True):
        trainer.train()


OWN_METHODS = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")


def halved(original: Callable) -> Callable:
    """A method that halves the loss, or the log-probabilities, of ``original`` and goes by its name."""

    @functools.wraps(original)
    def method(*args, **kwargs):
        result = original(*args, **kwargs)
        return (0.5 * result[0], *result[1:]) if isinstance(result, tuple) else 0.5 * result

    return method


@pytest.fixture(scope="module")
def one_step(folder: Path) -> tuple[trl.GRPOTrainer, Callable[[], object]]:
    """A trainer and a step of it."""
    trainer = make_trainer(folder, loss_type="bnpo")
    trainer.current_gradient_accumulation_steps = 1
    inputs = next(iter(trainer.get_train_dataloader()))
    return trainer, lambda: trainer.training_step(trainer.model, inputs, None)


@pytest.mark.parametrize("name", OWN_METHODS)
@pytest.mark.parametrize("how", ["subclass", "instance", "class"])
@pytest.mark.parametrize("moment", ["before", "after", "class-patch"])
def test_a_loss_of_ones_own_is_not_replaced(
    one_step: tuple, name: str, how: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever overrides a method of the loss, on whatever and whenever, keeps the gradient or is told."""
    trainer, step = one_step

    def override() -> None:
        if how == "instance":
            setattr(trainer, name, halved(getattr(trainer, name)))
            return
        method = halved(getattr(trl.GRPOTrainer, name))
        if how == "class":
            monkeypatch.setattr(trl.GRPOTrainer, name, method)
        else:
            monkeypatch.setattr(trainer, "__class__", type("Halved", (trl.GRPOTrainer,), {name: method}))

    if moment != "after":
        override()
    with pytest.raises(ValueError, match=f"does not cover .*{name}.*pass fused_loss=False"):
        with ours.patch_grpo_trainer(None if moment == "class-patch" else trainer, fused_loss=True):
            if moment == "after":
                override()
            step()
    monkeypatch.undo()
    vars(trainer).pop(name, None)
    with ours.patch_grpo_trainer(trainer, fused_loss=True):
        step()


def test_a_loss_without_grpos_is_told(folder: Path) -> None:
    """A patch of the class that a subclass goes around does not stay without effect in silence."""

    class Own(trl.GRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return sum(p.square().sum() for p in model.parameters())

    trainer = make_trainer(folder, max_steps=1)
    trainer.__class__ = Own
    with ours.patch_grpo_trainer(), pytest.warns(UserWarning, match="a step of Own did not call .*no effect on it"):
        trainer.train()
    with ours.patch_grpo_trainer(fused_loss=True), pytest.raises(ValueError, match="Own.compute_loss"):
        trainer.train()


def test_trls_own_subclasses_are_judged_by_their_loss(folder: Path) -> None:
    """GMPO has a loss of its own; a subclass that only logs has not."""
    from trl.experimental.gmpo import GMPOTrainer

    class Logs(trl.GRPOTrainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "seen": 1.0}, start_time)

    trainer = make_trainer(folder, loss_type="bnpo", max_steps=1)
    trainer.__class__ = GMPOTrainer
    with pytest.raises(ValueError, match="GMPOTrainer._compute_loss, which is not TRL's own"):
        ours.patch_grpo_trainer(trainer, fused_loss=True)
    trainer.__class__ = Logs
    for patched in (trainer, None):
        with ours.patch_grpo_trainer(patched, fused_loss=True):
            trainer.train()
        assert trainer.state.log_history[-1]["seen"] == 1.0 or trainer.state.log_history[-2]["seen"] == 1.0


def test_a_model_that_changes_the_logprobs_is_told(folder: Path) -> None:
    """The fused gradient is that of the head's log-probabilities; a forward that scales them is another loss."""
    trainer = make_trainer(folder, loss_type="bnpo", max_steps=1)

    def scale(module, args, output):
        if getattr(output, "log_probs", None) is not None:
            output.log_probs = 0.5 * output.log_probs
        return output

    trainer.model.register_forward_hook(scale)
    with ours.patch_grpo_trainer(trainer, fused_loss=True), pytest.raises(RuntimeError, match="other log-prob"):
        trainer.train()


def test_losses_of_other_versions_are_not_taken_for_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head may serve another version of TRL, the loss may not."""
    monkeypatch.setattr(trl, "__version__", "9.9")
    ours.patch_grpo_trainer()()
    with pytest.raises(RuntimeError, match=r"knows the losses of TRL 1\.16\.0, got 9\.9; pass fused_loss=False"):
        ours.patch_grpo_trainer(fused_loss=True)


@pytest.mark.parametrize("compact", [False, True], ids=["all-positions", "compacted"])
@pytest.mark.parametrize(
    "variant", ["tools", "token-weights", "sequence-weights", "token-advantages", "all-masked", "short"]
)
def test_rarer_inputs_agree(folder: Path, variant: str, compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools, vLLM's correction, advantages per token, no or only short completions: loss and gradients are TRL's."""
    trainer = make_trainer(folder, **CASES["dr_grpo-kl" if variant in ("short", "tools") else "grpo-delta"])
    trainer.current_gradient_accumulation_steps = 2
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs["old_per_token_logps"] += 0.3 * torch.randn(inputs["completion_ids"].shape) * inputs["completion_mask"]
    if variant == "tools":
        inputs["tool_mask"] = (torch.rand(inputs["completion_ids"].shape) < 0.7).long()
    elif variant.endswith("weights"):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        width = 1 if variant.startswith("sequence") else inputs["completion_ids"].shape[1]
        inputs["importance_sampling_ratio"] = 2 * torch.rand(BATCH, width)
    elif variant == "token-advantages":
        inputs["advantages"] = torch.randn(inputs["completion_ids"].shape)
    elif variant == "short":
        for key in ("completion_ids", "completion_mask", "old_per_token_logps", "ref_per_token_logps"):
            inputs[key] = inputs[key][:, : LENGTH // 2]
    else:
        inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model.train(), inputs)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    expected = loss_and_gradient()
    assert (expected[1].norm() > 0.1) == (variant != "all-masked")
    if compact:
        drop_masked_positions(monkeypatch)
    if variant == "tools":
        # exp(200) overflows: what tools say may be as unlikely as it likes
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            inputs[name].masked_fill_(inputs["tool_mask"] < inputs["completion_mask"], -200.0)
    with ours.patch_grpo_trainer(trainer, fused_loss=True):
        actual = loss_and_gradient()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_evaluation_is_left_to_the_head(folder: Path) -> None:
    """Without gradients there is nothing to fuse, and the values agree."""
    trainer = make_trainer(folder, **CASES["bnpo"])
    inputs = next(iter(trainer.get_train_dataloader()))

    def value() -> float:
        torch.manual_seed(0)
        return float(trainer.prediction_step(trainer.model.eval(), inputs, True)[0])

    expected = value()
    with ours.patch_grpo_trainer(trainer, fused_loss=True):
        assert abs(value() - expected) < 1e-5 < abs(expected)

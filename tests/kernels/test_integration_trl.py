"""GRPOTrainer with the patched loss head against GRPOTrainer alone: losses, gradient norms, parameters."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from srft_kernels.head import chunks as chunked_head

if importlib.util.find_spec("trl") is None:
    pytest.skip("needs TRL, which `make test` installs", allow_module_level=True)

import peft
import trl

from srft_kernels.integrations import trl as ours
from tests.kernels.trl_runs import (
    BATCH,
    CASES,
    LENGTH,
    OFF_POLICY,
    SIZES,
    VOCAB,
    assert_training_agrees,
    make_trainer,
    save_model,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_training_agrees(folder: Path, options: dict) -> None:
    """The log-probabilities and entropies of the op train as TRL's own."""
    assert_training_agrees(folder, options, ours.patch_grpo_trainer, compact=False)


def test_training_agrees_without_masked_positions(folder: Path) -> None:
    """The same where TRL drops the masked positions, as it does on a GPU."""
    assert_training_agrees(folder, CASES["truncated-masked"], ours.patch_grpo_trainer, compact=True)


def test_forgotten_temperature_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails where the temperature is dropped."""
    options = CASES["dapo-accumulated"]
    expected = train(folder, **options)
    op = ours.linear_logprobs
    monkeypatch.setattr(ours, "linear_logprobs", lambda *args, **given: op(*args, **given | {"temperature": 1.0}))
    with ours.patch_grpo_trainer():
        actual = train(folder, **options)
    assert (actual.series("grad_norm") - expected.series("grad_norm")).abs().max() > 1e-2


HEADS = {
    "softcap": (transformers.Gemma2Config, {"final_logit_softcapping": 3.0}),
    "scale-tied": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "scaling": (transformers.GraniteConfig, {"logits_scaling": 0.5}),
    "scale-and-softcap": (transformers.Gemma2Config, {"final_logit_softcapping": 3.0, "logit_scale": 0.5}),
    "bias": (transformers.PhiConfig, {"partial_rotary_factor": 1.0}),
    "tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_model_heads_agree(folder: Path, config: tuple, autocast: bool) -> None:
    """Log-probabilities, entropies and gradients of heads with a cap, a scale, a bias or tied weights are TRL's."""
    kind, options = config
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES | options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.5 * torch.randn_like(parameter)
    trainer = make_trainer(folder, model, bf16=autocast, gradient_checkpointing=False)
    ids = torch.randint(2, VOCAB, (5, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 9:] = mask[3, 7:] = 0
    weights = torch.randn(2, 5, 7)

    def values_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        logprobs, entropy, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, 7, batch_size=2, compute_entropy=True
        )
        torch.stack([logprobs, entropy]).mul(weights).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        with torch.no_grad():
            again, none, _ = trainer._get_per_token_logps_and_entropies(model, ids, mask, 7)
        assert none is None and not again.requires_grad
        return [logprobs.detach(), entropy.detach(), again, torch.cat(gradients)]

    expected = values_and_gradients()
    with ours.patch_grpo_trainer(trainer):
        actual = values_and_gradients()
    # under autocast TRL rounds its logits to bf16
    tolerance = 3e-2 if autocast else 1e-5
    assert expected[0][0].abs().min() > 1e-3 and torch.all(actual[0][mask[:, 5:] == 0] == 0)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * float(y.abs().max()))


def test_autocast_sets_the_dtype_of_the_head(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 autocast the op gets bf16, unless the lm_head is cast to fp32, and parameters get fp32 gradients."""
    dtypes, op = [], ours.linear_logprobs

    def spy(hidden_states: torch.Tensor, lm_head_weight: torch.Tensor, *args, **given):
        dtypes.append((hidden_states.dtype, lm_head_weight.dtype))
        return op(hidden_states, lm_head_weight, *args, **given)

    monkeypatch.setattr(ours, "linear_logprobs", spy)
    for fp32_head, dtype in [(False, torch.bfloat16), (True, torch.float32)]:
        trainer = make_trainer(folder, bf16=True, cast_lm_head_to_fp32=fp32_head, max_steps=1)
        with ours.patch_grpo_trainer(trainer):
            trainer.train()
        assert set(dtypes) == {(dtype, dtype)}
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        dtypes.clear()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of a float tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step, old and reference log-probabilities and backward included, makes no [tokens, V] tensor."""
    monkeypatch.setattr(chunked_head, "CPU_WORKSPACE_BYTES", 0)
    trainer = make_trainer(folder, beta=0.1, use_bias_correction_kl=False, **OFF_POLICY)
    trainer.current_gradient_accumulation_steps = 1
    inputs = next(iter(trainer.get_train_dataloader()))

    def step() -> int:
        trainer._step = 0
        with LargestTensor() as seen:
            trainer.training_step(trainer.model, inputs, None)
        return seen.numel

    # one prompt of a single token, at worst
    tokens = BATCH * LENGTH
    assert step() >= tokens * VOCAB
    for fused_loss in (False, True):
        with ours.patch_grpo_trainer(trainer, fused_loss=fused_loss):
            assert 16 * VOCAB <= step() < tokens * VOCAB


def test_undo_restores(folder: Path) -> None:
    """A patch of the class or of one trainer leaves nothing behind, also when training raises."""
    method, head = trl.GRPOTrainer._get_per_token_logps_and_entropies, ours.trl_utils._ChunkedLogProbFunction
    undo = ours.patch_grpo_trainer()
    assert trl.GRPOTrainer._get_per_token_logps_and_entropies is not method
    undo()
    undo()
    assert trl.GRPOTrainer._get_per_token_logps_and_entropies is method

    trainer, other = make_trainer(folder), make_trainer(folder)
    with pytest.raises(AttributeError), ours.patch_grpo_trainer(trainer):
        assert "_get_per_token_logps_and_entropies" in vars(trainer)
        assert "_get_per_token_logps_and_entropies" not in vars(other)
        trainer._get_per_token_logps_and_entropies(None, None, None, 1)
    assert "_get_per_token_logps_and_entropies" not in vars(trainer)
    assert trl.GRPOTrainer._get_per_token_logps_and_entropies is method
    assert ours.trl_utils._ChunkedLogProbFunction is head


def test_patching_twice_is_refused(folder: Path) -> None:
    """A second patch of the class, or of a trainer of the patched class, says what to do."""
    trainer = make_trainer(folder)
    with ours.patch_grpo_trainer():
        for arguments in [(), (trainer,)]:
            with pytest.raises(ValueError, match="patched already; undo the first"):
                ours.patch_grpo_trainer(*arguments)


def test_unsupported_heads_are_refused(folder: Path) -> None:
    """Sharded weights, scales that are not positive and results that the op does not have raise."""
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    arguments = (hidden, weight, None, targets, 1.0, 32, None)
    with pytest.raises(ValueError, match="logit_scale must be a number > 0, got 0.0"):
        ours._Head().apply(*arguments, 0.0, ("log_probs",))
    with pytest.raises(RuntimeError, match="mean_logits"):
        ours._Head().apply(*arguments, 1.0, ("log_probs", "mean_logits"))
    weight.ds_id = 0
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        ours._Head().apply(*arguments, 1.0, ("log_probs",))
    with pytest.raises(ValueError, match="must be a trl.GRPOTrainer, got str"):
        ours.patch_grpo_trainer("trainer")
    # TRL's own refusal, which the patch relies on: the head sees lm_head.weight without its adapter
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"), ours.patch_grpo_trainer():
        make_trainer(folder, peft_config=peft.LoraConfig(r=4, target_modules=["lm_head"]))


def test_other_versions_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head with other arguments is refused at once, and one that is not called at the first step."""

    class Bypass(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return None, None, None

    trainer = make_trainer(folder)
    trainer.__class__ = Bypass
    with ours.patch_grpo_trainer(trainer), pytest.raises(RuntimeError, match="the patch has no effect"):
        trainer._get_per_token_logps_and_entropies()

    other = SimpleNamespace(forward=lambda ctx, hidden, weight: None)
    monkeypatch.setattr(ours.trl_utils, "_ChunkedLogProbFunction", other)
    with pytest.raises(RuntimeError, match=r"known to work with TRL 1\.16\.0, got .*\['ctx', 'hidden', 'weight'\]"):
        ours.patch_grpo_trainer()


def test_missing_trl_is_named() -> None:
    """The package imports nothing, and its TRL module says in one line what to install."""
    script = (
        "import sys; sys.modules['trl'] = None; import srft_kernels.integrations\n"
        "assert 'transformers' not in sys.modules and 'srft_kernels.integrations.trl' not in sys.modules\n"
        "import srft_kernels.integrations.trl"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("needs TRL; run: pip install trl")
    assert "During handling" not in done.stderr

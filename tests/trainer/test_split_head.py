"""A head whose rows stay on their ranks computes what the whole head does, and says what it does not take."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srft.config import Config
from srft.options import load_config
from srft.policy.head import no_head
from srft.policy.loading import fill, skeleton
from srft.policy.model import head_of, prepare_policy
from srft.policy.parallel import World, joined, whole
from srft.policy.split_head import SplitHead
from srft_kernels import linear_cross_entropy, linear_grpo_loss, linear_logprobs, reference
from tests.ranks import results_of_two_ranks
from tests.trainer.tiny import CPU, VOCAB, plain_model, tiny_config
from tests.trainer.worlds import world_of

ROWS = (5, 3)
# a scale, a softcap and a bias, none of which Qwen2 has
SCALE, SOFTCAP = 0.5, 3.0


def model_with_all() -> PreTrainedModel:
    """An untied model in float64 whose head has all that a head may have."""
    model = plain_model()
    model.config.logit_scale, model.config.final_logit_softcapping = SCALE, SOFTCAP
    bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    model.lm_head.bias = bias
    return model.double()


def inputs() -> dict[str, Tensor]:
    """Of all ranks, those of the first before those of the second; a label of either half of the words is ignored."""
    generator, n = torch.Generator().manual_seed(3), sum(ROWS)
    labels = torch.randint(VOCAB, (n,), generator=generator)
    labels[1] = labels[-1] = -100
    return {
        "hidden": torch.randn(n, 24, generator=generator, dtype=torch.float64),
        "labels": labels,
        "temperature": torch.rand(n, generator=generator, dtype=torch.float64) + 0.5,
        "dlogprobs": torch.randn(n, generator=generator, dtype=torch.float64),
        "dentropy": torch.randn(n, generator=generator, dtype=torch.float64),
    }


def scored(head: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Log-probabilities, entropies and the gradient of a weighted sum of both, without the parameters'."""
    hidden = x["hidden"].clone().requires_grad_()
    op = partial(linear_logprobs, labels=x["labels"], temperature=x["temperature"], entropy_grad=True)
    logprobs, entropy = head(hidden, op)
    (logprobs @ x["dlogprobs"] + entropy @ x["dentropy"]).backward()
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "dhidden": hidden.grad}


def refusal(head: SplitHead, op: Any) -> str:
    """Why a call is refused."""
    with pytest.raises(ValueError) as caught:
        head(torch.ones(2, 24, dtype=torch.float64), op)
    return str(caught.value)


def own_forward(model: PreTrainedModel, hidden: Tensor, dlogits: Tensor) -> dict[str, Tensor]:
    """Logits and gradients of the head as the model calls it."""
    model.lm_head.zero_grad(set_to_none=True)
    hidden = hidden.clone().requires_grad_()
    logits = model.lm_head(hidden)
    (logits * dlogits).sum().backward()
    return {"logits": logits.detach(), "dhidden": hidden.grad}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the head, whole."""
    return {f"d{n}": whole(p.grad).clone() for n, p in model.lm_head.named_parameters()}


def rank_main(rank: int, folder: Path) -> None:
    """Every call of one of two ranks."""
    torch.set_num_threads(1)
    world = world_of(rank, folder)
    assert world.mesh is not None
    model = model_with_all()
    head = SplitHead(model, world.mesh["shards"], CPU)
    mine = slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)
    x = {name: value[mine] for name, value in inputs().items()}
    found: dict[str, Any] = {"held": model.lm_head.weight.to_local().clone()}
    found["scored"] = scored(head, x) | gradients(model)
    with torch.no_grad():
        again, _ = head(x["hidden"], partial(linear_logprobs, labels=x["labels"], temperature=x["temperature"]))
    found["same without a gradient"] = torch.equal(again, found["scored"]["logprobs"])
    dlogits = torch.full((), 1.0 + rank, dtype=torch.float64)
    found["own forward"] = own_forward(model, inputs()["hidden"], dlogits) | gradients(model)
    found["no head"] = head(x["hidden"], no_head)
    labels = torch.tensor([1, -100])
    grpo = partial(linear_grpo_loss, labels=labels, advantages=torch.ones(2))
    found["refused"] = {
        "other op": refusal(head, partial(linear_cross_entropy, labels=labels)),
        "no partial": refusal(head, linear_logprobs),
        "by place": refusal(head, partial(linear_logprobs, labels)),
        "rows": refusal(head, partial(grpo, token_weights=torch.ones(3))),
        "missing": refusal(head, partial(grpo, old_logprobs=torch.zeros(2) if rank == 0 else None)),
        "number": refusal(head, partial(grpo, clip_low=0.1 * (1 + rank))),
    }
    found["loaded"] = loaded(folder, world)
    torch.save(found, folder / f"rank{rank}.pt")


def loaded(folder: Path, world: World) -> dict[str, Tensor]:
    """The weights of a model that was read from files, and what its head makes of a hidden state."""
    model = skeleton(folder / "model", trust_remote_code=False)
    world = World(world.rank, world.size, world.device, world.mesh, vocab_parallel=True)
    prepare_policy(model, tiny_config().model, 64, world)
    fill(model, folder / "model", world)
    with torch.no_grad():
        logprobs, _ = head_of(model)(torch.ones(1, 24), partial(linear_logprobs, labels=torch.tensor([2])))
    return {**{n: whole(p).detach() for n, p in model.named_parameters()}, "logprobs": logprobs}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    plain_model().save_pretrained(folder / "model")
    return results_of_two_ranks("tests.trainer.test_split_head", folder)


def test_scores_and_their_gradients_are_those_of_the_whole_head(ranks: list[dict[str, Any]]) -> None:
    """With uneven rows, a bias, a scale, a softcap and a temperature a token."""
    model, x = model_with_all(), inputs()
    options = {"bias": model.lm_head.bias, "logit_scale": SCALE, "logit_softcap": SOFTCAP}

    def head(hidden: Tensor, op: partial[Any]) -> Any:
        return reference.linear_logprobs(hidden, model.lm_head.weight, **op.keywords, **options)

    gold = scored(head, x) | gradients(model)
    for rank, mine in enumerate((slice(0, ROWS[0]), slice(ROWS[0], None))):
        found = ranks[rank]["scored"]
        for name in ("logprobs", "entropy", "dhidden"):
            torch.testing.assert_close(found[name], gold[name][mine])
        for name in ("dweight", "dbias"):
            torch.testing.assert_close(found[name], gold[name])
        assert ranks[rank]["same without a gradient"] and float(ranks[rank]["no head"]) == 0
    held = [rank["held"] for rank in ranks]
    assert [len(x) for x in held] == [19, 18] and torch.equal(torch.cat(held), model.lm_head.weight)


def test_the_model_s_own_forward_has_the_whole_head(ranks: list[dict[str, Any]]) -> None:
    """Its gradients are the sum over the ranks of what each of them computes."""
    model, hidden = model_with_all(), inputs()["hidden"]
    for rank, found in enumerate(ranks):
        factor = torch.full((), 1.0 + rank, dtype=torch.float64)
        gold = own_forward(model, hidden, factor)
        for name in gold:
            torch.testing.assert_close(found["own forward"][name], gold[name])
    own_forward(model, hidden, torch.full((), 3.0, dtype=torch.float64))
    for name, gold_gradient in gradients(model).items():
        torch.testing.assert_close(ranks[0]["own forward"][name], gold_gradient)
        torch.testing.assert_close(ranks[1]["own forward"][name], gold_gradient)


def test_a_model_from_files(ranks: list[dict[str, Any]]) -> None:
    """Each rank reads its rows of the head too, and computes with them."""
    model = plain_model()
    expected, _ = reference.linear_logprobs(torch.ones(1, 24), model.lm_head.weight, torch.tensor([2]))
    for rank in ranks:
        torch.testing.assert_close(rank["loaded"].pop("logprobs"), expected)
        assert rank["loaded"].keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(rank["loaded"][name], p) for name, p in model.named_parameters())


def test_calls_that_are_refused(ranks: list[dict[str, Any]]) -> None:
    """On both ranks, so that none waits for the other."""
    for rank in ranks:
        said = rank["refused"]
        for name in ("other op", "no partial", "by place"):
            assert said[name].startswith("train.vocab_parallel takes linear_logprobs, linear_grpo_loss")
        assert said["rows"] == "token_weights must have [N]=[2] rows, got [3]"
        assert "old_logprobs=torch.float32 ['N'] on the first rank and old_logprobs=None on rank 1;" in said["missing"]
        assert "clip_low=0.1 on the first rank and clip_low=0.2 on rank 1;" in said["number"]


class Two:
    """A mesh of two ranks, of which this is the first."""

    def size(self) -> int:
        return 2


def test_heads_that_are_not_split() -> None:
    """A tied one, one with an adapter, and one with fewer words than ranks."""
    adapted, single = plain_model(), plain_model()
    adapted.set_output_embeddings(nn.Sequential(adapted.get_output_embeddings()))
    single.set_output_embeddings(nn.Linear(24, 1))
    for model, why in (
        (plain_model(tied=True), "which qwen2 ties to its embedding"),
        (adapted, "got Sequential; give the head no adapter"),
        (single, "gives each rank 1 of 1 words, and the last none"),
    ):
        with pytest.raises(ValueError, match=f"{why}.* set train.vocab_parallel=false"):
            SplitHead(model, Two(), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "size", "why"),
    [
        ([], 1, "got 1 replicas of 1; start several with train.ranks=N"),
        (["train.shard_ranks=2"], 4, "got 2 replicas of 2; .* leave train.shard_ranks unset"),
    ],
)
def test_ranks_that_do_not_split_a_head(
    monkeypatch: pytest.MonkeyPatch, words: list[str], size: int, why: str
) -> None:
    """One process, and replicas."""
    monkeypatch.setenv("WORLD_SIZE", str(size))
    config: Config = load_config(["train.vocab_parallel=true", *words])
    with pytest.raises(ValueError, match=why), joined(config, CPU):
        pass


def test_not_with_offloading() -> None:
    """A head that lies in the CPU's memory does not compute on a GPU."""
    with pytest.raises(ValueError, match="train.cpu_offload=true takes them away; set one of them to false"):
        load_config(["train.vocab_parallel=true", "train.cpu_offload=true"])

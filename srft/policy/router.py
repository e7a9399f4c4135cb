"""The loss that keeps the experts of a mixture evenly used, as the model's own training adds it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srft.batch import Batch
from srft.config import Config
from srft.policy.head import no_head
from srft.policy.model import compute
from srft.policy.parallel import World
from srft.policy.prefixes import prefixes_of


@dataclass(frozen=True)
class Load:
    """How tokens went to experts over one optimizer update, all micro-batches together.

    Args:
        assignments: [E] fp32, tokens that each expert took, summed over layers.
        rows: Tokens times routed layers.
    """

    assignments: Tensor
    rows: int


@dataclass(frozen=True)
class Router:
    """The auxiliary loss of Switch Transformer (2101.03961, Eq. 4 to 6) over all layers of a model.

    With E experts, f_e how often expert e is among the chosen ones of a row and P_e its mean probability, over all
    tokens and layers of an update: loss = coef E sum_e f_e P_e. f has no gradient; it counts the whole update, so that
    no split into micro-batches changes the loss.

    Args:
        coef: Factor of the loss, > 0.
        top_k: Experts chosen for a token.
    """

    coef: float
    top_k: int

    def load(self, router_logits: Seq[Tensor], batch: Batch) -> Load:
        """Count the choices.

        Args:
            router_logits: One [T, E] tensor a routed layer.
            batch: What they are of; a token that several sequences read counts for each.
        """
        logits = _rows(router_logits).detach()
        # through the probabilities, as models choose: two logits may round to the same one
        chosen = logits.softmax(-1).topk(self.top_k, dim=-1).indices
        times = _times(batch, len(router_logits))
        if times is None:
            return Load(torch.bincount(chosen.flatten(), minlength=logits.shape[1]).float(), len(logits))
        each = times.repeat_interleave(self.top_k)
        return Load(torch.bincount(chosen.flatten(), each, minlength=logits.shape[1]).float(), int(times.sum()))

    def loss(self, router_logits: Seq[Tensor], load: Load, batch: Batch) -> Tensor:
        """Return one micro-batch's share of the loss, 0-d fp32 with a gradient.

        Args:
            router_logits: One [T, E] tensor a routed layer.
            load: Of the whole update.
            batch: As for ``load``.
        """
        each, times = _rows(router_logits).softmax(-1), _times(batch, len(router_logits))
        probabilities = (each if times is None else each * times[:, None]).sum(0) / load.rows
        return self.coef * len(probabilities) * (load.assignments / load.rows * probabilities).sum()


def _times(batch: Batch, layers: int) -> Tensor | None:
    """How often each row of all layers counts, fp32; None: once."""
    shared = prefixes_of(batch.cu_seqlens, batch.cu_seqlens_k)
    return None if shared is None else shared.readers().float().repeat(layers).to(batch.input_ids.device)


def _rows(router_logits: Seq[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]).float() for x in router_logits])


def router_of(config: Config, model: PreTrainedModel) -> Router | None:
    """Return the auxiliary loss that the model's own training has; None for models that have none.

    ``output_router_logits`` of the configuration, which published models leave off, only says what inference returns.

    Args:
        config: The whole configuration; ``model.router_aux_coef`` overrides the model's coefficient.
        model: The policy.
    """
    own = next((c for name in ("router_aux_loss_coef", "aux_loss_coef") if (c := getattr(model, name, None))), 0.0)
    coef = own if config.model.router_aux_coef is None else config.model.router_aux_coef
    if not own or not coef:
        return None
    text = model.config.get_text_config()
    places = [
        (model, "num_experts_per_tok"), (text, "num_experts_per_tok"), (text, "moe_k"),
        (getattr(text, "ffn_config", None), "moe_top_k"),
    ]  # fmt: skip
    return Router(coef, next(k for place, name in places if (k := getattr(place, name, None))))


@torch.no_grad()
def whole_load(router: Router, model: PreTrainedModel, batches: list[Batch], dtype: torch.dtype, world: World) -> Load:
    """Count the choices over every micro-batch of an update, which the first one's gradient needs: a forward pass.

    Args:
        router: From ``router_of``.
        model: The policy.
        batches: All micro-batches of this rank.
        dtype: Precision of the forward pass.
        world: The ranks.
    """
    loads = []
    for batch in batches:
        load = router.load(router_logits(model, batch, dtype), batch)
        loads.append(Load(0 * load.assignments, 0) if batch.is_empty else load)
    *assignments, rows = world.sum(
        [*torch.stack([load.assignments for load in loads]).sum(0).tolist(), sum(load.rows for load in loads)]
    )
    return Load(loads[0].assignments.new_tensor(assignments), int(rows))


def router_logits(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return what the routers say of a batch, one [T, E] tensor a routed layer.

    Args:
        model: The policy.
        batch: Packed sequences.
        dtype: Precision of the forward pass.
    """
    return compute(model, batch, dtype, no_head, router_logits=True)[1]

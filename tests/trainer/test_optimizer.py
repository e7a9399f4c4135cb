"""The optimizer of a policy moves the parameters that it keeps."""

from __future__ import annotations

import torch

from srft.batch import pack
from srft.policy.forwards import packed_forward
from srft.policy.model import prepare_policy
from srft.policy.optimizer import make_optimizer
from srft.policy.parallel import joined
from tests.trainer.tiny import CPU, members, plain_model, random_groups, tiny_config


def test_a_sharded_policy_is_moved_whole_after_a_forward_without_a_backward() -> None:
    """FSDP2 leaves embedding, last norm and head gathered then; an optimizer of these would move nothing."""
    config = tiny_config("train.cpu_offload=true")
    (batch,) = pack(members(random_groups()), 10_000, CPU)
    with joined(config, CPU) as world:
        model = prepare_policy(plain_model(), config.model, 10_000, world)
        with torch.no_grad():
            packed_forward(model, batch, torch.float32)
        optimizer = make_optimizer(model, config)
        packed_forward(model, batch, torch.float32)[0].sum().backward()
        before = [p.full_tensor().clone() for p in model.parameters()]
        optimizer.step()
        still = [
            name
            for (name, p), old in zip(model.named_parameters(), before, strict=True)
            if torch.equal(p.full_tensor(), old)
        ]
    assert not still

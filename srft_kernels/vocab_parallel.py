"""An lm_head whose rows are spread over a process group: one collective of four numbers a token and chunk."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .rows.cpu import smoothed
from .rows.types import Smoothing, Stats
from .types import VocabParallel

__all__ = ["VocabParallel"]


# labels of a shard that are no column of it: those to skip, and those of other ranks
IGNORED, ELSEWHERE = -1, -2


# what torch has called so until 2.12 warns of another name from then on
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def of_all_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's tensor, [ranks, ...].

    Args:
        x: This rank's; of the same shape and dtype on all.
        group: The ranks; all of them call this.
    """
    out = x.new_empty(group.size() * x.numel())
    _all_gather(out, x.reshape(-1), group=group)
    return out.view(group.size(), *x.shape)


def local_labels(labels: Tensor, shard: VocabParallel, rows: int, ignore_index: int) -> Tensor:
    """Labels counted from this rank's first row; those of other ranks are ELSEWHERE.

    Args:
        labels: [n] int64 in the whole vocabulary, or ``ignore_index``, which becomes IGNORED.
        shard: Where this rank's rows are.
        rows: How many there are.
        ignore_index: Label of rows that are skipped.
    """
    local = labels - shard.vocab_start
    local = torch.where((local >= 0) & (local < rows), local, ELSEWHERE)
    return torch.where(labels == ignore_index, IGNORED, local)


def merge(known: Stats, here: Tensor, shard: VocabParallel) -> Stats:
    """Statistics of whole rows from those of every rank's columns; the same bits on every rank.

    Args:
        known: [C] each, of the columns of this rank.
        here: [C] bool, the label is among them.
        shard: Names the group.
    """
    # z_label - top
    label = torch.where(here, known.logprobs + known.log_sum, 0.0)
    own = torch.stack([known.top, known.log_sum, known.log_sum - known.entropy, label, here.to(label)])
    # float64: [R, C] numbers are few, and log_sum - entropy has lost a few bits already
    top_r, log_sum_r, mean_r, label_r, here_r = of_all_ranks(own, shard.group).double().unbind(1)
    top = top_r.amax(0)
    # a rank whose logits are all -inf has NaN for a mean, and no share
    some = top_r > -torch.inf
    below = torch.where(some, top_r - top, 0.0)
    share = torch.where(some, (log_sum_r + below).exp(), 0.0)
    total = share.sum(0)
    weighted = (share * torch.where(some, mean_r + below, 0.0)).sum(0)
    label_r = torch.where(some, label_r + below, -torch.inf)
    z_label = torch.where(here_r > 0, label_r, 0.0).sum(0)
    log_sum = total.log()
    # a label that no rank has is ignored
    found = here_r.amax(0) > 0
    logprobs = torch.where(found, z_label - log_sum, 0.0)
    entropy = torch.where(found, log_sum - weighted / total, 0.0)
    return Stats(*(x.to(known.top.dtype) for x in (logprobs, entropy, top, log_sum)))


def merge_smoothed(known: Stats, own: Stats, smoothing: Smoothing, shard: VocabParallel) -> Stats:
    """Statistics of whole smoothed rows; the same bits on every rank.

    Args:
        known: Of whole rows without smoothing.
        own: Of this rank's columns with a label smoothing of 1.
        smoothing: What is wanted.
        shard: Names the group.
    """
    lse, count = own.top + own.log_sum, own.entropy
    # sums over the possible words; a rank may have none
    mine = torch.stack([torch.where(count > 0, (own.logprobs + lse) * count, 0.0), count])
    total, count = of_all_ranks(mine, shard.group).double().sum(0)
    lse, mean = known.top.double() + known.log_sum.double(), total / count
    q = smoothed(known.logprobs.double(), lse, mean, smoothing).to(mine.dtype)
    # rows that are ignored have no words
    return Stats(torch.where(count > 0, q, known.logprobs), count.to(mine.dtype), known.top, known.log_sum)

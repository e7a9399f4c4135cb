"""The in-process engine: batched sampling with a KV cache on any transformers causal LM, without a GPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srft.engine.base import Completion, Ended, Sampling
from srft.engine.cache import make_cache
from srft.engine.one_query import sampling_attention
from srft.engine.stops import StopTexts
from srft.policy.loading import allocate, bare_copy
from srft.policy.weights import whole_tensors

# words of a vocabulary whose probabilities are added up first where it has more
_BLOCK = 1024


class HfEngine:
    """Samples from its own copy of the policy, so that weights arrive by ``update_weights`` as with any other engine.

    Args:
        model: The policy to copy.
        dtype: Precision of the copy.
        pad_token_id: Fills prompts of a batch up to the same length, on the left.
        max_batch: Sequences sampled at once.
        tokenizer: Reads the text of completions, for ``Sampling.stop``; None does without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        pad_token_id: int,
        max_batch: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._model = _own_copy(model, dtype)
        self._model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
        self._pad_token_id = pad_token_id
        self._max_batch = max_batch
        self._tokenizer = tokenizer
        self.version = self.restarts = 0

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[list[int]], ended: Ended | None = None
    ) -> list[list[Completion]]:
        """Draw completions; each depends on its seed and prompt, and on its batch mates only by rounding.

        Args:
            prompts: Token ids, at least one each.
            sampling: How to draw.
            seeds: ``seeds[p][k]`` is the seed of sample ``k`` of prompt ``p``, in [0, 2**63).
            ended: As ``Engine.generate`` has it; told of what stopped before the longest of its batch.

        Raises:
            ValueError: For an empty prompt, or stop texts without a tokenizer.
        """
        if any(not prompt for prompt in prompts):
            raise ValueError("every prompt needs at least one token")
        rows = [(p, seed) for p, prompt_seeds in enumerate(seeds) for seed in prompt_seeds]
        samples = [(p, k) for p, prompt_seeds in enumerate(seeds) for k in range(len(prompt_seeds))]
        # neighbours of similar length waste little padding
        order = sorted(range(len(rows)), key=lambda i: len(prompts[rows[i][0]]))
        drawn: list[Completion | None] = [None] * len(rows)
        for first in range(0, len(order), self._max_batch):
            chosen = order[first : first + self._max_batch]
            tell = None if ended is None else partial(_tell, ended, [samples[i] for i in chosen])
            batch = self._sample(
                [prompts[rows[i][0]] for i in chosen], sampling, [rows[i][1] for i in chosen], tell
            )
            for i, completion in zip(chosen, batch, strict=True):
                drawn[i] = completion
        flat = iter(drawn)
        return [[c for c in (next(flat) for _ in prompt_seeds) if c is not None] for prompt_seeds in seeds]

    def _sample(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int],
        tell: Callable[[int, list[int]], None] | None = None,
    ) -> list[Completion]:
        device = self._model.device
        uniforms = _uniforms(seeds, sampling.max_new_tokens).to(device)
        stop = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)
        texts = StopTexts(self._tokenizer, sampling.stop, sampling.min_new_tokens) if sampling.stop else None
        said: list[list[int]] = [[] for _ in prompts]
        # the completions of a prompt begin with one forward pass of it
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        ids, mask, positions = _left_pad(list(map(list, places)), self._pad_token_id, device)
        cache = make_cache(self._model.config)
        alive = torch.arange(len(prompts), device=device)  # rows of the result still being sampled
        tokens = torch.zeros(len(prompts), sampling.max_new_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(prompts), sampling.max_new_tokens, device=device)
        lengths = torch.full((len(prompts),), sampling.max_new_tokens, device=device)
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        ended = torch.zeros_like(stopped)  # by row of the running batch
        for t in range(sampling.max_new_tokens):
            logits = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float()  # fmt: skip
            if t == 0 and len(places) < len(prompts):
                own = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
                cache.batch_select_indices(own)
                logits, mask, positions = logits[own], mask[own], positions[own]
            if t < sampling.min_new_tokens:
                # a tokenizer may have more tokens than the model
                logits[:, stop[stop < logits.shape[-1]]] = -math.inf
            token, logprob = _draw(logits, sampling.temperature, uniforms[alive, t])
            tokens[alive, t], logprobs[alive, t] = token, logprob
            newly = torch.isin(token, stop) & ~ended
            if texts is not None:
                newly |= _completed(texts, said, alive, token, ended)
            lengths[alive[newly]] = t + 1
            stopped[alive[newly]] = True
            if tell is not None:
                for row in alive[newly].tolist():
                    tell(row, tokens[row, : t + 1].tolist())
            ended |= newly
            keep = (~ended).nonzero()[:, 0]
            if not len(keep):
                break
            if len(keep) <= 0.75 * len(alive):  # dropping ended rows copies the cache, so not for a few
                cache.batch_select_indices(keep)
                alive, token, mask, positions = alive[keep], token[keep], mask[keep], positions[keep]
                ended = ended[keep]
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return [
            Completion(row[:n], lp[:n], "stop" if done else "length", self.version)
            for row, lp, n, done in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True
            )
        ]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy these weights in; nothing is cached between calls.

        Args:
            named_tensors: Named as in the checkpoint.
            version: Carried by every later completion.
        """
        _copy_in(self._model, named_tensors)
        self.version = version

    @torch.no_grad()
    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before t) for t = 1 .. len-1, at temperature 1.

        Args:
            sequences: At least two tokens each.
        """
        rows = []
        for sequence in sequences:  # one at a time bounds the logits
            ids = torch.tensor([sequence], device=self._model.device)
            logits = self._model(input_ids=ids).logits[0, :-1].float()
            rows.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist())
        return rows

    def sleep(self) -> None:
        """Nothing to give back: it is no larger than its weights."""

    def close(self) -> None:
        """Nothing to release: the memory goes with the object."""


def _own_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy as transformers loads it in that precision: an attention that gives its own, frequencies in fp32."""
    config = copy.deepcopy(model.config)
    if (traits := getattr(model, "srft_traits", None)) is not None:
        config._attn_implementation = sampling_attention(traits.attention, dtype, traits.device)
    sampler = bare_copy(model, config)
    buffers = dict(model.named_buffers())
    unsaved = {
        (module, name): buffers[f"{path}.{name}" if path else name].clone()
        for path, module in sampler.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }
    sampler.to(dtype).requires_grad_(False)
    for (module, name), buffer in unsaved.items():
        setattr(module, name, buffer)
    device = model.device if traits is None else traits.device
    allocate(sampler, device, device)
    _copy_in(sampler, whole_tensors(model, dtype))
    return sampler


def _tell(ended: Ended, samples: list[tuple[int, int]], row: int, token_ids: list[int]) -> None:
    ended(*samples[row], token_ids)


def _in_one_piece(_head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The last hidden states, a slice of all, have strides that PyTorch multiplies by a copy of the weight for each."""
    return (inputs[0].contiguous(),)


@torch.no_grad()
def _copy_in(model: PreTrainedModel, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in named_tensors:
        own[name].copy_(tensor)


def _uniforms(seeds: list[int], count: int) -> Tensor:
    """[rows, count] uniform numbers in [0, 1), each row from its own seed alone."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of [rows, V] fp32 logits by inverting its cumulative distribution."""
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    if logits.shape[-1] > _BLOCK:
        token = _in_blocks(logprobs, uniform.double()[:, None])
    else:
        cumulative = logprobs.double().exp().cumsum(-1)
        # scaling by the total keeps the last token reachable when the sum falls short of 1 by rounding
        token = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)
        token = token.clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def _in_blocks(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [rows, 1] of [rows, V] log-probabilities: first a block, then a token in it, the one that fp64 adds up."""
    rows, vocab = logprobs.shape
    probabilities = logprobs.new_zeros(rows, -(-vocab // _BLOCK) * _BLOCK)
    torch.exp(logprobs, out=probabilities[:, :vocab])
    # [rows, blocks, _BLOCK]
    blocks = probabilities.unflatten(-1, (-1, _BLOCK))
    of_block = blocks.sum(-1).double()
    sums = of_block.cumsum(-1)
    target = uniform * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[-1] - 1)
    before = sums.gather(-1, block) - of_block.gather(-1, block)
    # [rows, _BLOCK]
    cumulative = blocks[torch.arange(rows, device=block.device), block[:, 0]].double().cumsum(-1)
    # the sum of a block in fp32 is not that of its tokens, and what is beyond their ends has a probability of 0
    within = torch.minimum((target - before).clamp_(min=0), cumulative[:, -1:] * (1 - 1e-9))
    return block * _BLOCK + torch.searchsorted(cumulative, within, right=True)


def _completed(
    texts: StopTexts, said: list[list[int]], alive: Tensor, token: Tensor, ended: Tensor
) -> Tensor:
    """[rows] bool: which running rows' new ``token`` completes a stop text; it is appended to what they ``said``."""
    flags = []
    for row, new, over in zip(alive.tolist(), token.tolist(), ended.tolist(), strict=True):
        said[row].append(new)
        flags.append(not over and texts.completed(said[row]))
    return torch.tensor(flags, device=token.device)


def _left_pad(sequences: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(s) for s in sequences)
    ids = torch.tensor([[pad] * (longest - len(s)) + s for s in sequences], device=device)
    real = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, real, (real.cumsum(-1) - 1).clamp_(min=0)

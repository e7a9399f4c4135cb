"""What a method is, and how one is found.

A method is one file with a class ``Method``: its options, what it learns from a group, what each token counts, what it
logs. The files of this folder are the built-in ones, under their own names; any other is named by its path.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import pkgutil
import reprlib
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from srft.batch import Batch
from srft.curves import TAKEN, Curves, Line
from srft.method import BaseMethod, Figure, Kind, Loss, StepInfo, UpdateInfo
from srft.responses import Group, Response
from srft_kernels import linear_token_loss

__all__ = [
    "DEFAULT", "Aggregation", "BaseMethod", "Curves", "Figure", "Kind", "Line", "Loss", "StepInfo", "UpdateInfo",
    "absolute_name", "ambiguous_term", "assign_advantages", "clip_share", "compared", "demo_share", "find_method",
    "group_advantages", "judged", "method_names", "place_in_method", "sft_and_rl", "token_weights",
]  # fmt: skip
DEFAULT = "srft"
Aggregation = Literal["token-mean", "sequence-mean", "constant", "sum"]


def assign_advantages(groups: Sequence[Group], method: BaseMethod) -> list[Response]:
    """Fill in every response's advantage and return those the method learns from.

    Args:
        groups: Prompt groups with rewards; modified in place.
        method: The method.
    """
    return [response for group in groups for response in _taught_by(group, method)]


def _taught_by(group: Group, method: BaseMethod) -> list[Response]:
    responses = method.learn_from(group)
    if not (isinstance(responses, list) and all(isinstance(response, Response) for response in responses)):
        raise ValueError(
            f"learn_from of method.name={method.name} must return a list of the group's responses, "
            f"got {reprlib.repr(responses)}; return those that are learned from"
        )
    return responses


def judged(responses: Sequence[Response]) -> list[Response]:
    """Return the responses that have a reward: the others take no part in training.

    Args:
        responses: Of one prompt.
    """
    return [response for response in responses if response.is_judged]


def compared(responses: Sequence[Response], divide_by_std: bool) -> list[Response]:
    """Give the judged ones among some responses their advantages within these, and return them.

    Args:
        responses: Of one prompt; modified in place.
        divide_by_std: As in ``group_advantages``.
    """
    members = judged(responses)
    advantages = group_advantages([member.reward for member in members], divide_by_std)
    for member, advantage in zip(members, advantages, strict=True):
        member.advantage = advantage
    return members


def group_advantages(rewards: Sequence[float], divide_by_std: bool) -> list[float]:
    """Compare each reward of a group with the group: (r - mean) / std.

    Args:
        rewards: Rewards of every member, rollouts and demonstrations alike, in [0, 1].
        divide_by_std: Divide by the unbiased standard deviation (SRFT paper, Eq. 7), or only subtract the mean.

    Returns:
        One advantage a member; all exactly 0 when every reward is the same, decided on the rewards themselves
        since a floating-point spread of equal numbers need not be 0.
    """
    if all(r == rewards[0] for r in rewards):
        return [0.0] * len(rewards)
    values = torch.tensor(rewards, dtype=torch.float64)
    centred = values - values.mean()
    return (centred / (values.std() + 1e-6) if divide_by_std else centred).tolist()


def token_weights(
    batch: Batch, update: UpdateInfo, how: Aggregation, *, together: bool = False, importance: bool = False
) -> Tensor:
    """Turn an aggregation into a factor of each token, for a term that is divided by the number of tokens of its kind.

    A weight of 1 gives the mean over tokens. The other aggregations divide by something else, which their weights
    make up for; tokens and sequences are counted over the whole update, the part of a rollout that is of a
    demonstration as a sequence of its own.

    Args:
        batch: One micro-batch.
        update: The update as a whole.
        how: "token-mean"; "sequence-mean", the mean over sequences of their token means; "constant", the mean over
            sequences of their token sums divided by ``max_new_tokens``; "sum", the sum over all tokens divided by
            ``max_new_tokens``, however many sequences there are.
        together: Rollouts and demonstrations are one kind, rather than counted apart.
        importance: For terms of rollouts: those that an older policy sampled count by ``Batch.importance``. The
            denominators stay.

    Returns:
        [N] fp32.
    """
    totals = update.totals
    counts = {
        False: (totals.rollout_tokens, totals.rollout_sequences),
        True: (totals.demo_tokens, totals.demo_sequences),
    }
    if together:
        counts = dict.fromkeys(counts, (totals.tokens, totals.rollout_sequences + totals.demo_sequences))

    def weight(of_demo: bool, own: int) -> float:
        tokens, sequences = counts[of_demo]
        if how == "token-mean":
            return 1.0
        if how == "sum":
            return tokens / update.max_new_tokens
        return tokens / max(1, sequences) / (own if how == "sequence-mean" else update.max_new_tokens)

    parts = [part for response in batch.sequences for part in response.parts]
    weights = torch.tensor([weight(*part) for part in parts], dtype=torch.float32)
    weights = weights.repeat_interleave(torch.tensor([tokens for _, tokens in parts])).to(batch.labels.device)
    return weights if batch.importance is None or not importance else weights * batch.importance


def sft_and_rl(
    batch: Batch,
    update: UpdateInfo,
    *,
    rl_weights: Tensor,
    sft_weights: Tensor,
    entropy_coef: float,
    clip_low: float | None,
    clip_high: float | None,
    sft_prob_factor: str = "one",
) -> Loss:
    """Return the loss of a method with the terms "policy", clipped on rollouts, and "sft", on demonstrations.

    Args:
        batch: One micro-batch.
        update: The update as a whole.
        rl_weights: [N] fp32, of the policy term, with its denominator; not read on demonstrations.
        sft_weights: [N] fp32, of the log-likelihood, with its denominator; not read on rollouts.
        entropy_coef: Coefficient of the entropy bonus, a mean over tokens of both kinds.
        clip_low: The ratio is clipped below 1 - clip_low; None: it is not.
        clip_high: The ratio is clipped above 1 + clip_high; None: it is not.
        sft_prob_factor: As in ``linear_token_loss``.
    """
    bonus = entropy_coef / max(1, update.totals.tokens)
    return partial(
        linear_token_loss, advantages=batch.advantages, old_logprobs=batch.old_logprobs,
        policy_weights=torch.where(batch.is_demo, 0.0, rl_weights * update.scale("policy")),
        sft_weights=torch.where(batch.is_demo, sft_weights * update.scale("sft"), 0.0),
        sft_prob_factor=sft_prob_factor,
        entropy_weights=torch.full_like(sft_weights, bonus) if bonus else None,
        clip_low=math.inf if clip_low is None else clip_low,
        clip_high=math.inf if clip_high is None else clip_high,
    )  # fmt: skip


def clip_share(terms: Mapping[str, float], update: UpdateInfo, tokens: int | None = None) -> Figure:
    """Return the share of tokens whose ratio was clipped.

    Args:
        terms: With the counts of clipped tokens, summed over the micro-batches.
        update: The update as a whole.
        tokens: Those that have a ratio; None: rollout tokens.
    """
    tokens = update.totals.rollout_tokens if tokens is None else tokens
    clipped = terms["clip_low_sum"] + terms["clip_high_sum"]
    return Figure(clipped / max(1, tokens), weight=tokens)


def demo_share(update: UpdateInfo) -> float:
    """Return the share of an update's prompts that teach by demonstrations, where each does by these or by rollouts.

    Args:
        update: The update as a whole.

    Returns:
        In [0, 1].
    """
    by_demos = update.totals.demo_sequences / update.demos_per_prompt
    prompts = by_demos + update.totals.rollout_sequences / update.rollouts_per_prompt
    return by_demos / prompts if prompts else 0.0


@functools.cache
def method_names() -> tuple[str, ...]:
    """Return the names of the built-in methods, which are the files of this folder."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find_method(name: str) -> type[BaseMethod]:
    """Return the class ``Method`` of a built-in method or of a file.

    Args:
        name: A name of ``method_names``, or a path that ends in .py, which is read again once it has changed.

    Raises:
        ValueError: When there is none, or the file does not hold one.
    """
    if name in method_names():
        return importlib.import_module(f"{__name__}.{name}").Method
    if name.endswith(".py"):
        path = Path(absolute_name(name))
        if not path.is_file():
            raise ValueError(f"method.name: there is no file {path}; give the path of one with a class Method")
        about = path.stat()
        return _load(path, about.st_mtime_ns, about.st_size)
    near = difflib.get_close_matches(name, method_names(), n=1)
    raise ValueError(
        f"method.name: expected {', '.join(method_names())} or path/to/file.py, got {name!r}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def absolute_name(name: str) -> str:
    """Return the name under which a method is found from any folder.

    Args:
        name: Of a built-in method, or a path that ends in .py.
    """
    return str(Path(name).expanduser().resolve()) if name.endswith(".py") else name


@functools.cache
def _load(path: Path, _changed_ns: int, _size: int) -> type[BaseMethod]:
    """The class ``Method`` of a file, once for each of its versions."""
    module = ModuleType(str(path))
    module.__file__ = str(path)
    # where pydantic looks up the types of the options, and ``place_in_method`` what is a method's
    sys.modules[module.__name__] = module
    try:
        source = path.read_bytes()
        with warnings.catch_warnings():
            # refused in one line below
            warnings.filterwarnings("ignore", "Field name .* shadows an attribute", UserWarning)
            # no importlib: its cache beside the file would hide a change within the same second
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"method.name: {place_in_method(error) or path} raised {type(error).__name__}: "
            f"{' '.join(str(error).split())}; mend the file"
        ) from error
    method = getattr(module, "Method", None)
    if not (isinstance(method, type) and issubclass(method, BaseMethod)):
        raise ValueError(f"method.name: {path} has no class Method(srft.methods.BaseMethod); name yours so")
    _refuse_slips(method, path)
    method.file_text = source.decode(errors="replace")
    return method


def _refuse_slips(method: type[BaseMethod], path: Path) -> None:
    """What pydantic lets a class do and a method must not."""
    taken = [option for option in method.model_fields if option != "name" and hasattr(BaseMethod, option)]
    if method.model_fields["name"].annotation is not str:
        taken.append("name")
    if taken:
        raise ValueError(
            f"method.name: class Method of {path} has an option {taken[0]}, which every method has already; rename the "
            "option, or leave out its type to set what every method has"
        )
    if missing := sorted(method.__abstractmethods__):
        raise ValueError(f"method.name: class Method of {path} lacks {' and '.join(missing)}; define it")
    if not (isinstance(method.curves, tuple) and all(isinstance(figure, Curves) for figure in method.curves)):
        raise ValueError(
            f"method.name: curves of class Method of {path} must be a tuple of Curves, got "
            f"{reprlib.repr(method.curves)}; a tuple of one ends with a comma"
        )
    if name := ambiguous_term(method.terms):
        raise ValueError(
            f"method.name: terms of class Method of {path} has {name}, whose gradient would be logged as "
            f"grad/{name}, which is of all terms of a kind; rename it"
        )
    names = [figure.name for figure in method.curves]
    if hidden := [name for name in names if name in TAKEN or names.count(name) > 1]:
        raise ValueError(
            f"method.name: curves of class Method of {path} has a figure {hidden[0]}, a name that another figure "
            "of the report has; rename it"
        )


def ambiguous_term(terms: Mapping[str, Kind]) -> str | None:
    """Return a term that has the name of a figure of all terms of a kind and is not that kind's only one, else None.

    Args:
        terms: Of a method.
    """
    kinds = list(terms.values())
    taken = (name for name in ("sft", "rl", "cosine") if name in terms)
    return next((name for name in taken if terms[name] != name or kinds.count(terms[name]) > 1), None)


def place_in_method(error: BaseException) -> str | None:
    """Return file and line of a user's method where an error arose in one, else None.

    Args:
        error: As caught.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in sys.modules]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None

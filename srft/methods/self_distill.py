"""Self-distillation: the teacher is the policy itself, which reads a demonstration before it judges its own rollouts.

    A_n = sg[ log pi(y_n | x with the demonstration) - log pi_theta(y_n | x) ]

and from there on as on-policy distillation. SDFT (arXiv 2601.19897) and OPSD (arXiv 2601.18734) are this on rollouts of
the policy without the demonstration. Both take KLs of whole distributions, of which nothing but the sampled token is
known here, so that this is a gradient of theirs by the estimate k1. Whose weights the teacher has is
``teacher_weights``: OPSD keeps those of the start. SDFT has a moving average, which would be one more model in memory;
"current" is its limit without memory, and the default since it needs no model at all. ``teacher_prompt`` is worded
after theirs.

What it costs that the teacher knows the answer, as others report: it prefers tokens that only one who has read the
demonstration would write, and the policy learns to speak as if it had (leakage; RLSD, arXiv 2604.03128); the policy's
style drifts towards that of the demonstrations (arXiv 2606.11709). A policy too small to learn from what stands in its
context teaches itself nothing: SDFT is reported to fail at 3B, and a tiny model built from scratch has never seen two
problems in a row.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import field_validator

from srft.methods.opd import Distillation

_CHAT = (
    "{prompt}\n\nHere is an example of a response to this:\n\n{demo}\n\nNow give a response of your own, with the "
    "reasoning that leads to it."
)
# where a completion goes on right after the prompt, the same problem twice: solved, and once more
_PLAIN = "{prompt}{demo}\n{prompt}"


class Method(Distillation):
    """Self-distillation: the policy that reads a demonstration teaches the one that does not."""

    needs_paired_demos: ClassVar[bool] = True
    shows_demos: ClassVar[bool] = True

    teacher_weights: Literal["current", "start"] = "current"
    """The teacher is the policy at the start of the step, or as the run starts (model.reference where that is set)."""
    teacher_prompt: str | None = None
    """What the teacher reads, with {prompt} and {demo} in it; a chat template takes it as the user's turn. Unset: a
    chat model is shown the demonstration after its prompt and asked for a response of its own, any other the prompt
    with the demonstration, and the prompt again."""

    @property
    def needs_demos(self) -> bool:  # type: ignore[override]
        """The teacher reads them."""
        return True

    @property
    def taught_by(self) -> str | None:
        """The policy itself, now or as it was."""
        return "policy" if self.teacher_weights == "current" else "reference"

    @field_validator("teacher_prompt")
    @classmethod
    def _has_both(cls, template: str | None) -> str | None:
        if template is not None and not ("{prompt}" in template and "{demo}" in template):
            raise ValueError("put {prompt} and {demo} where the teacher reads the two")
        return template

    def show(self, prompt: str, demo: str, is_chat: bool) -> str:
        """Put both into ``teacher_prompt``."""
        template = self.teacher_prompt or (_CHAT if is_chat else _PLAIN)
        words = {"{prompt}": prompt, "{demo}": demo}
        return re.sub(r"\{(?:prompt|demo)\}", lambda found: words[found[0]], template)

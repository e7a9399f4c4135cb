"""The same names and signatures in plain PyTorch: logits are materialised and autograd differentiates.

Only the arguments that say where things are kept are absent: vocab_parallel and weight_grad.

The only things taken from ``formulas`` are loss values; every derivative here comes from autograd, and
every weight that must carry no gradient is detached where it is made. fp64 inputs are computed in fp64, all
others in fp32.
"""

from .cross_entropy import linear_cross_entropy
from .grpo import linear_grpo_loss
from .logprobs import linear_logprobs, logprobs_from_logits
from .policy import linear_policy_loss
from .srft import linear_srft_loss
from .streams import linear_token_loss

__all__ = [
    "linear_cross_entropy",
    "linear_grpo_loss",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_srft_loss",
    "linear_token_loss",
    "logprobs_from_logits",
]

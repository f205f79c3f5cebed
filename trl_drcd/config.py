"""Configuration of the trainer: TRL's RLOO arguments, the paper's defaults, and what guidance and diversity add."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import RLOOConfig

from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.messages import short_repr

# Fields of `generation_kwargs` that leave the sampled distribution as it is
_HARMLESS_GENERATION_KWARGS = frozenset({"cache_implementation", "cache_config", "compile_config", "disable_compile"})

_LEAST = {
    "diversity_warmup_steps": 0,
    "sample_steps": 0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 1,
    "ddp_timeout": 1,
}


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
        negative_prompt (`str`, *optional*):
            x^- of Eq. (1) for rows without a `negative_prompt` of their own. `None` is the unconditional prompt.
        diversity_coef (`float`, *optional*, defaults to 0.0):
            beta of Eq. (5); the paper uses 0, 5, 10 and 15.
        diversity_warmup_steps (`int`, *optional*, defaults to 1000):
            Steps over which `diversity_coef` rises linearly from 0.
        on_bad_batch (`str`, *optional*, defaults to `"stop"`):
            What happens where a reward, an embedder, the teacher, the student or a gradient gives NaN or infinity, or
            an embedder or a reward raises: `"stop"` saves a checkpoint of the state before that update and raises,
            `"skip"` leaves the update out and goes on (not under DeepSpeed, not with `fp16`).
        ddp_timeout (`int`, *optional*, defaults to 600):
            Seconds that a process waits for the others before the run ends with an error; more than any process needs
            between two exchanges, such as its share of a rollout or the writing of a checkpoint.
        sample_steps (`int`, *optional*, defaults to 0):
            Every so many steps, completions of `sample_prompts` go to the log (audio or text). 0 turns it off.
        sample_prompts (`list[str]`, *optional*):
            Fixed prompts for `sample_steps`; `None` takes the first two of the evaluation set, else of the training
            set.

    Raises:
        TypeError: If a value is of another type than its field.
        ValueError: If sampling is not from the distribution that is scored (`top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `generation_kwargs`, dropout), or a value is out of its range.
    """

    learning_rate: float = field(default=1.5e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences per process and forward."})
    gradient_accumulation_steps: int = field(
        default=8, metadata={"help": "Forwards per update; 16 x 8 is the paper's batch of 128 on one process."}
    )
    temperature: float = field(default=0.99, metadata={"help": "T of the sampling and of the KL."})
    num_generations: int = field(default=4, metadata={"help": "G, generations per prompt; at least 2."})
    beta: float = field(
        default=0.0,
        metadata={
            "help": "TRL's KL penalty to the unguided base, unused here; beta of the paper is `diversity_coef`."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Dropout off, so that what was sampled is what is scored."}
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "gamma of the teacher's classifier-free guidance."})
    negative_prompt: str | None = field(
        default=None, metadata={"help": "Negative prompt of the teacher; None is the unconditional prompt."}
    )
    diversity_coef: float = field(default=0.0, metadata={"help": "beta of the paper: weight of the diversity reward."})
    diversity_warmup_steps: int = field(
        default=1000, metadata={"help": "Steps over which diversity_coef rises linearly from 0."}
    )
    on_bad_batch: str = field(
        default="stop",
        metadata={"help": "On NaN, infinity or a raising embedder or reward: stop (after a checkpoint) or skip."},
    )
    ddp_timeout: int = field(
        default=600, metadata={"help": "Seconds that a process waits for the others before the run ends."}
    )
    sample_steps: int = field(
        default=0, metadata={"help": "Log samples of fixed prompts every so many steps; 0 is off."}
    )
    sample_prompts: list[str] | None = field(default=None, metadata={"help": "Prompts of these samples."})

    def __post_init__(self) -> None:
        check_types(self)
        self._check_sampling()
        self._check_ranges()
        self._check_texts()
        if self.bf16 is None and not self.fp16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16 = False  # TRL's default would be an error on a machine without a GPU
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """What `training_args.bin` holds: everything but the user's token."""
        return self.__dict__ | {"hub_token": None}

    def _check_sampling(self) -> None:
        """Refuse what would make the sampled distribution another one than the scored one."""
        neutral = {
            "top_k": (0, -1, None),
            "top_p": (1.0, None),
            "min_p": (None, 0.0),
            "repetition_penalty": (1.0, None),
        }
        for name, allowed in neutral.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}={getattr(self, name)}` samples from another distribution than the one that the KL and "
                    f"the policy gradient score; set `{name}={allowed[0]}`"
                )
        kwargs = self._generation_kwargs()
        if changed := sorted(set(kwargs) - _HARMLESS_GENERATION_KWARGS):
            raise ValueError(
                f"`generation_kwargs` has {changed}, which may change the sampled distribution or the length behind "
                f"the trainer's back; allowed are {sorted(_HARMLESS_GENERATION_KWARGS)}"
            )
        if not self.disable_dropout:
            raise ValueError(
                "`disable_dropout=False` would score other networks than the one that sampled; set it to True"
            )

    def _generation_kwargs(self) -> dict[str, Any]:
        """The field, which may be a mapping in JSON."""
        try:
            kwargs = json.loads(given) if isinstance(given := self.generation_kwargs or {}, str) else given
        except ValueError:
            kwargs = None
        if not isinstance(kwargs, dict):
            raise ValueError(f"`generation_kwargs={short_repr(given)}` must be a mapping, or one in JSON")
        return kwargs

    def _check_ranges(self) -> None:
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1):
            raise ValueError(
                f"`guidance_scale` must be finite and at least 1 (the paper's is 3), got {self.guidance_scale}"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"`temperature` must be finite and above 0 (the paper's is 0.99), got {self.temperature}")
        if not (math.isfinite(self.diversity_coef) and self.diversity_coef >= 0):
            raise ValueError(f"`diversity_coef` must be finite and at least 0, got {self.diversity_coef}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"`learning_rate` must be finite and at least 0, got {self.learning_rate}")
        if not all(map(math.isfinite, self.reward_weights or [])):
            raise ValueError(f"`reward_weights` must be finite, got {self.reward_weights}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if self.on_bad_batch not in ("stop", "skip"):
            raise ValueError(f"`on_bad_batch` must be 'stop' or 'skip', got {self.on_bad_batch!r}")
        if self.on_bad_batch == "skip" and self.fp16:
            raise ValueError("`on_bad_batch='skip'` does not go with the gradient scaler of `fp16=True`; use `bf16`")
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be at least 2 (diversity compares generations of one prompt, and TRL's "
                f"sampler asks for it also without), got {self.num_generations}"
            )
        if self.beta != 0:
            raise ValueError(
                f"`beta={self.beta}` is TRL's KL penalty to the base without guidance, which pulls against the guided "
                "teacher; set `beta=0` (the paper's beta is `diversity_coef`)"
            )
        if self.generation_batch_size is None and self.steps_per_generation is None:
            processes = int(os.environ.get("WORLD_SIZE", 1))  # transformers has not started its own yet
            rollout = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
            if rollout % self.num_generations:
                raise ValueError(
                    f"`per_device_train_batch_size={self.per_device_train_batch_size}` x `gradient_accumulation_steps="
                    f"{self.gradient_accumulation_steps}` x {processes} processes are {rollout} sequences, which "
                    f"must be a multiple of `num_generations={self.num_generations}`; change one of them"
                )

    def _check_texts(self) -> None:
        if self.sample_prompts is not None and not (self.sample_prompts and all(map(str.strip, self.sample_prompts))):
            raise ValueError(
                f"`sample_prompts` must hold at least one prompt, and texts that are not empty, got "
                f"{self.sample_prompts}; leave it out for the first prompts of the data"
            )
        texts = [("negative_prompt", self.negative_prompt or "")]
        texts += [("sample_prompts", text) for text in self.sample_prompts or []]
        for name, text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"`{name}` must be valid Unicode, got {short_repr(text)}, which has half a character")

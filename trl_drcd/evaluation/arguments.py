"""The arguments of an evaluation, of the command line or a YAML file, with their types and ranges."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_drcd.evaluation.strategies import KEYS
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.token_ids import as_entries

LEAST = {
    "num_prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 1, "batch_size": 1, "num_processes": 1, "listen": 0,
    "listen_samples": 1, "seed": 0,
}  # fmt: skip
"""The smallest value of each number."""


@dataclass
class EvaluateArguments:
    """What `trl-drcd evaluate` takes; `--config FILE.yaml` gives the same from a file, `strategies` only there."""

    model: str = field(metadata={"help": "The base model, which with guidance is also the teacher."})
    dataset: str = field(
        metadata={
            "help": "Held-out prompts: JSONL, CSV or Parquet file, or hub name; column `prompt`, and perhaps "
            "`negative_prompt`, each prompt's own x^-, and `teacher_prompt`, which is read with guidance in its place."
        }
    )
    strategies: Any = field(
        default_factory=lambda: [{"name": "base"}],
        metadata={"help": "List of what is compared; in the YAML file. Its keys are at the end."},
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of the strategies to do; all if none."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a hub data set."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of the results."})
    num_prompts: int = field(default=64, metadata={"help": "Held-out prompts."})
    samples_per_prompt: int = field(default=8, metadata={"help": "Samples of each, at least 2."})
    max_new_tokens: int = field(default=200, metadata={"help": "Largest length of a completion, in tokens or steps."})
    batch_size: int = field(default=64, metadata={"help": "Sequences at one time."})
    num_processes: int = field(default=1, metadata={"help": "Rows at one time, each in a process of its own."})
    dtype: str = field(default="float32", metadata={"help": "Of the models: float32, bfloat16 or float16."})
    guidance_scale: float = field(default=3.0, metadata={"help": "gamma of the teacher that the KL is taken to."})
    negative_prompt: str | None = field(
        default=None, metadata={"help": "x^- of the teacher, for prompts without their own."}
    )
    chat_template_kwargs: Any = field(
        default=None, metadata={"help": "Passed to the chat template, as in training: a mapping, or JSON."}
    )
    allowed_token_ids: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens of completions, as in training: ids, names, or ranges FIRST..LAST; by default those that "
            "the models' generation configs do not suppress."
        },
    )
    omega: str = field(
        default="5",
        metadata={
            "help": "quality = omega * adherence + preference: a number, the paper's 5, or `equal`, which gives both "
            "parts the same range (largest minus smallest mean) over the rows."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the draws; the same for every strategy."})
    codec: str | None = field(default=None, metadata={"help": "Codec of a causal LM over audio tokens."})
    embedder: str | None = field(
        default=None, metadata={"help": "E, which was rewarded: a folder, a hub name, or your own `module.function`."}
    )
    second_embedder: str | None = field(
        default=None, metadata={"help": "An embedding that was not rewarded, likewise."}
    )
    judge: str | None = field(default=None, metadata={"help": "Text-audio judge, or sentence encoder for text."})
    reference: str | None = field(
        default=None, metadata={"help": "Held-out recordings under the judge, for the Fréchet distance (safetensors)."}
    )
    clap: str | None = field(default=None, metadata={"help": "A CLAP checkpoint as one more judge of adherence."})
    cross_encoder: str | None = field(
        default=None, metadata={"help": "Text: a cross-encoder as one more judge of adherence."}
    )
    reward_model: str | None = field(default=None, metadata={"help": "Text: a reward model, its reward a metric."})
    preference: str | None = field(default=None, metadata={"help": "Preference model."})
    prompt_information: bool = field(
        default=False, metadata={"help": "Measure what samples tell about their prompts under the frozen base."}
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "More metrics, each `module.function` with TRL's reward signature: higher is better."},
    )
    listen: int = field(default=4, metadata={"help": "Prompts on the page."})
    listen_samples: int = field(
        default=2, metadata={"help": "Samples of each of them and of each strategy, kept in `samples/`."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            TypeError: If a value is of another type than its field.
            ValueError: If it is out of its range.
        """
        self.omega = str(self.omega)  # a number in a YAML file
        self.allowed_token_ids = as_entries(self.allowed_token_ids)
        self.chat_template_kwargs = _mapping("chat_template_kwargs", self.chat_template_kwargs)
        check_types(self)
        for name, value in LEAST.items():
            if getattr(self, name) < value:
                raise ValueError(f"`{name}` must be at least {value}, got {getattr(self, name)}")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be finite and at least 0, got {self.guidance_scale}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {short_repr(self.dtype)}")
        if self.omega != "equal" and not _is_finite(self.omega):
            raise ValueError(f"`omega` must be a number or `equal`, got {short_repr(self.omega)}")


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _mapping(name: str, given: object) -> dict[str, Any] | None:
    """A mapping, also as JSON, which a command line gives."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError(f"`{name}` must be a mapping, or JSON of one, got {short_repr(given)}") from None
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
        raise TypeError(f"`{name}` must be a mapping, or JSON of one, got {short_repr(given)}")
    return dict(given) if given else None


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of what stands below the arguments, and shows defaults."""


def help_on_strategies() -> str:
    """What stands below the arguments in `--help`: the YAML file, and what a strategy in it may say."""
    lines = [
        textwrap.fill(f"{key}: {text}", 100, initial_indent="  ", subsequent_indent="      ")
        for key, text in KEYS.items()
    ]
    return "\n".join(
        [
            "keys of a strategy:",
            *lines,
            "One of guidance_scale, temperature and interpolation_weight may be a list, which makes a curve of it.",
            "",
            "--config FILE.yaml, for example:",
            "",
            "  model: my/model",
            "  dataset: prompts.jsonl",
            "  strategies:",
            "    - {name: base}",
            "    - {name: CFG, guidance_scale: [1.5, 3, 7], negative_prompt: Bad audio quality.}",
            "    - {name: temperature, temperature: [0.7, 1.3]}",
            "    - {name: trained, model: outputs/quality, diversity_coef: 0}",
            "    - {name: LERP, models: [outputs/quality, outputs/diversity], interpolation_weight: [0, 0.5, 1]}",
        ]
    )

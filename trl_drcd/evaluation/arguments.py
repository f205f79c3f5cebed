"""Arguments of an evaluation, from the command line or a YAML file, with their types and ranges."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_drcd.evaluation.strategies import KEYS, SWEPT
from trl_drcd.validation.field_types import check_types
from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.token_ids import as_entries

LEAST = {
    "num_prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 1, "batch_size": 1, "num_processes": 1, "listen": 0,
    "listen_samples": 1, "seed": 0, "skip_prompts": 0,
}  # fmt: skip
"""The smallest value of each number."""


@dataclass
class EvaluateArguments:
    """Arguments of `trl-drcd evaluate`; `--config FILE.yaml` reads them from a file, `strategies` only from there."""

    model: str = field(metadata={"help": "The base model; with guidance it is also the teacher."})
    dataset: str = field(
        metadata={
            "help": "Held-out prompts: JSONL, CSV or Parquet file, or Hub name; column `prompt` and optionally "
            "`negative_prompt`, each prompt's own x^-, and `teacher_prompt`, which replaces it with guidance."
        }
    )
    strategies: Any = field(
        default_factory=lambda: [{"name": "base"}],
        metadata={"help": "List of the strategies to compare, only in the YAML file; for their keys see below."},
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of the strategies to run; all if empty."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a data set on the Hub."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of the results."})
    num_prompts: int = field(default=64, metadata={"help": "Number of held-out prompts."})
    skip_prompts: int = field(
        default=0, metadata={"help": "Leave out this many prompts first, such as those that settings were chosen on."}
    )
    samples_per_prompt: int = field(default=8, metadata={"help": "Samples of each prompt, at least 2."})
    likelihood_samples: int | None = field(
        default=None,
        metadata={
            "help": "Samples of each prompt on which KL and entropy are measured, all if not given; measuring them "
            "takes as long as sampling."
        },
    )
    max_new_tokens: int = field(default=200, metadata={"help": "Largest length of a completion, in tokens or steps."})
    batch_size: int = field(default=64, metadata={"help": "Sequences per batch."})
    num_processes: int = field(default=1, metadata={"help": "Processes, each of which measures one row at a time."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Data type of models: float32, bfloat16, float16, or auto, which is bfloat16 where the machine "
            "computes in it, else float32: emulated, it takes three times as long."
        },
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "gamma of the teacher in the metric `kl`."})
    negative_prompt: str | None = field(
        default=None, metadata={"help": "x^- of the teacher, for prompts without their own."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "As in training: system turn for every prompt that has none; strings become conversations."},
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
            "help": "quality = omega * adherence + preference: a number (the paper: 5), or `equal`, which gives both "
            "terms the same range (largest minus smallest mean) over the points."
        },
    )
    seed: int = field(default=0, metadata={"help": "Random seed of the samples; the same for every strategy."})
    codec: str | None = field(default=None, metadata={"help": "Codec of a causal LM over audio tokens."})
    embedder: str | None = field(
        default=None, metadata={"help": "E of the reward: a folder, a Hub name, or your own `module.function`."}
    )
    second_embedder: str | None = field(
        default=None, metadata={"help": "A second embedder, which was not rewarded; given like `embedder`."}
    )
    judge: str | None = field(
        default=None, metadata={"help": "Judge of adherence: a text-audio judge, or a sentence encoder for text."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Statistics of held-out recordings under the judge (safetensors), for the Fréchet distance."
        },
    )
    clap: str | None = field(
        default=None, metadata={"help": "Audio: a CLAP checkpoint, a further judge of adherence."}
    )
    cross_encoder: str | None = field(
        default=None, metadata={"help": "Text: a cross-encoder, a further judge of adherence."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Text: a reward model, whose reward becomes a metric."}
    )
    preference: str | None = field(default=None, metadata={"help": "Audio: a preference model."})
    prompt_information: bool = field(
        default=False,
        metadata={"help": "Measure the mutual information of samples and prompts under the frozen base."},
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={"help": "Further metrics, each a `module.function` with TRL's reward signature; higher is better."},
    )
    listen: int = field(default=4, metadata={"help": "Number of prompts with samples in the report."})
    listen_samples: int = field(
        default=2, metadata={"help": "Samples per prompt and strategy in the report, kept in `samples/`."}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            TypeError: If a value does not have the type of its field.
            ValueError: If a value is out of range.
        """
        self.omega = str(self.omega)  # a number in a YAML file
        self.allowed_token_ids = as_entries(self.allowed_token_ids)
        self.chat_template_kwargs = _mapping("chat_template_kwargs", self.chat_template_kwargs)
        check_types(self)
        for name, value in LEAST.items():
            if getattr(self, name) < value:
                raise ValueError(f"`{name}` must be at least {value}, got {getattr(self, name)}")
        if not 1 <= self.scored_samples <= self.samples_per_prompt:
            raise ValueError(
                f"`likelihood_samples` must be from 1 to `samples_per_prompt={self.samples_per_prompt}`, got "
                f"{self.likelihood_samples}"
            )
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be finite and at least 0, got {self.guidance_scale}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be auto, float32, bfloat16 or float16, got {short_repr(self.dtype)}")
        if self.omega != "equal" and not _is_finite(self.omega):
            raise ValueError(f"`omega` must be a number or `equal`, got {short_repr(self.omega)}")
        if self.dtype == "auto":
            from trl_drcd.precision import has_native_bfloat16

            self.dtype = "bfloat16" if has_native_bfloat16() else "float32"

    @property
    def scored_samples(self) -> int:
        """`likelihood_samples`, or all."""
        return self.samples_per_prompt if self.likelihood_samples is None else self.likelihood_samples


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _mapping(name: str, given: object) -> dict[str, Any] | None:
    """Check a mapping, or parse it from JSON, as given on the command line."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError(f"`{name}` must be a mapping, or JSON of one, got {short_repr(given)}") from None
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
        raise TypeError(f"`{name}` must be a mapping, or JSON of one, got {short_repr(given)}")
    return dict(given) if given else None


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the epilog and shows defaults."""


def help_on_strategies() -> str:
    """Epilog of `--help`: the keys of a strategy, and an example of the YAML file."""
    lines = [
        textwrap.fill(f"{key}: {text}", 100, initial_indent="  ", subsequent_indent="      ")
        for key, text in KEYS.items()
    ]
    return "\n".join(
        [
            "keys of a strategy:",
            *lines,
            f"One of {', '.join(SWEPT)} may be a list: one row per value, one curve.",
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
            "    - {name: training, model: outputs/quality, checkpoint: [20, 60, 120]}",
        ]
    )

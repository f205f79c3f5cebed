"""Model cards of training runs: base model, settings, how to sample, and metrics."""

from __future__ import annotations

import json
import logging
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.files import local_name, write_text
from trl_drcd.guidance import EarlySteps
from trl_drcd.markdown import markdown_table, markdown_text
from trl_drcd.policies import DiaPolicy, Policy
from trl_drcd.prompts import Prompt
from trl_drcd.validation.model_folders import is_hub_name

logger = logging.getLogger(__name__)

PAPER = "https://huggingface.co/papers/2410.06084"
CITATION = {
    "title": "Diversity-Rewarded CFG Distillation",
    "id": "2410.06084",
    "citation": textwrap.dedent("""\
        @inproceedings{cideron2025diversity,
            title     = {{Diversity-Rewarded CFG Distillation}},
            author    = {Geoffrey Cideron and Andrea Agostinelli and Johan Ferret and Sertan Girgin and Romuald Elie and Olivier Bachem and Sarah Perrin and Alexandre Ram{\\'e}},
            year      = 2025,
            booktitle = {International Conference on Learning Representations},
        }"""),  # noqa: E501
}
PROMPTS = {"text": "Write a short poem.", "dia": "[S1] Good morning."}  # of the example, by family
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
SETTINGS = (
    *("guidance_scale", "early_steps", "early_guidance_scale", "negative_prompt", "temperature"),
    *("diversity_coef", "diversity_warmup_steps"),
    *("num_generations", "learning_rate", "max_completion_length", "bf16", "seed"),
)
Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class TrainedModel:
    """
    The contents of a model card.

    Args:
        base (`str`): Hub name or folder of the base model.
        family (`str`): `"text"`, `"audio tokens"` (a causal LM with a codec), `"musicgen"` or `"dia"`.
        adapter (`bool`): Whether a PEFT adapter was trained instead of all weights.
        steps (`int`): Number of updates; 0 for an untrained model.
        guidance_scale (`float`): gamma of the teacher.
        temperature (`float`): T.
        max_completion_length (`int`): Maximum length of a completion, in tokens or, for MusicGen and Dia, decoder
            steps.
        conversational (`bool`): Whether prompts are chat turns.
        system_prompt (`str`, *optional*): The system turn that all prompts begin with.
        chat_template_kwargs (`Mapping`): Passed to the chat template.
        settings (`Mapping`): Rows of the table of settings.
        early ([`~trl_drcd.guidance.EarlySteps`], *optional*): The teacher's early steps.
    """

    base: str
    family: str
    adapter: bool
    steps: int
    guidance_scale: float
    temperature: float
    max_completion_length: int | None
    conversational: bool = False
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    early: EarlySteps | None = None


def trained_model(
    model: PreTrainedModel | PeftModel,
    args: CFGDistillDiversityConfig,
    state: TrainerState,
    policy: Policy,
    prompts: Sequence[Prompt],
    has_codec: bool,
    settings: Mapping[str, object],
    steps: int | None = None,
) -> TrainedModel:
    """
    Collect the contents of a model card from a trainer.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The unwrapped model.
        args ([`CFGDistillDiversityConfig`]): The trainer's arguments.
        state (`TrainerState`): The trainer's state, with the number of updates.
        policy ([`Policy`]): The policy of the model's family.
        prompts (`list`): Some training prompts, texts or conversations.
        has_codec (`bool`): Whether completions are decoded to audio.
        settings (`Mapping`): Additional rows at the top of the table of settings.
        steps (`int`, *optional*): Updates of the weights, if they are not the last ones.

    Returns:
        [`TrainedModel`]: The contents.
    """
    steps, coef = state.global_step if steps is None else steps, args.diversity_coef
    system, kwargs = shared_system_prompt(prompts), cast(dict, args.chat_template_kwargs or {})
    rows: dict[str, object] = {
        "steps": steps,
        "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    if isinstance(model, PeftModel):
        rows["LoRA rank"] = getattr(model.active_peft_config, "r", None)
    rows |= {**settings, **{name: getattr(args, name) for name in SETTINGS}}
    if system is not None:
        rows["system_prompt"] = system
    if args.allowed_token_ids:
        rows["allowed_token_ids"] = ", ".join(args.allowed_token_ids)
    if coef and steps:
        rows["diversity_coef reached"] = args.diversity_coef_at(steps - 1, state.max_steps)
    return TrainedModel(
        base=base_of(model),
        family=_family(policy, has_codec),
        adapter=isinstance(model, PeftModel),
        steps=steps,
        guidance_scale=args.guidance_scale,
        temperature=args.temperature,
        max_completion_length=args.max_completion_length,
        conversational=any(not isinstance(prompt, str) for prompt in prompts),
        system_prompt=system,
        chat_template_kwargs=kwargs,
        settings=rows,
        early=args.early,
    )


def shared_system_prompt(prompts: Sequence[Prompt]) -> str | None:
    """The text of the system turn that all prompts begin with; `None` if they have none, or different ones."""
    firsts = [prompt[0] if not isinstance(prompt, str) and prompt else {} for prompt in prompts]
    texts = [str(turn.get("content")) if turn.get("role") == "system" else None for turn in firsts]
    is_text = all(isinstance(turn.get("content"), str) for turn in firsts)  # else parts, of which the card has none
    return texts[0] if is_text and len({*texts}) == 1 else None


def _family(policy: Policy, has_codec: bool) -> str:
    if isinstance(policy, DiaPolicy):
        return "dia"
    return "musicgen" if policy.has_own_codec else "audio tokens" if has_codec else "text"


def base_of(model: PreTrainedModel | PeftModel) -> str:
    """Hub name or folder that a model, or the base of an adapter, was loaded from; empty if it was not loaded."""
    if isinstance(model, PeftModel):
        return str(model.active_peft_config.base_model_name_or_path or "")
    return str(model.config._name_or_path or "")


def final_metrics(
    log_history: Sequence[Mapping[str, float]], held_out: bool, steps: int | None = None
) -> dict[str, dict[str, float]]:
    """
    Metrics before and after training, for the model card.

    Args:
        log_history (`list[dict]`): The trainer's log.
        held_out (`bool`): Use the metrics of the evaluation sets instead of those of the training steps.
        steps (`int`, *optional*): Updates of the weights, if they are not those at the end of the log.

    Returns:
        `dict`: `"first (step 0)"` and `"last (step 60)"` to `kl`, `kl_per_token` and `entropy` in nats, `diversity`;
        of several evaluation sets with their names, `"short, first (step 0)"`.
    """
    prefix = "eval_" if held_out else ""
    entries = [entry for entry in log_history if f"{prefix}kl" in entry and (steps is None or entry["step"] <= steps)]
    sets: dict[str, list[Mapping[str, float]]] = {}
    for entry in entries:
        sets.setdefault(_evaluation_set(entry), []).append(entry)
    return {
        f"{name}{which} (step {entry['step']})": {
            key: entry[prefix + key] for key in ("kl", "kl_per_token", "entropy", "diversity") if prefix + key in entry
        }
        for name, group in sets.items()
        for which, entry in {"first": group[0], "last": group[-1]}.items()
    }


def _evaluation_set(entry: Mapping[str, float]) -> str:
    """Of an entry of the log of one of several evaluation sets, its name and a comma; else nothing."""
    losses = (key for key in entry if key.startswith("eval_") and key.endswith("_loss") and key != "eval_loss")
    return next((f"{key.removeprefix('eval_').removesuffix('_loss')}, " for key in losses), "")


# ---------------------------------------------------------------- the base


def base_metadata(base: str) -> dict[str, object]:
    """
    Metadata of the base model's card that also applies to models derived from it.

    Args:
        base (`str`): Hub name or folder.

    Returns:
        `dict`: `base_model`, a Hub name (for a folder, the `base_model` of its card, as a local path is of no use to
        others); and `license`, `license_name`, `license_link`. Unknown entries are left out.
    """
    folder = Path(base)
    try:
        card = ModelCard.load(folder / "README.md" if folder.is_dir() else base).data.to_dict()
    except Exception as error:  # a broken card must not make a finished run fail
        logger.debug(f"no model card of {base}: {error}")
        card = {}
    found = {name: card[name] for name in ("license", "license_name", "license_link") if card.get(name)}
    name = card.get("base_model") if folder.is_dir() else base if is_hub_name(base) else None
    return found | ({"base_model": name} if name else {})


# ---------------------------------------------------------------- the card


def write_card(folder: str | Path, model: TrainedModel, metrics: Metrics, license: str | None = None) -> None:
    """
    Write `README.md` of a trained model.

    Args:
        folder (`str` or `Path`): Folder of the model; its name is the title.
        model ([`TrainedModel`]): Contents of the card.
        metrics (`Mapping`): See [`final_metrics`].
        license (`str`, *optional*): Identifier of the licence; defaults to the base model's.
    """
    folder = Path(folder)
    extras = [name for name in ("samples", "codec") if (folder / name).is_dir()]
    here = os.path.relpath(folder)
    path = None if here.startswith(os.pardir) else here  # no path of this machine outside its working directory
    write_text(folder / "README.md", str(model_card(folder.resolve().name, model, metrics, license, extras, path)))


def model_card(
    name: str,
    model: TrainedModel,
    metrics: Metrics,
    license: str | None = None,
    extras: Sequence[str] = (),
    path: str | None = None,
) -> ModelCard:
    """
    The README.md of a distilled model: YAML header and text.

    Args:
        name (`str`): Title.
        model ([`TrainedModel`]): Contents of the card.
        metrics (`Mapping`): See [`final_metrics`].
        license (`str`, *optional*): Identifier of the licence; defaults to the base model's.
        extras (`Sequence[str]`): Additional folders of the model: `"samples"`, `"codec"`.
        path (`str`, *optional*): Where the example finds the model; by default the folder `name`.

    Returns:
        `ModelCard`: The card.
    """
    header = base_metadata(model.base) | ({"license": license} if license else {})
    if "base_model" in header:
        header["base_model_relation"] = "adapter" if model.adapter else "finetune"
    data = ModelCardData(
        library_name="peft" if model.adapter else "transformers",
        # `pipeline("text-to-audio")` would return the token ids of an audio-token model as audio
        pipeline_tag={"musicgen": "text-to-audio", "dia": "text-to-speech"}.get(model.family, "text-generation"),
        tags=["trl", "trl-drcd", "cfg-distillation", *(["music"] if model.family not in ("text", "dia") else [])],
    )
    for key, value in header.items():
        data[key] = value
    template = Environment(keep_trailing_newline=True, undefined=StrictUndefined).from_string(
        TEMPLATE.read_text("utf-8")
    )
    text = template.render(
        header=data.to_yaml(),
        title=markdown_text(name),
        name=json.dumps(path or name),
        model=model,
        base=_code(local_name(model.base)) if model.base else "a model that was not loaded by name",
        license_known="license" in header,
        prompt=json.dumps(PROMPTS.get(model.family, "a slow tune")),
        system=None if model.system_prompt is None else json.dumps(model.system_prompt),
        template_kwargs="".join(f", {name}={value!r}" for name, value in model.chat_template_kwargs.items()),
        paper=PAPER,
        extras=extras,
        settings=markdown_table({key: {"value": value} for key, value in model.settings.items()}),
        metrics=markdown_table(metrics) if metrics else "",
    )
    return ModelCard(text)


def _code(text: str) -> str:
    """A text as a Markdown code span, with its backticks removed."""
    return f"`{' '.join(text.replace('`', '').split())}`"

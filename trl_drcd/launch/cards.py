"""Model cards of training runs."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import local_name


def final_metrics(log_history: list[dict[str, Any]], held_out: bool) -> dict[str, dict[str, float]]:
    """
    Metrics before and after, for the model card: of the held-out prompts, or of the first and the last logged steps.

    Args:
        log_history (`list[dict]`): The trainer's log.
        held_out (`bool`): Whether the run evaluated.

    Returns:
        `dict`: `"first (step 0)"` and `"last (step 60)"` to `kl`, `kl_per_token` and `entropy` in nats, `diversity`.
    """
    prefix = "eval_" if held_out else ""
    entries = [entry for entry in log_history if f"{prefix}kl" in entry]
    chosen = {"first": entries[0], "last": entries[-1]} if entries else {}
    return {
        f"{which} (step {entry['step']})": {
            name: entry[prefix + name]
            for name in ("kl", "kl_per_token", "entropy", "diversity")
            if prefix + name in entry
        }
        for which, entry in chosen.items()
    }


def model_card(
    name: str,
    base_model: str,
    settings: dict[str, Any],
    metrics: dict[str, dict[str, float]],
    audio: bool,
    adapter: bool,
) -> ModelCard:
    """
    The README.md of a distilled model.

    Args:
        name (`str`): Title.
        base_model (`str`): Hub name or local path.
        settings (`dict`): Of the run; `guidance_scale` and `temperature` among them.
        metrics (`dict`): See [`final_metrics`].
        audio (`bool`): Whether the completions are music.
        adapter (`bool`): Whether the folder holds a PEFT adapter.

    Returns:
        `ModelCard`: YAML header and text.
    """
    data = ModelCardData(
        base_model=local_name(base_model),
        base_model_relation="adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-to-audio" if audio else "text-generation",
        tags=["trl", "trl-drcd", "cfg-distillation", *(["music"] if audio else [])],
    )
    about = (
        "Fine-tuned by [diversity-rewarded CFG distillation](https://huggingface.co/papers/2410.06084): guidance "
        f"{settings['guidance_scale']:g} is in the weights. Sample with guidance off (`guidance_scale=1`), at "
        f"temperature {settings['temperature']:g} and without truncation, as `generation_config.json` says."
    )
    if audio:
        about += " Samples are in `samples/`; the codec is a part of the model, or in `codec/`."
    units = (
        "KL to the guided teacher in nats per sequence and per token, entropy in nats per token; diversity is the mean"
        " cosine distance of the samples of a prompt under the embedding model."
    )
    settings_table = markdown_table({key: {"value": value} for key, value in settings.items()})
    sections = [f"# {name}", about, "## Settings", settings_table, "## Metrics", units, markdown_table(metrics)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")

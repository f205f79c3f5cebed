"""What samples are judged by: embeddings, adherence, preference and any reward callable, for audio and for text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_drcd.evaluation.frechet import Reference, frechet_to_reference
from trl_drcd.evaluation.metrics import diversity_between_prompts, diversity_within_prompts, per_prompt
from trl_drcd.evaluation.records import content_digest
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.text.reward_models import RewardModel, cross_encoder, question_of

Embed = Callable[[list[Any]], torch.Tensor]


@dataclass
class Judges:
    """
    What is measured of completions, audio or text; what is `None` is not measured.

    Args:
        embedder (`Callable`, *optional*): E: completions to `(N, D)`.
        second_embedder (`Callable`, *optional*): An embedding that was not rewarded.
        adherence (`dict[str, Callable]`): Name of a metric to `(prompts, completions) -> (N,)`; `"adherence"` is the
            one that quality is made of.
        preference (`Callable`, *optional*): Completions to `(N,)`.
        rewards (`dict[str, Callable]`): Name of a metric to a callable with TRL's reward signature.
        hear (`Callable`, *optional*): The space of the Fréchet distance: audio to `(N, D)`.
        reference ([`Reference`], *optional*): Held-out recordings in that space.
    """

    embedder: Embed | None = None
    second_embedder: Embed | None = None
    adherence: dict[str, Callable[[list[Any], list[Any]], torch.Tensor]] = field(default_factory=dict)
    preference: Callable[[list[Any]], torch.Tensor] | None = None
    rewards: dict[str, Callable[..., list[float]]] = field(default_factory=dict)
    hear: Embed | None = None
    reference: Reference | None = None

    @classmethod
    def load(cls, args: Any, rewards: dict[str, Any]) -> Judges:
        """
        The judges that the arguments of an evaluation name: sentence encoders, or the audio models of this package.

        Raises:
            FileNotFoundError: If a folder is none of theirs.
            ValueError: If there is a reference without a judge of audio, or of another judge.
        """
        judges = cls(rewards={path.rpartition(".")[2]: import_function(path) for path in args.metrics} | rewards)
        if args.embedder:
            judges.embedder = load_embedder(args.embedder)
        if args.second_embedder:
            judges.second_embedder = load_embedder(args.second_embedder)
        if args.judge:
            judge = load_embedder(args.judge)
            judges.adherence["adherence"] = getattr(judge, "adherence", None) or cosine_adherence(judge)
            judges.hear = getattr(judge, "embed_audio", None)
        if args.reference:
            if judges.hear is None:
                raise ValueError(f"`reference={args.reference}` needs a `judge` of audio, got {args.judge}")
            judges.reference = Reference.load(args.reference, content_digest(args.judge))
        if args.clap:
            from trl_drcd.audio.clap import ClapJudge

            judges.adherence["adherence_clap"] = ClapJudge.from_pretrained(args.clap).adherence
        if args.cross_encoder:
            judges.adherence["adherence_cross_encoder"] = cross_encoder(args.cross_encoder)
        if args.reward_model:
            judges.rewards["reward_model"] = RewardModel.from_pretrained(args.reward_model)
        if args.preference:
            from trl_drcd.audio.judges import PreferenceModel

            judges.preference = PreferenceModel.from_pretrained(args.preference).preference
        return judges


def import_function(path: str) -> Callable[..., list[float]]:
    """
    The function that a dotted path names, `package.module.function`; modules of the working directory are found.

    Raises:
        ValueError: If there is none.
    """
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`metrics` has {path!r}, which is no importable module.function: {error}") from error
    if not callable(function):
        raise ValueError(f"`metrics` has {path!r}, which is no function; give one with TRL's reward signature")
    return function


def load_embedder(folder: str) -> Any:
    """A `MusicEmbedder`, `MusicDescriptors` or `TextAudioJudge` by what its folder says, else a `SentenceEmbedder`."""
    import json

    from trl_drcd import audio, text

    config = Path(folder) / "config.json"
    kind = json.loads(config.read_text()).get("model_class") if config.is_file() else None
    if kind == "TextAudioJudge":
        return audio.TextAudioJudge.from_pretrained(folder)
    if kind in ("MusicEmbedder", "MusicDescriptors"):
        return getattr(audio, kind).from_pretrained(folder)
    return text.SentenceEmbedder(folder)


def cosine_adherence(embed: Embed) -> Callable[[list[Any], list[Any]], torch.Tensor]:
    """Adherence of texts to their prompts: cosine of the embeddings of both."""

    def adherence(prompts: list[Any], completions: list[Any]) -> torch.Tensor:
        requests = embed([question_of(prompt) for prompt in prompts])
        return torch.nn.functional.cosine_similarity(requests, embed(completions), dim=-1)

    return adherence


def judge_samples(
    samples: Samples, items: list[Any], judges: Judges, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """
    Everything that is measured of completions.

    Args:
        samples ([`Samples`]): Prompts and how many samples of each.
        items (`list`): The completions, audio or texts, in the same order.
        judges ([`Judges`]): By whom.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.

    Returns:
        `tuple`: Metric to its value on each prompt, `(P,)`; and metrics of all prompts together, with intervals.
    """
    count, values, overall = samples.samples_per_prompt, {}, {}
    for name, embed in {"diversity": judges.embedder, "diversity_second": judges.second_embedder}.items():
        if embed is not None:
            embeddings = embed(items)
            values[name] = diversity_within_prompts(embeddings, count)
            overall[f"{name}_between_prompts"] = diversity_between_prompts(embeddings, count, seed)
    for name, adherence in judges.adherence.items():
        values[name] = per_prompt(adherence(samples.repeated_prompts, items), count)
    if judges.preference is not None:
        values["preference"] = per_prompt(judges.preference(items), count)
    if judges.hear is not None and judges.reference is not None:
        overall |= frechet_to_reference(judges.hear(items).double().numpy(), count, judges.reference, seed=seed)
    for name, reward in judges.rewards.items():
        values[name] = per_prompt(reward(prompts=samples.repeated_prompts, completions=items), count)
    if isinstance(items[0], str):
        values |= text_variety(items, count)
    return values, overall


def text_variety(texts: list[str], samples_per_prompt: int) -> dict[str, np.ndarray]:
    """
    Distinct-2 (share of a prompt's word pairs that are different) and self-BLEU (mean BLEU of each completion against
    the prompt's others, 0 to 100; needs sacrebleu), of each prompt, `(P,)`.
    """
    groups = [texts[i : i + samples_per_prompt] for i in range(0, len(texts), samples_per_prompt)]
    values = {"distinct_2": np.array([distinct_n(group, 2) for group in groups])}
    try:
        from sacrebleu import sentence_bleu
    except ImportError:
        return values
    scores = [
        np.mean([sentence_bleu(text, group[:i] + group[i + 1 :]).score for i, text in enumerate(group)])
        for group in groups
    ]
    return values | {"self_bleu": np.array(scores)}


def distinct_n(texts: list[str], n: int) -> float:
    """Different word n-grams over all word n-grams of some texts; 0 where there is none."""
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0

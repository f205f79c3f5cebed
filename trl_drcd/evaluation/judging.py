"""The judges of samples: embedders, adherence, preference and any reward callable, for audio and for text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trl_drcd.evaluation.frechet import Reference
from trl_drcd.evaluation.sampling import Completion, Prompt
from trl_drcd.text.reward_models import RewardModel, cross_encoder, question_of
from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.saved_files import read_json

if TYPE_CHECKING:
    from trl_drcd.evaluation.arguments import EvaluateArguments

Embed = Callable[[list[Any]], torch.Tensor]
"""Maps completions, all text or all audio, to embeddings `(N, D)`."""
Adherence = Callable[[list[Any], list[Any]], torch.Tensor]
"""Maps prompts and their completions to scores `(N,)`."""
RewardFunction = Callable[..., list[float]]
"""TRL's signature: maps `(prompts, completions, **kwargs)` to one reward per completion."""


@dataclass
class Judges:
    """
    The judges of completions, audio or text; a metric without its judge is not measured.

    Args:
        embedders (`dict[str, Callable]`): Name of a diversity metric, `"diversity"` (embedder E of the reward) or
            `"diversity_second"`, to its embedder.
        adherence (`dict[str, Callable]`): Name of a metric to `(prompts, completions) -> (N,)`; `"adherence"` is the
            one that enters quality.
        preference (`Callable`, *optional*): Completions to scores `(N,)`.
        rewards (`dict[str, Callable]`): Name of a metric to a callable with TRL's reward signature.
        hear (`Callable`, *optional*): Audio to embeddings `(N, D)` for the Fréchet distance.
        reference ([`Reference`], *optional*): Statistics of held-out recordings in the space of `hear`.
    """

    embedders: dict[str, Embed] = field(default_factory=dict)
    adherence: dict[str, Adherence] = field(default_factory=dict)
    preference: Embed | None = None
    rewards: dict[str, RewardFunction] = field(default_factory=dict)
    hear: Embed | None = None
    reference: Reference | None = None

    @classmethod
    def load(cls, args: EvaluateArguments, rewards: Mapping[str, RewardFunction]) -> Judges:
        """
        Load the judges named by the arguments: sentence encoders, the audio models of this package, or a user's own
        functions.

        Raises:
            FileNotFoundError: If a folder does not hold such a model.
            ValueError: If a function cannot be imported, or `reference` is given without a judge of audio.
        """
        judges = cls(rewards={path.rpartition(".")[2]: import_function("metrics", path) for path in args.metrics})
        judges.rewards |= rewards
        for diversity, argument in EMBEDDER_OF.items():
            if name := getattr(args, argument):
                judges.embedders[diversity] = load_embedder(argument, name)
        if args.judge:
            judge = load_embedder("judge", args.judge)
            judges.adherence["adherence"] = getattr(judge, "adherence", None) or cosine_adherence(judge)
            judges.hear = getattr(judge, "embed_audio", None)
        if args.reference:
            if judges.hear is None:
                raise ValueError(f"`reference={args.reference}` needs a `judge` of audio, got {args.judge}")
            judges.reference = Reference.load(args.reference)
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


EMBEDDER_OF = {"diversity": "embedder", "diversity_second": "second_embedder"}
"""The argument that names the embedder of each diversity."""


# ---------------------------------------------------------------- a user's own functions


def is_function(name: str) -> bool:
    """Whether a name is the dotted path of a function, `module.function`, and not a folder or a model on the Hub."""
    module, _, function = name.rpartition(".")
    if not function.isidentifier() or not all(map(str.isidentifier, module.split("."))) or Path(name).exists():
        return False
    _find_in_working_directory()
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def source_file(name: str) -> Path | None:
    """Source file of the module of a function `module.function`; `None` if it has none."""
    _find_in_working_directory()
    try:
        spec = find_spec(name.rpartition(".")[0])
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def import_function(argument: str, name: str) -> Callable[..., Any]:
    """
    Import a function by its dotted path, `package.module.function`; the working directory is searched too.

    Args:
        argument (`str`): The user's argument, for error messages.
        name (`str`): The dotted path. A class is instantiated without arguments.

    Raises:
        ValueError: If it cannot be imported or is not callable.
    """
    module, _, attribute = name.rpartition(".")
    _find_in_working_directory()
    try:
        function: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`{argument}` has {short_repr(name)}, which cannot be imported as module.function: {error}"
        ) from error
    if not callable(function):
        raise ValueError(f"`{argument}` has {short_repr(name)}, which is not callable; give the path of a function")
    return function() if isinstance(function, type) else function


def _find_in_working_directory() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


# ---------------------------------------------------------------- embedders


def load_embedder(argument: str, name: str) -> Any:
    """
    Load an embedder: a user's `module.function`, or the `MusicEmbedder`, `MusicDescriptors` or `TextAudioJudge` that
    the folder's `config.json` declares, else a `SentenceEmbedder`.
    """
    from trl_drcd import audio, text

    if is_function(name):
        return import_function(argument, name)
    config = Path(name) / "config.json"
    kind = read_json(config).get("model_class") if config.is_file() else None
    if kind in ("MusicEmbedder", "MusicDescriptors", "TextAudioJudge"):
        return getattr(audio, kind).from_pretrained(name)
    return text.SentenceEmbedder(name)


def embed_all(argument: str, embed: Embed, completions: Sequence[Completion]) -> torch.Tensor:
    """
    Embed completions: `(N, D)`, float32 or float64, on the CPU.

    Raises:
        ValueError: If `embed` does not return one vector per completion.
    """
    embeddings = torch.as_tensor(embed(list(completions))).detach().cpu()
    if embeddings.ndim != 2 or len(embeddings) != len(completions):
        raise ValueError(
            f"`{argument}` returned shape {tuple(embeddings.shape)} for {len(completions)} completions; an embedder "
            "must return one vector for each, (N, D)"
        )
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def cosine_adherence(embed: Embed) -> Adherence:
    """Adherence of texts to their prompts: cosine similarity of the embeddings of prompt and completion."""

    def adherence(prompts: list[Prompt], completions: list[Completion]) -> torch.Tensor:
        requests = embed([question_of(prompt) for prompt in prompts])
        return torch.nn.functional.cosine_similarity(requests, embed(completions), dim=-1)

    return adherence

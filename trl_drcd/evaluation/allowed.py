"""The tokens that all rows of an evaluation sample from: those given, or all that the models do not suppress."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from trl_drcd.merging.adapters import BASE
from trl_drcd.policies import allowed_token_ids
from trl_drcd.policies.allowed import complement
from trl_drcd.policies.causal_lm import as_list
from trl_drcd.validation.model_folders import is_hub_name

if TYPE_CHECKING:
    from trl_drcd.evaluation.arguments import EvaluateArguments

logger = logging.getLogger(__name__)


def suppressed_in(args: EvaluateArguments) -> list[int] | None:
    """
    The tokens that no row of an evaluation samples, whichever of its strategies are run now: `only`, or rows that are
    there already, change nothing. `None` where there are none, or `allowed_token_ids` are given. Of a model that is
    not there, because its strategy is not run, nothing is known, and a warning tells so.

    Raises:
        ValueError: If two models suppress different tokens.
    """
    if args.allowed_token_ids:
        return None
    strategies = args.strategies if isinstance(args.strategies, list | tuple) else []
    names = [name for one in strategies if isinstance(one, dict) for name in _models_of(one)]
    if unknown := [name for name in names if not Path(name).exists() and not is_hub_name(name)]:
        logger.warning(
            f"{unknown[0]} of `strategies` does not exist: if its generation config suppresses tokens, as that of a "
            "training with `allowed_token_ids` does, this evaluation samples tokens that one with it would not"
        )
    return suppressed_tokens([args.model, *names])


def _models_of(strategy: Mapping[str, object]) -> Iterator[str]:
    """The models of a strategy, or their checkpoints; those of a sweep too."""
    given, steps = [strategy.get("model"), strategy.get("models")], strategy.get("checkpoint")
    folders = [f"/checkpoint-{step}" for step in (steps if isinstance(steps, list) else [steps]) if step is not None]
    for name in _strings(given):
        if name != BASE:
            yield from [f"{name}{folder}" for folder in folders or [""]]


def _strings(given: object) -> Iterator[str]:
    """The strings in nested lists."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _strings(one)


def suppressed_tokens(names: Iterable[str]) -> list[int] | None:
    """
    The tokens that the generation configs of models and adapters suppress; `None` where none does.

    A base model may suppress none itself; if a model trained from it does, the base is measured over the same part of
    the vocabulary.

    Args:
        names (`Iterable[str]`): Folders or Hub names.

    Raises:
        ValueError: If two of them suppress different tokens, so that their distributions cannot be compared.
    """
    found: dict[tuple[int, ...], str] = {}
    for name in dict.fromkeys(names):
        try:
            suppressed = GenerationConfig.from_pretrained(_of_training(name)).suppress_tokens
        except OSError:  # it has no such file
            continue
        if suppressed:
            found.setdefault(tuple(sorted(suppressed)), name)
    if len(found) > 1:
        raise ValueError(
            f"the generation configs of {' and '.join(list(found.values())[:2])} suppress different tokens; give "
            "`allowed_token_ids`, which then holds for all rows"
        )
    return list(next(iter(found))) if found else None


def further_end(name: str) -> int | None:
    """
    The tokenizer's eos of a causal LM, where it is none of those of the generation config: completions end at it too.

    Args:
        name (`str`): Folder or Hub name.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        try:
            ends = GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:  # it has no such file
            ends = PreTrainedConfig.get_config_dict(name)[0].get("eos_token_id")
    except (OSError, ValueError):  # what cannot be loaded is told where it is loaded for use
        return None
    end: int | None = tokenizer.eos_token_id
    return None if end in as_list(ends) else end


def _of_training(name: str) -> str:
    """The folder itself, or that of its training: adapters' checkpoints of earlier versions have no such file."""
    folder = Path(name)
    bare = folder.name.startswith("checkpoint-") and not (folder / "generation_config.json").is_file()
    return str(folder.parent) if bare and (folder.parent / "generation_config.json").is_file() else name


def allowed_in_rows(
    entries: Sequence[str] | None, suppressed: list[int] | None, model: Any, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor | None:
    """
    The tokens that all rows sample from; `None` where every token is allowed.

    Args:
        entries (`Sequence[str]`, *optional*): `allowed_token_ids` of the evaluation; they take precedence
            over the suppressed tokens.
        suppressed (`list[int]`, *optional*): The tokens that no row samples, of [`suppressed_in`].
        model (`PreTrainedModel`): The base.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.

    Raises:
        ValueError: If the entries do not fit the tokenizer or the model.
    """
    eos = {*as_list(model.generation_config.eos_token_id), tokenizer.eos_token_id} - {None}
    if entries is not None or suppressed is None:
        return allowed_token_ids(entries, model, tokenizer, sorted(eos))[0]
    return complement(suppressed, model.get_output_embeddings().weight.shape[0])

"""Load the inputs of the trainer: prompts, embedder, codec, reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from datasets import Dataset, IterableDataset

from trl_drcd.launch.arguments import PromptArguments
from trl_drcd.prompts import read_prompts, with_system_prompt
from trl_drcd.validation.callables import load_callable, names_a_callable
from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.model_folders import is_hub_name

Part = TypeVar("Part")


def load_datasets(
    script: PromptArguments, streaming: bool = False, system_prompt: str | None = None
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    Load the training prompts and the first `max_eval_prompts` held-out prompts; the trainer validates their rows.

    Args:
        script ([`PromptArguments`]): Names of the data sets.
        streaming (`bool`, *optional*, defaults to `False`): Stream the training prompts instead of loading them.
        system_prompt (`str`, *optional*): System turn to add to every prompt that has none.

    Returns:
        `tuple`: The training prompts, and the held-out prompts or `None`.

    Raises:
        FileNotFoundError, ValueError: See [`~trl_drcd.prompts.read_prompts`].
    """
    keep = bool(script.reward_funcs)
    train = read_prompts("dataset", str(script.dataset), script.dataset_split, streaming, keep)
    held_out = None
    if script.eval_dataset:
        held_out = read_prompts("eval_dataset", script.eval_dataset, script.eval_split, keep_columns=keep)
        held_out = held_out.select(range(min(script.max_eval_prompts, len(held_out))))
    if system_prompt:
        settings = {"fn_kwargs": {"system_prompt": system_prompt}}
        train = train.map(with_system_prompt, **settings)
        held_out = held_out and held_out.map(with_system_prompt, **settings)
    return train, held_out


def load_part(argument: str, load: Callable[[str], Part], name: str | None) -> Part | None:
    """Load a codec or an embedder with errors that name the argument; `None` if `name` is empty."""
    if not name:
        return None
    with prefix_errors(argument):
        return load(name)


def load_embedder(load: Callable[[str], Part], name: str | None) -> Part | Callable | None:
    """Load the embedder E: import a `module.function`, else call `load` with the folder or Hub name."""
    if name and names_a_callable(name):
        return load_callable("embedder", name)
    return load_part("embedder", load, name)


def load_rewards(names: Sequence[str] | None) -> list[Callable | str] | None:
    """
    Import reward functions; `None` if there are no names.

    Args:
        names (`Sequence[str]`, *optional*): Each a `module.function`, or the folder or Hub name of a reward model,
            which is returned as it is for TRL to load.

    Raises:
        ValueError: If a function cannot be imported, or a name is neither.
    """
    return [_reward(name) for name in names] if names else None


def _reward(name: str) -> Callable | str:
    is_model = Path(name).is_dir() or ("/" in name and is_hub_name(name))
    return name if is_model else load_callable("reward_funcs", name)

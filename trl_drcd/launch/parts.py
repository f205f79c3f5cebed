"""What a training script loads for the trainer: prompts, the embedder, the codec, reward functions."""

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
    Prompts to train on, and the first held-out ones, or `None`; the trainer looks at their rows.

    Args:
        script ([`PromptArguments`]): Names them.
        streaming (`bool`, *optional*, defaults to `False`): Read training prompts as they are needed.
        system_prompt (`str`, *optional*): System turn before every prompt that has none.

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
    """A codec or an embedder, whose errors name the argument; `None` where none is given."""
    if not name:
        return None
    with prefix_errors(argument):
        return load(name)


def load_embedder(load: Callable[[str], Part], name: str | None) -> Part | Callable | None:
    """The embedder E: a function where `module.function` is given, else what `load` makes of a folder or name."""
    if name and names_a_callable(name):
        return load_callable("embedder", name)
    return load_part("embedder", load, name)


def load_rewards(names: Sequence[str] | None) -> list[Callable | str] | None:
    """
    Reward functions by their names; `None` where there are none.

    Args:
        names (`Sequence[str]`, *optional*): Each `module.function`, or a reward model's folder or name on the Hub,
            which TRL loads.

    Raises:
        ValueError: If a function is not there, or a name is neither.
    """
    return [_reward(name) for name in names] if names else None


def _reward(name: str) -> Callable | str:
    is_model = Path(name).is_dir() or ("/" in name and is_hub_name(name))
    return name if is_model else load_callable("reward_funcs", name)

"""Judges of text from pretrained checkpoints: reward models and cross-encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_drcd.compat.extras import require
from trl_drcd.validation.encoders import check_encoder


def question_of(prompt: Any) -> str:
    """A prompt as text: itself, or the last user turn of a conversation; without one, the last turn."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn["content"] for turn in prompt if turn["role"] == "user"] or [prompt[-1]["content"]]
    return str(turns[-1])


def _answer_of(completion: Any) -> str:
    """A completion as text: itself, or the last turn of a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


class RewardModel:
    """
    A reward model (sequence classifier with one output) as a callable with TRL's reward signature.

    Its input is the same as when TRL uses it as a reward in training: prompt and completion concatenated, or rendered
    with its tokenizer's chat template if the prompt is a conversation.

    Args:
        model (`PreTrainedModel`): A model with `num_labels=1`, in evaluation mode, on any device.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a padding token.
        batch_size (`int`, *optional*, defaults to 16): Texts per batch.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> RewardModel:
        """
        Load from a folder or a Hub name; weights from safetensors only.

        Raises:
            ValueError: If the checkpoint does not have exactly one output.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        kwargs = {"trust_remote_code": False} | kwargs
        outputs = AutoConfig.from_pretrained(name_or_path, **kwargs).num_labels
        if outputs != 1:
            raise ValueError(f"`reward_model={name_or_path}` must have one output, got {outputs}")
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, use_safetensors=True, **kwargs).eval()
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        return cls(model, tokenizer)

    def text_of(self, prompt: Any, completion: Any) -> str:
        """Render prompt and completion as one text."""
        if isinstance(prompt, str):
            return prompt + _answer_of(completion)
        turns = [*prompt, {"role": "assistant", "content": _answer_of(completion)}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False))

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: object) -> list[float]:
        """
        Rewards of completions.

        Args:
            prompts (`list`): `N` texts or conversations.
            completions (`list`): `N` texts, or conversations of one turn.

        Returns:
            `list[float]`: `N` rewards, in the model's unit.
        """
        texts = [self.text_of(*pair) for pair in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                truncation=self.tokenizer.model_max_length < 10**9,
                add_special_tokens=False,  # as in TRL: the chat template adds them
            )
            rewards += self.model(**inputs.to(self.model.device)).logits[:, 0].float().tolist()
        return rewards


def cross_encoder(name_or_path: str | Path, batch_size: int = 16) -> Callable[[list[Any], list[Any]], torch.Tensor]:
    """
    A cross-encoder of sentence-transformers as a judge of the adherence of completions to their prompts.

    Args:
        name_or_path (`str` or `Path`): Folder or Hub name.
        batch_size (`int`, *optional*, defaults to 16): Pairs per batch.

    Returns:
        `Callable`: `(prompts, completions)`, `N` each, to scores `(N,)`, float32, on the CPU, in the model's unit.

    Raises:
        FileNotFoundError: If a path does not exist, or its weights are not safetensors.
        ImportError: If sentence-transformers is not installed (extra `text`).
        ValueError: If the checkpoint does not have exactly one output, or names code from elsewhere.
    """
    check_encoder("cross_encoder", str(name_or_path), "a cross-encoder")
    kind = require("sentence_transformers", "text").CrossEncoder
    model = kind(str(name_or_path), model_kwargs={"use_safetensors": True}, trust_remote_code=False)
    if model.num_labels != 1:
        raise ValueError(f"`cross_encoder={name_or_path}` must have one output, got {model.num_labels}")

    def score(prompts: list[Any], completions: list[Any]) -> torch.Tensor:
        pairs = [(question_of(p), _answer_of(c)) for p, c in zip(prompts, completions, strict=True)]
        scores: torch.Tensor = model.predict(
            pairs, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return scores.float().cpu()

    return score

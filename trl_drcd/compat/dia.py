"""
Dia in TRL 1.16 and transformers 5: TRL takes its processor for a vision model's, and TRL and transformers write the
pad id of the text's tokenizer, 0, into the configuration of the audio decoder, where 0 is a code. The processor does
not pass `use_safetensors` on to its codec, so a pickle would be read.

This can be removed once `tests/policies/test_dia.py::test_trl_alone_changes_the_decoders_ids` fails.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from transformers import AutoTokenizer, DiaConfig, DiaProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin


class DiaInTRL:
    """See [`~trl_drcd.compat.family_hooks.FamilyInTRL`]."""

    @staticmethod
    def processing_class(model: Any, given: object, revision: str | None = None) -> Any:
        """Return the tokenizer of the text; it keeps the processor, which knows the codec."""
        if given is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            given = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        return keep_processor(given) if isinstance(given, ProcessorMixin) else given

    @staticmethod
    @contextmanager
    def patched() -> Iterator[None]:
        """Make `config.get_text_config()` return a copy: TRL and transformers write the tokenizer's ids to it."""
        own = DiaConfig.get_text_config

        def text_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            return copy.deepcopy(own(self, *args, **kwargs))

        with mock.patch.object(DiaConfig, "get_text_config", text_config):
            yield

    @staticmethod
    def restore_special_tokens(generation_config: GenerationConfig, model_config: Any) -> None:
        """Set the decoder's own ids."""
        decoder = model_config.decoder_config
        generation_config.update(
            pad_token_id=decoder.pad_token_id,
            bos_token_id=decoder.bos_token_id,
            decoder_start_token_id=decoder.bos_token_id,
            eos_token_id=decoder.eos_token_id,
        )


def keep_processor(processor: Any) -> Any:
    """The tokenizer of a processor, from which [`processor_of`] finds the processor again."""
    processor.tokenizer.kept_processor = processor
    return processor.tokenizer


def processor_of(tokenizer: Any, model: Any) -> DiaProcessor | None:
    """
    The processor with the codec: the tokenizer's own, else that of the folder or name the model was loaded from.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the texts; keeps what is found.
        model (`PreTrainedModel`): Without PEFT's wrapper.

    Returns:
        `DiaProcessor`: `None` if the model was not loaded, or from a folder without a processor.

    Raises:
        ValueError: If the codec has no weights in safetensors, or cannot be found.
    """
    kept: DiaProcessor | None = getattr(tokenizer, "kept_processor", None)
    name = model.config.name_or_path
    if kept is None and name:
        problems: list[OSError] = []
        try:
            with safetensors_only(problems):
                kept = DiaProcessor.from_pretrained(name)
        except (OSError, TypeError, ValueError):  # no such file; a processor without a codec
            if problems:
                raise ValueError(
                    f"the codec of the processor of {name} cannot be loaded from safetensors: {problems[0]}"
                ) from problems[0]
            return None
        tokenizer.kept_processor = kept
    return kept


@contextmanager
def safetensors_only(problems: list[OSError]) -> Iterator[None]:
    """Make `DiaProcessor.from_pretrained` load its codec from safetensors, or add what is wrong to `problems`."""
    given: Any = PreTrainedModel.from_pretrained
    own = given.__func__

    def load(cls: Any, *args: Any, **kwargs: Any) -> PreTrainedModel:
        try:
            model: PreTrainedModel = own(cls, *args, **kwargs, use_safetensors=True)
        except OSError as error:
            problems.append(error)
            raise
        return model

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(load)):
        yield

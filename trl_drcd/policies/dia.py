"""
Dia: text to speech, with an encoder of bytes, a decoder over `K` delayed codebooks, and the codec in its processor.

A completion is one list of `S * K` ids in a [`~trl_drcd.policies.delayed.DelayedLayout`]. Sampled and scored is the
softmax over the codes, and on codebook 0 the eos; `generate` draws otherwise (docs/dia.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_drcd.audio.dac import DelayedCodec
from trl_drcd.compat.dia import DiaInTRL, processor_of
from trl_drcd.compat.dropout import turn_off_dropout
from trl_drcd.compat.family_hooks import forget_patched_forward
from trl_drcd.guidance import EarlySteps, left_pad, stacked_prompts
from trl_drcd.heads import Head
from trl_drcd.policies.causal_lm import _full
from trl_drcd.policies.causal_lm import without_peft as unwrapped
from trl_drcd.policies.delayed import DelayedLayout, DiaStream
from trl_drcd.prompts import Prompt, Row
from trl_drcd.sampling import Rollout, decode, distinct_rows, sampling_mode

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
NONE = "(?!)"  # matches no name
AUDIO = {"audio", "audios", "audio_prompt"}  # columns of a voice to clone


class DiaPolicy:
    """
    The policy of a `DiaForConditionalGeneration`. Encoder, decoder and heads are trained; the codec is not part of it.

    Args:
        tokenizer (`DiaTokenizer`): Of the texts.
        config (`DiaConfig`): The model's configuration.
        chat_template_kwargs (`dict`, *optional*): Not used, as prompts are texts.
        allowed_token_ids (*optional*): Must be `None`, as the allowed ids are the codes.

    Raises:
        ValueError: If `allowed_token_ids` are given, or the model's delays or ids are not in the order of Dia's.
    """

    rolls_out_with_trl = False
    has_own_codec = True
    in_trl = DiaInTRL
    refused_columns = AUDIO
    frozen: str | None = NONE  # accelerate alone fails to shard a model that does not name its embeddings

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        chat_template_kwargs: dict | None = None,
        allowed_token_ids: torch.Tensor | None = None,
    ):
        if allowed_token_ids is not None:
            raise ValueError("`allowed_token_ids` is for causal LMs: those of a Dia are its codes; leave it out")
        decoder = config.decoder_config
        self.tokenizer = tokenizer
        self.num_codebooks: int = decoder.num_channels
        self.vocabulary: int = decoder.vocab_size
        self.positions: int = decoder.max_position_embeddings
        self.prompt_positions: int = config.encoder_config.max_position_embeddings
        self.layout = DelayedLayout(
            config.delay_pattern, decoder.eos_token_id, decoder.pad_token_id, decoder.bos_token_id
        )
        self.first_frame_steps = int(self.layout.delays.max()) + 1

    # ---------------------------------------------------------------- setting up

    def prepare(self, model: PreTrainedModel) -> None:
        """
        Turn off all dropout, and undo TRL's changes to the model.

        Raises:
            ValueError: If an adapter targets the heads, where it has no effect.
        """
        dia = unwrapped(model)
        if isinstance(dia.logits_dense, BaseTunerLayer | TrainableTokensWrapper):
            raise ValueError(
                "`target_modules` of the adapter reaches logits_dense, the heads, which must not have one; use "
                f"`target_modules={LORA_TARGETS}`"
            )
        turn_off_dropout(dia)
        forget_patched_forward(dia)  # TRL's fused LM head supports a single head only
        self.in_trl.restore_special_tokens(dia.generation_config, dia.config)

    def save_extras(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """Write the processor, which names the codec, if it is known; `AutoProcessor` and pipelines need it."""
        processor = processor_of(self.tokenizer, unwrapped(model))
        if processor is not None:
            processor.save_pretrained(folder)

    def codec(self, model: PreTrainedModel) -> DelayedCodec:
        """
        The codec of the model's processor, on the model's device.

        Raises:
            ValueError: If no processor is known, or its codec has other codebooks than the model.
        """
        dia = unwrapped(model)
        processor: Any = processor_of(self.tokenizer, dia)
        if processor is None:
            raise ValueError(
                "the codec of a Dia is in its processor, and none is known: `processing_class` is a tokenizer alone, "
                f"and the model was loaded from {dia.config._name_or_path or 'no folder'}, which has none; pass the "
                "model's `DiaProcessor`, or `codec`"
            )
        dac = processor.audio_tokenizer.to(dia.device).eval()
        if (dac.config.n_codebooks, dac.config.codebook_size) != (self.num_codebooks, self.layout.eos_id):
            raise ValueError(
                f"the codec of `processing_class` has {dac.config.n_codebooks} codebooks of "
                f"{dac.config.codebook_size} codes and the model {self.num_codebooks} of {self.layout.eos_id}; give "
                "the model's own processor"
            )
        return DelayedCodec(dac, self.layout.delays.tolist(), self.layout.eos_id)

    def prompt_vocabulary(self, model: PreTrainedModel) -> int:
        """Vocabulary size of the text encoder."""
        dia = unwrapped(model)
        return int(dia.config.encoder_config.vocab_size)

    def sampled_from(self, model: PreTrainedModel) -> torch.nn.Module:
        """The decoder without its heads, which `rollout` applies itself."""
        dia = unwrapped(model)
        decoder: torch.nn.Module = dia.model.decoder
        return decoder

    def check_length(self, max_completion_length: int) -> None:
        """Raise `ValueError` if the steps do not hold one frame with its delays and end, or exceed the positions."""
        least = int(self.layout.delays.max()) + 2
        if not least <= max_completion_length <= self.positions:
            raise ValueError(
                f"`max_completion_length={max_completion_length}` counts decoder steps: give {least} (the longest "
                f"delay, one frame and the end) to {self.positions} (the model's positions), {least - 1} more than "
                "frames"
            )

    def check_prompts(self, prompt_ids: list[list[int]], what: str) -> None:
        """Raise `ValueError` if the longest prompt exceeds the positions of the encoder; `what` is for the message."""
        longest = max(map(len, prompt_ids), default=0)
        if longest > self.prompt_positions:
            raise ValueError(
                f"{what} of {longest} tokens (bytes) does not fit the model, whose text encoder has "
                f"{self.prompt_positions} positions; prompts are never truncated: shorten it"
            )

    # ---------------------------------------------------------------- conditioning

    def negative_prompt_ids(self, rows: Sequence[Row], negative_prompt: Prompt | None) -> list[list[int]]:
        """
        Token ids of each row's negative prompt; the null prompt has a 0 for each byte of what the teacher reads.

        Args:
            rows (`list[dict]`): Dataset rows with `prompt` and optionally `negative_prompt` and `teacher_prompt`.
            negative_prompt (`str` or `None`): Used for rows without their own.

        Returns:
            `list[list[int]]`: One sequence per row.

        Raises:
            ValueError: If a prompt is not a text, or empty.
        """
        return [self._negative(row, negative_prompt) for row in rows]

    def _negative(self, row: Row, default: Prompt | None) -> list[int]:
        own = row.get("negative_prompt")
        negative = default if own is None else own
        taught = row.get("teacher_prompt")
        read = row["prompt"] if taught is None else taught
        for text in (row["prompt"], read, negative):
            if not (text is None or (isinstance(text, str) and text)):
                raise ValueError(
                    f"Dia reads texts: `prompt` and `negative_prompt` must be `str` and not empty, got {text!r}; "
                    "leave `negative_prompt` out for the null prompt"
                )
        ids: list[int] = list(self.tokenizer(read if negative is None else negative)["input_ids"])
        return [0] * len(ids) if negative is None else ids

    def _condition(self, dia: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs of the decoder's cross-attention, padded on the right, as the encoder's positions expect."""
        order = prompt_mask.argsort(dim=1, descending=True, stable=True)
        ids, mask = prompt_ids.gather(1, order), prompt_mask.gather(1, order)
        states = dia.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    # ---------------------------------------------------------------- scoring

    def hidden_states(
        self,
        model: PreTrainedModel,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Last hidden states of the decoder that predict each step.

        Args:
            model (`PreTrainedModel`): Unwrapped, with or without adapters.
            prompt_ids (`torch.Tensor`): Left-padded, int64, shape `(B, P)`.
            prompt_mask (`torch.Tensor`): 1 for tokens, shape `(B, P)`.
            completion_ids (`torch.Tensor`): int64, shape `(B, S * K)`.
            completion_mask (`torch.Tensor`): 1 for ids, 0 for padding, shape `(B, S * K)`.

        Returns:
            `torch.Tensor`: Shape `(B, S, H)`.
        """
        dia = unwrapped(model)
        condition = self._condition(dia, prompt_ids, prompt_mask)
        output = dia.model.decoder(input_ids=self.layout.inputs(completion_ids), use_cache=False, **condition)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def own_logits(self, model: Any, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """
        Logits of the model's own forward on one unpadded sequence, of the codes and the eos.

        Args:
            model (`PreTrainedModel`): The model, wrapped or not.
            prompt_ids (`torch.Tensor`): int64, shape `(1, P)`.
            completion_ids (`torch.Tensor`): int64, shape `(1, S * K)`.

        Returns:
            `torch.Tensor`: Logits that predict each step, shape `(S, K, V)`, with `V` the codes and the eos; -inf for
                the eos of all codebooks but the first.
        """
        inputs = self.layout.inputs(completion_ids)
        text = {"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)}
        logits: torch.Tensor = model(**text, decoder_input_ids=inputs).logits.transpose(0, 1)
        logits[:, 1:, self.layout.eos_id] = -torch.inf
        return logits[..., : self.layout.eos_id + 1]

    def heads(self, model: PreTrainedModel) -> list[Head]:
        """One head per codebook: the rows of its codes, and for the first that of the eos."""
        dia = unwrapped(model)
        weights = _full(dia.logits_dense.weight).unflatten(0, (self.num_codebooks, self.vocabulary)).unbind(0)
        return [Head(weight[: self.layout.eos_id + (k == 0)]) for k, weight in enumerate(weights)]

    def ids_and_mask(
        self, completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and boolean mask `(B, S, K)`: False where nothing was drawn, and in padding."""
        ids = self.layout.steps(completion_ids)
        return ids, self.layout.steps(completion_mask).bool() & (ids != self.layout.pad_id)

    def ended(self, completion_ids: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
        """Whether each completion drew its eos, boolean `(B,)`: its last id is a code of another codebook."""
        ids, mask = self.ids_and_mask(completion_ids, completion_mask)
        return ((ids[..., 0] == self.layout.eos_id) & mask[..., 0]).any(1)

    # ---------------------------------------------------------------- sampling

    def rollout(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        negative_prompt_ids: list[list[int]] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        eos_token_ids: list[int] | None = None,
        early: EarlySteps | None = None,
    ) -> Rollout:
        """
        Sample completions, with classifier-free guidance (one doubled batch) if `guidance_scale` is not 1.

        Args:
            model (`PreTrainedModel`): Unwrapped, with or without adapters.
            prompt_ids (`list[list[int]]`): `B` prompts; equal prompts are encoded once.
            negative_prompt_ids (`list[list[int]]`, *optional*): `B` negative prompts, required with guidance.
            guidance_scale (`float`, *optional*, defaults to 1.0): gamma of Eq. (1), 1 more than the scale of Dia's
                `generate`; 1 disables guidance.
            temperature (`float`, *optional*, defaults to 1.0): Above 0.
            max_new_tokens (`int`, *optional*, defaults to 256): Decoder steps, as in `generate`: frames, the longest
                delay, and the end, which is not drawn if it comes by length.
            eos_token_ids (`list[int]`, *optional*): Not used: the eos is the decoder's.
            early ([`~trl_drcd.guidance.EarlySteps`], *optional*): The first steps, with a guidance scale of their own.

        Returns:
            [`~trl_drcd.sampling.Rollout`]: The pad id where nothing was drawn.

        Raises:
            ValueError: If guidance lacks negative prompts, or a prompt or the number of steps does not fit the model.
        """
        self.check_length(max_new_tokens)
        stacked = stacked_prompts(prompt_ids, negative_prompt_ids, guidance_scale)
        self.check_prompts(stacked, "a prompt")
        different, index = distinct_rows(stacked)
        dia = unwrapped(model)
        device, steps = dia.device, max_new_tokens - 1
        with sampling_mode(model, dia):
            ids, mask = left_pad(different, 0)
            condition = self._condition(dia, ids.to(device), mask.to(device))
            stream = DiaStream(self.layout, dia.model.decoder, condition, index.to(device), steps)
            return decode(
                stream, self.heads(model), steps, guidance_scale, temperature, [self.layout.eos_id],
                self.layout.pad_id, self.layout.is_drawn(steps).to(device), after_end=self.layout.after_end,
                early=early,
            )  # fmt: skip

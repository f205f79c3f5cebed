"""
MusicGen: a T5 encoder, a decoder with `K` heads over delayed codebooks, and the codec that makes audio of its codes.

A completion travels as one list of `S * K` ids: the delayed layout step by step, its `K` codebooks in order, as
`generate` has it. Codebook `k` begins `k` steps late and ends `K - 1 - k` steps early; there stands the mask id,
which is `vocab_size`. It is undelayed only in the codec ([`~trl_drcd.audio.codecs.CodebookCodec`]).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import EncodecFeatureExtractor, MusicgenProcessor, PreTrainedModel, PreTrainedTokenizerBase

from trl_drcd.audio.codecs import CodebookCodec, is_coded
from trl_drcd.compat.dropout import turn_off_dropout
from trl_drcd.compat.musicgen import MusicgenInTRL
from trl_drcd.compat.trl_private import forget_patched_forward
from trl_drcd.guidance import left_pad, stacked_prompts
from trl_drcd.heads import Head
from trl_drcd.policies.causal_lm import _full
from trl_drcd.policies.causal_lm import _without_peft as unwrapped
from trl_drcd.sampling import Rollout, cast_once, decode, distinct_rows, evaluating, preallocated_cross_cache

# Parts that never train, as attributes of the model. The projection belongs to the conditioning, as in AudioCraft
FROZEN = ("text_encoder", "audio_encoder", "enc_to_dec_proj")
# Linear layers of the decoder alone: T5 and EnCodec have none of these names
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class MusicgenPolicy:
    """
    The policy of a mono `MusicgenForConditionalGeneration`.

    The decoder trains, with its embeddings and heads. Text encoder, its projection and audio codec are frozen, so that
    teacher and student share them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The T5 tokenizer.
        config (`MusicgenConfig`): The model's.
        chat_template_kwargs (`dict`, *optional*): Not used: prompts are texts.

    Raises:
        ValueError: If the checkpoint is a stereo one.
    """

    rolls_out_with_trl = False
    has_own_codec = True
    in_trl = MusicgenInTRL
    frozen: str | None = rf"(base_model\.model\.)?({'|'.join(FROZEN)})"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Any, chat_template_kwargs: dict | None = None):
        self.check_config(config)
        self.tokenizer = tokenizer
        self.num_codebooks: int = config.decoder.num_codebooks
        self.mask_id: int = config.decoder.vocab_size

    # ---------------------------------------------------------------- setting up

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuses stereo checkpoints, whose codebooks come in pairs."""
        if config.decoder.audio_channels != 1:
            raise ValueError(
                f"`model` is a stereo MusicGen (`audio_channels={config.decoder.audio_channels}`), which is not "
                "supported; use a mono one, e.g. facebook/musicgen-small, -medium or -large"
            )

    def prepare(self, model: PreTrainedModel) -> None:
        """
        Freezes what must not train, turns off all dropout, and undoes what TRL did to the model.

        Raises:
            ValueError: If an adapter stands where it has no effect, or on a frozen part.
        """
        musicgen: Any = unwrapped(model)
        trainable = [name for name, p in musicgen.named_parameters() if p.requires_grad]
        if musicgen is not model:
            wrong = [name for name in trainable if name.startswith((*FROZEN, "decoder.lm_heads"))]
            if wrong:
                raise ValueError(
                    f"`target_modules` of the adapter reaches {wrong[0]} and {len(wrong) - 1} more parameters of "
                    "the text encoder, the audio codec or the heads, which must not have one; use "
                    f"`target_modules={LORA_TARGETS}`"
                )
        for name in FROZEN:
            if hasattr(musicgen, name):
                getattr(musicgen, name).requires_grad_(False)
        turn_off_dropout(musicgen)
        forget_patched_forward(musicgen)  # TRL's fused LM head is for one head
        self.in_trl.restore_special_tokens(musicgen.generation_config, musicgen.config)

    def save_extras(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """Writes `preprocessor_config.json`, which processors and pipelines look for."""
        config = model.config.audio_encoder
        extractor = EncodecFeatureExtractor(config.audio_channels, config.sampling_rate, padding_side="left")
        MusicgenProcessor(extractor, self.tokenizer).save_pretrained(folder)

    def codec(self, model: PreTrainedModel) -> CodebookCodec:
        """The codec of the model's own audio encoder, not a copy."""
        return CodebookCodec(unwrapped(model).audio_encoder, self.num_codebooks, self.mask_id)

    def prompt_vocabulary(self, model: PreTrainedModel) -> int:
        """Tokens that the text encoder knows."""
        musicgen: Any = unwrapped(model)
        return int(musicgen.text_encoder.get_input_embeddings().num_embeddings)

    def sampled_from(self, model: PreTrainedModel) -> torch.nn.Module:
        """The decoder without its heads, which `sample` applies itself."""
        musicgen: Any = unwrapped(model)
        decoder: torch.nn.Module = musicgen.decoder.model
        return decoder

    def check_length(self, max_completion_length: int) -> None:
        """With fewer steps than the delays take, `generate` leaves the delay out without a word."""
        if max_completion_length < (least := 2 * self.num_codebooks - 2):
            raise ValueError(
                f"`max_completion_length={max_completion_length}` decoder steps are too few for the delays of "
                f"{self.num_codebooks} codebooks; give at least {least} ({self.num_codebooks - 1} more than frames)"
            )

    # ---------------------------------------------------------------- conditioning

    def negative_prompt_ids(self, rows: list[dict[str, Any]], negative_prompt: Any) -> list[list[int]]:
        """
        Token ids of each row's negative prompt; none for the null condition.

        An empty list makes a row of padding, whose mask sets all encoder states to zero: the null condition of
        `generate`. The empty text, in contrast, is a prompt like another.

        Args:
            rows (`list[dict]`): Dataset rows with `prompt` and perhaps `negative_prompt`.
            negative_prompt (`str` or `None`): For rows that have none of their own.

        Returns:
            `list[list[int]]`: One sequence per row, perhaps empty.

        Raises:
            ValueError: If a prompt is not a text.
        """
        texts = [row["negative_prompt"] if row.get("negative_prompt") is not None else negative_prompt for row in rows]
        for text in [row["prompt"] for row in rows] + texts:
            if not isinstance(text, str | None):
                raise ValueError(f"MusicGen reads texts: `prompt` and `negative_prompt` must be `str`, got {text!r}")
        return [[] if text is None else list(self.tokenizer(text)["input_ids"]) for text in texts]

    def _condition(self, model: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the decoder's cross-attention sees: projected encoder states, zero where the mask is, and the mask."""
        if prompt_ids.shape[1] == 0:  # nothing but null conditions
            prompt_ids, prompt_mask = (torch.nn.functional.pad(t, (0, 1)) for t in (prompt_ids, prompt_mask))
        states = model.text_encoder(input_ids=prompt_ids, attention_mask=prompt_mask).last_hidden_state
        if hasattr(model, "enc_to_dec_proj"):
            states = model.enc_to_dec_proj(states)
        # Selected, not multiplied: what a row of nothing but padding encodes to may be anything
        states = states.where(prompt_mask[..., None].bool(), 0.0)
        return {"encoder_hidden_states": states, "encoder_attention_mask": prompt_mask}

    # ---------------------------------------------------------------- scoring

    def _steps(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """`(B, S * K)`, perhaps with padding on the right, as `(B, S, K)`."""
        steps = completion_ids.shape[1] // self.num_codebooks
        return completion_ids[:, : steps * self.num_codebooks].unflatten(1, (steps, self.num_codebooks))

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
            prompt_mask (`torch.Tensor`): 1 where a token stands, shape `(B, P)`; a row of zeros is the null condition.
            completion_ids (`torch.Tensor`): Delayed layout, int64, shape `(B, S * K)`.
            completion_mask (`torch.Tensor`): 1 where an id counts, shape `(B, S * K)`.

        Returns:
            `torch.Tensor`: Shape `(B, S, H)`.
        """
        musicgen: Any = unwrapped(model)
        steps = self._steps(completion_ids)
        inputs = torch.cat([torch.full_like(steps[:, :1], self.mask_id), steps[:, :-1]], dim=1)
        output = musicgen.decoder.model(
            input_ids=inputs.transpose(1, 2).flatten(0, 1),
            use_cache=False,
            **self._condition(musicgen, prompt_ids, prompt_mask),
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def own_logits(self, model: Any, prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
        """
        What the model itself says of one sequence without padding.

        Args:
            model (`PreTrainedModel`): Perhaps wrapped.
            prompt_ids (`torch.Tensor`): int64, shape `(1, P)`.
            completion_ids (`torch.Tensor`): Delayed layout, int64, shape `(1, S * K)`.

        Returns:
            `torch.Tensor`: Logits that predict each step, shape `(S, K, V)`.
        """
        steps = self._steps(completion_ids)[0]
        inputs = torch.cat([torch.full_like(steps[:1], self.mask_id), steps[:-1]]).T.contiguous()
        text = {"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)}
        logits: torch.Tensor = model(**text, decoder_input_ids=inputs).logits
        return logits.transpose(0, 1)

    def heads(self, model: PreTrainedModel) -> list[Head]:
        """One head per codebook."""
        musicgen: Any = unwrapped(model)
        return [Head(_full(head.weight)) for head in musicgen.decoder.lm_heads]

    def ids_and_mask(
        self, completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Ids and boolean mask `(B, S, K)`: False in the delays and in padding.

        The ids where it is False are none that a head has.
        """
        ids = self._steps(completion_ids)
        return ids, self._steps(completion_mask).bool() & (ids != self.mask_id)

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
    ) -> Rollout:
        """
        Sample completions, with classifier-free guidance (one doubled batch) where `guidance_scale` is not 1.

        `generate` decodes what it samples to audio, knows no negative prompts and takes guidance and truncation from
        the checkpoint.

        Args:
            model (`PreTrainedModel`): Unwrapped, with or without adapters.
            prompt_ids (`list[list[int]]`): `B` prompts; equal ones are encoded once.
            negative_prompt_ids (`list[list[int]]`, *optional*): As many; needed with guidance. Empty is null.
            guidance_scale (`float`, *optional*, defaults to 1.0): gamma; 1 samples the model alone.
            temperature (`float`, *optional*, defaults to 1.0): Above 0.
            max_new_tokens (`int`, *optional*, defaults to 256): Decoder steps `S`.
            eos_token_ids (`list[int]`, *optional*): Not used: nothing ends before its last step.

        Returns:
            [`~trl_drcd.sampling.Rollout`]: Delayed layout; the mask id where a codebook has no code.

        Raises:
            ValueError: If guidance lacks negative prompts, or there are fewer steps than delays.
        """
        self.check_length(max_new_tokens)
        different, index = distinct_rows(stacked_prompts(prompt_ids, negative_prompt_ids, guidance_scale))
        musicgen: Any = unwrapped(model)
        device = musicgen.device
        with torch.no_grad(), evaluating(model), cast_once(musicgen, device.type):
            ids, mask = left_pad(different, self.tokenizer.pad_token_id or 0)
            condition = self._condition(musicgen, ids.to(device), mask.to(device))
            begin = torch.full((len(different), self.num_codebooks), self.mask_id, device=device)
            stream = MusicgenStream(musicgen.decoder.model, condition, begin, index.to(device), max_new_tokens)
            layout = is_coded(max_new_tokens, self.num_codebooks).to(device)
            return decode(
                stream, self.heads(model), max_new_tokens, guidance_scale, temperature, (), self.mask_id, layout
            )

    def sample(
        self,
        model: PreTrainedModel,
        prompt_ids: list[list[int]],
        negative_prompt_ids: list[list[int]] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
    ) -> list[list[int]]:
        """The completions of [`rollout`], `S * K` ids each."""
        return self.rollout(
            model, prompt_ids, negative_prompt_ids, guidance_scale, temperature, max_new_tokens
        ).completions()


class MusicgenStream:
    """
    The decoder of a MusicGen; each different prompt is encoded once, and its cross-attention computed once.

    Args:
        decoder (`MusicgenModel`): Without its heads.
        condition (`dict`): Of [`MusicgenPolicy._condition`], for each of the `U` different prompts.
        begin (`torch.Tensor`): What the decoder begins with, int64, shape `(U, K)`.
        index (`torch.Tensor`): The prompt of each row, int64, shape `(R,)`.
        steps (`int`): Decoder steps.
    """

    def __init__(
        self, decoder: Any, condition: dict[str, torch.Tensor], begin: torch.Tensor, index: torch.Tensor, steps: int
    ):
        self.decoder, self.condition, self.begin, self.index = decoder, condition, begin, index
        self.cache: Any = preallocated_cross_cache(decoder.config, steps)

    def start(self) -> torch.Tensor:
        """Every row begins alike, so that the first step is one of prompts."""
        hidden = self.step(self.begin)
        if len(self.index) != len(hidden):
            self.keep(self.index)
            hidden = hidden[self.index]
        return hidden

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states `(R, H)` after a step of `K` codes for each row."""
        output = self.decoder(
            input_ids=tokens.flatten()[:, None], past_key_values=self.cache, use_cache=True, **self.condition
        )
        hidden: torch.Tensor = output.last_hidden_state[:, -1]
        return hidden

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with the given rows."""
        self.cache.reorder_cache(rows)
        self.condition = {name: tensor[rows] for name, tensor in self.condition.items()}

"""
MusicGen: a T5 encoder, a decoder with `K` heads over delayed codebooks, and an audio codec.

A completion is one list of `S * K` ids in the delay pattern of `generate`: step by step, the `K` codebooks of each
step in order. Codebook `k` starts `k` steps late and ends `K - 1 - k` steps early; the remaining positions hold the
mask id, `vocab_size`. Of a stereo model the codebooks of left and right alternate, and each pair has one delay,
`k // 2`. Only the codec undoes the delay ([`~trl_drcd.audio.codecs.CodebookCodec`]).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import EncodecFeatureExtractor, MusicgenProcessor, PreTrainedModel, PreTrainedTokenizerBase

from trl_drcd.audio.codecs import CodebookCodec, delays_of, is_coded
from trl_drcd.compat.dropout import turn_off_dropout
from trl_drcd.compat.family_hooks import forget_patched_forward
from trl_drcd.compat.musicgen import MusicgenInTRL, hold_positions
from trl_drcd.guidance import EarlySteps, left_pad, stacked_prompts
from trl_drcd.heads import Head
from trl_drcd.policies.causal_lm import _full
from trl_drcd.policies.causal_lm import without_peft as unwrapped
from trl_drcd.prompts import Prompt, Row
from trl_drcd.sampling import CrossAttentionStream, Rollout, decode, distinct_rows, sampling_mode

# Attributes of the model that are always frozen. As in AudioCraft, the projection is part of the conditioning
FROZEN = ("text_encoder", "audio_encoder", "enc_to_dec_proj")
# Linear layers of the decoder; T5 and EnCodec use other names
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


class MusicgenPolicy:
    """
    The policy of a `MusicgenForConditionalGeneration`, mono or stereo.

    The decoder is trained, including its embeddings and heads. The text encoder, its projection and the audio codec
    are frozen, and shared by teacher and student.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The T5 tokenizer.
        config (`MusicgenConfig`): The model's configuration.
        chat_template_kwargs (`dict`, *optional*): Not used, as prompts are texts.
        allowed_token_ids (*optional*): Must be `None`, as all codes are allowed.

    Raises:
        ValueError: If `allowed_token_ids` are given.
    """

    rolls_out_with_trl = False
    has_own_codec = True
    in_trl = MusicgenInTRL
    frozen: str | None = rf"(base_model\.model\.)?({'|'.join(FROZEN)})"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        chat_template_kwargs: dict | None = None,
        allowed_token_ids: torch.Tensor | None = None,
    ):
        if allowed_token_ids is not None:
            raise ValueError("`allowed_token_ids` is for causal LMs: every id of a MusicGen is a code; leave it out")
        self.tokenizer = tokenizer
        self.num_codebooks: int = config.decoder.num_codebooks
        self.channels: int = config.decoder.audio_channels
        self.first_frame_steps = delays_of(self.num_codebooks, self.channels)[-1] + 1
        self.mask_id: int = config.decoder.vocab_size

    # ---------------------------------------------------------------- setting up

    def prepare(self, model: PreTrainedModel) -> None:
        """
        Freeze [`FROZEN`], turn off all dropout, and undo TRL's changes to the model.

        Raises:
            ValueError: If an adapter targets the heads, where it has no effect, or a frozen module.
        """
        musicgen = unwrapped(model)
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
        forget_patched_forward(musicgen)  # TRL's fused LM head supports a single head only
        self.in_trl.restore_special_tokens(musicgen.generation_config, musicgen.config)

    def save_extras(self, model: PreTrainedModel, folder: str | os.PathLike) -> None:
        """Write `preprocessor_config.json`, which processors and pipelines need."""
        rate = model.config.audio_encoder.sampling_rate
        extractor = EncodecFeatureExtractor(self.channels, rate, padding_side="left")
        MusicgenProcessor(extractor, self.tokenizer).save_pretrained(folder)

    def codec(self, model: PreTrainedModel) -> CodebookCodec:
        """The codec of the model's own audio encoder, not a copy."""
        encoder = unwrapped(model).audio_encoder
        return CodebookCodec(encoder, self.num_codebooks, self.mask_id, channels=self.channels)

    def prompt_vocabulary(self, model: PreTrainedModel) -> int:
        """Vocabulary size of the text encoder."""
        musicgen = unwrapped(model)
        return int(musicgen.text_encoder.get_input_embeddings().num_embeddings)

    def sampled_from(self, model: PreTrainedModel) -> torch.nn.Module:
        """The decoder without its heads, which `rollout` applies itself."""
        musicgen = unwrapped(model)
        decoder: torch.nn.Module = musicgen.decoder.model
        return decoder

    def check_length(self, max_completion_length: int) -> None:
        """Raise `ValueError` if there are fewer steps than the delays need: `generate` would silently skip them."""
        longest = delays_of(self.num_codebooks, self.channels)[-1]
        if max_completion_length < (least := 2 * longest):
            raise ValueError(
                f"`max_completion_length={max_completion_length}` decoder steps are too few for the delays of "
                f"{self.num_codebooks} codebooks; give at least {least} ({longest} more than frames)"
            )

    # ---------------------------------------------------------------- conditioning

    def negative_prompt_ids(self, rows: Sequence[Row], negative_prompt: Prompt | None) -> list[list[int]]:
        """
        Token ids of each row's negative prompt; an empty list is the null condition.

        An empty list becomes a row of padding, whose mask zeroes all encoder states, as in the null condition of
        `generate`. The empty text, in contrast, is an ordinary prompt.

        Args:
            rows (`list[dict]`): Dataset rows with `prompt` and optionally `negative_prompt`.
            negative_prompt (`str` or `None`): Used for rows without their own.

        Returns:
            `list[list[int]]`: One sequence per row; may be empty.

        Raises:
            ValueError: If a prompt is not a text.
        """
        texts = [row["negative_prompt"] if row.get("negative_prompt") is not None else negative_prompt for row in rows]
        for text in [row["prompt"] for row in rows] + texts:
            if not isinstance(text, str | None):
                raise ValueError(f"MusicGen reads texts: `prompt` and `negative_prompt` must be `str`, got {text!r}")
        return [[] if text is None else list(self.tokenizer(text)["input_ids"]) for text in texts]

    def _condition(self, model: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs of the decoder's cross-attention: projected encoder states, zero where masked, and the mask."""
        if prompt_ids.shape[1] == 0:  # null conditions only
            prompt_ids, prompt_mask = (torch.nn.functional.pad(t, (0, 1)) for t in (prompt_ids, prompt_mask))
        states = model.text_encoder(input_ids=prompt_ids, attention_mask=prompt_mask).last_hidden_state
        if hasattr(model, "enc_to_dec_proj"):
            states = model.enc_to_dec_proj(states)
        # `where` and not a product: the encoder states of an all-padding row may be NaN
        states = states.where(prompt_mask[..., None].bool(), 0.0)
        return {"encoder_hidden_states": states, "encoder_attention_mask": prompt_mask}

    # ---------------------------------------------------------------- scoring

    def _steps(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Reshape `(B, S * K)`, possibly right-padded, to `(B, S, K)`."""
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
            prompt_mask (`torch.Tensor`): 1 for tokens, shape `(B, P)`; a row of zeros is the null condition.
            completion_ids (`torch.Tensor`): Delayed layout, int64, shape `(B, S * K)`.
            completion_mask (`torch.Tensor`): 1 for ids, 0 for padding, shape `(B, S * K)`.

        Returns:
            `torch.Tensor`: Shape `(B, S, H)`.
        """
        musicgen = unwrapped(model)
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
        Logits of the model's own forward on one unpadded sequence.

        Args:
            model (`PreTrainedModel`): The model, wrapped or not.
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
        musicgen = unwrapped(model)
        return [Head(_full(head.weight)) for head in musicgen.decoder.lm_heads]

    def ids_and_mask(
        self, completion_ids: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Ids and boolean mask `(B, S, K)`: False in the delays and in padding.

        Where the mask is False, the id may be outside the heads' vocabulary.
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
        early: EarlySteps | None = None,
    ) -> Rollout:
        """
        Sample completions, with classifier-free guidance (one doubled batch) if `guidance_scale` is not 1.

        Replaces `generate`, which decodes to audio, has no negative prompts, and takes guidance and truncation from
        the checkpoint.

        Args:
            model (`PreTrainedModel`): Unwrapped, with or without adapters.
            prompt_ids (`list[list[int]]`): `B` prompts; equal prompts are encoded once.
            negative_prompt_ids (`list[list[int]]`, *optional*): `B` negative prompts, required with guidance; an empty
                one is the null condition.
            guidance_scale (`float`, *optional*, defaults to 1.0): gamma of Eq. (1); 1 disables guidance.
            temperature (`float`, *optional*, defaults to 1.0): Above 0.
            max_new_tokens (`int`, *optional*, defaults to 256): Decoder steps `S`.
            eos_token_ids (`list[int]`, *optional*): Not used: every completion has `S` steps.
            early ([`~trl_drcd.guidance.EarlySteps`], *optional*): The first steps, with a guidance scale of their own.

        Returns:
            [`~trl_drcd.sampling.Rollout`]: Delayed layout; the mask id where a codebook has no code.

        Raises:
            ValueError: If guidance lacks negative prompts, or there are fewer steps than delays.
        """
        self.check_length(max_new_tokens)
        different, index = distinct_rows(stacked_prompts(prompt_ids, negative_prompt_ids, guidance_scale))
        musicgen = unwrapped(model)
        device = musicgen.device
        with sampling_mode(model, musicgen):
            ids, mask = left_pad(different, self.tokenizer.pad_token_id or 0)
            condition = self._condition(musicgen, ids.to(device), mask.to(device))
            begin = torch.full((len(different), self.num_codebooks), self.mask_id, device=device)
            stream = MusicgenStream(musicgen.decoder.model, condition, begin, index.to(device), max_new_tokens)
            layout = is_coded(max_new_tokens, self.num_codebooks, self.channels).to(device)
            return decode(
                stream, self.heads(model), max_new_tokens, guidance_scale, temperature, (), self.mask_id, layout,
                early=early,
            )  # fmt: skip


class MusicgenStream(CrossAttentionStream):
    """
    Decoding stream of a MusicGen.

    Args:
        decoder (`MusicgenModel`): The decoder without its heads.
        condition (`dict`): Output of [`MusicgenPolicy._condition`] for the `U` distinct prompts.
        first (`torch.Tensor`): Start tokens of the decoder, int64, shape `(U, K)`.
        index (`torch.Tensor`): Index of each row's prompt, int64, shape `(R,)`.
        steps (`int`): Number of decoder steps.
    """

    def __init__(
        self, decoder: Any, condition: dict[str, torch.Tensor], first: torch.Tensor, index: torch.Tensor, steps: int
    ):
        super().__init__(decoder, condition, index, steps)
        self.first = first
        if self.fixed_rows:
            hold_positions(decoder.decoder, self.length)

    def start(self) -> torch.Tensor:
        """Hidden states `(R, H)` that predict the first step."""
        return self.begin(self.first.flatten()[:, None])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states `(R, H)` after one step of `K` codes per row, int64 `(R, K)`."""
        return self.read(tokens.flatten()[:, None])

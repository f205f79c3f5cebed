"""
The teacher: the initial model, or a separate one, with classifier-free guidance, Eq. (1) of
https://huggingface.co/papers/2410.06084.

Letters: `B` sequences, `S` steps, `K` codebooks, `V` vocabulary, `H` hidden size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from trl_drcd.compat.trl_private import use_adapter
from trl_drcd.distributed import InsideForward
from trl_drcd.guidance import EarlySteps, guide_hidden_states, scales_of_tokens, step_scales
from trl_drcd.heads import Head
from trl_drcd.losses import guided_logits
from trl_drcd.merging.loading import load_adapter_model
from trl_drcd.policies import Policy, policy_class, teacher_prompt_ids
from trl_drcd.prompts import Prompt, Row
from trl_drcd.validation.model_folders import load_model

Padded = tuple[torch.Tensor, torch.Tensor]  # ids and mask
logger = logging.getLogger(__name__)


class TeacherStates(NamedTuple):
    """The teacher's last hidden states `(B, S, H)` on completions: `cond`, and `uncond` with guidance."""

    cond: torch.Tensor
    uncond: torch.Tensor | None


class GuidedTeacher:
    """
    The guided teacher: a frozen copy of the initial model, the student with its adapter off, or a separate model.

    [`read`] runs the teacher's forward once per rollout. The loss then applies the teacher's head to the hidden states
    kept by [`stored`].

    Args:
        policy (`Policy`): The policy of the model family.
        copy (`PreTrainedModel`, *optional*): The frozen copy or the separate model, wrapped by Accelerate; `None` if
            the student is a PEFT model whose base is the teacher.
        guidance_scale (`float`): gamma of Eq. (1); 1 disables guidance.
        accelerator (`Accelerator`): The trainer's accelerator.
        early ([`~trl_drcd.guidance.EarlySteps`], *optional*): The first steps, with a guidance scale of their own.
    """

    def __init__(
        self,
        policy: Policy,
        copy: PreTrainedModel | None,
        guidance_scale: float,
        accelerator: Accelerator,
        early: EarlySteps | None = None,
    ):
        self.policy, self.copy, self.guidance_scale, self.accelerator = policy, copy, guidance_scale, accelerator
        self.early = early
        self.inside_forward = InsideForward(accelerator)

    @property
    def guided(self) -> bool:
        """Whether guidance is on, so that there is an unconditional stream."""
        return self.guidance_scale != 1

    def model(self, student: Any) -> PreTrainedModel:
        """The unwrapped teacher of `student`."""
        model: PreTrainedModel = self.accelerator.unwrap_model(student if self.copy is None else self.copy)
        return model

    def prompts(
        self, rows: Sequence[Row], negative_prompt: Prompt | None, padded: Callable[[list[list[int]], str], Padded]
    ) -> tuple[Padded | None, Padded | None]:
        """
        What the streams read: [`read`]'s `negative_prompt` and `teacher_prompt`.

        Args:
            rows (`list[dict]`): Dataset rows of a rollout, with `prompt` and perhaps `negative_prompt`,
                `teacher_prompt`.
            negative_prompt: Of rows without their own; `None` for the null prompt.
            padded (`Callable`): Ids and mask of lists of ids, left-padded; it is told what they are, for messages.
        """
        negative = own = None
        if self.guided:
            negative = padded(self.policy.negative_prompt_ids(rows, negative_prompt), "a negative prompt")
        if any(row.get("teacher_prompt") is not None for row in rows):
            own = padded(teacher_prompt_ids(self.policy, rows), "a teacher's prompt")
        return negative, own

    @torch.no_grad()
    def read(
        self,
        student: Any,
        batch: dict[str, torch.Tensor],
        negative_prompt: Padded | None,
        batch_size: int,
        teacher_prompt: Padded | None = None,
    ) -> TeacherStates:
        """
        Run the teacher's forward on completions, conditional and unconditional stream in one batch.

        Args:
            student: The wrapped student.
            batch (`dict`): `prompt_ids`, `prompt_mask` `(B, P)`, left-padded, and `completion_ids`, `completion_mask`.
            negative_prompt (`tuple`, *optional*): Ids and mask of each row's negative prompt, left-padded, int64
                `(B, P')`; required with guidance.
            batch_size (`int`): Sequences per forward and stream; every process must run the same number of forwards.
            teacher_prompt (`tuple`, *optional*): Ids and mask of what the conditional stream reads in place of
                `prompt_ids`, left-padded, int64 `(B, P'')`.

        Returns:
            `TeacherStates`: Hidden states of both streams.
        """
        model, off = self.model(student), self.copy is None
        prompts = (batch["prompt_ids"], batch["prompt_mask"]) if teacher_prompt is None else teacher_prompt
        cond: list[torch.Tensor] = []
        uncond: list[torch.Tensor] = []
        was_training = model.training
        model.eval()
        with use_adapter(self.accelerator.unwrap_model(student), None) if off else nullcontext():
            for start in range(0, len(batch["prompt_ids"]), batch_size):
                rows = slice(start, start + batch_size)
                prompt = prompts[0][rows], prompts[1][rows]
                completion = batch["completion_ids"][rows], batch["completion_mask"][rows]
                if self.guided and negative_prompt is not None:
                    prompt = _stack_prompts(*prompt, *(part[rows] for part in negative_prompt))
                    completion = completion[0].repeat(2, 1), completion[1].repeat(2, 1)

                def forward(prompt: Any = prompt, completion: Any = completion) -> torch.Tensor:
                    with self.accelerator.autocast():
                        return self.policy.hidden_states(model, *prompt, *completion)

                hidden = self.inside_forward(student if off else self.copy, model, forward)
                first, *second = hidden.chunk(2) if self.guided else (hidden,)
                cond.append(first)
                uncond += second
        model.train(was_training)
        return TeacherStates(torch.cat(cond), torch.cat(uncond) if uncond else None)

    def heads(self, student: Any) -> list[Head]:
        """The teacher's `K` heads."""
        off = use_adapter(self.accelerator.unwrap_model(student), None) if self.copy is None else nullcontext()
        with off, self.accelerator.autocast():
            return self.policy.heads(self.model(student))

    def stored(self, states: TeacherStates, student: Any) -> dict[str, torch.Tensor]:
        """
        The entries of a batch that the loss needs from the teacher; their rows can be split and shuffled.

        These are the guided hidden states, float32 `(B, S, H)`, whose projection gives the guided logits. If a head
        soft-caps its logits, both streams are kept, as guidance is then applied to the logits. Without guidance, the
        conditional states are kept.
        """
        if states.uncond is None:
            return {"teacher_hidden": states.cond}
        if any(head.softcap is not None for head in self.heads(student)):
            return {"teacher_hidden": states.cond, "teacher_hidden_uncond": states.uncond}
        scales = step_scales(self.guidance_scale, self.early, states.cond.shape[1], states.cond)
        if isinstance(scales, torch.Tensor):
            scales = scales.view(-1, *[1] * (states.cond.ndim - 2))
        return {"teacher_hidden": guide_hidden_states(states.cond, states.uncond, scales)}

    def logits(
        self, heads: list[Head], batch: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> Callable[[int], Callable[[slice], torch.Tensor]]:
        """
        The guided logits of scored tokens, projected only for the requested rows.

        Args:
            heads (`list[Head]`): The teacher's heads, from [`heads`].
            batch (`dict`): Batch with the entries of [`stored`].
            mask (`torch.Tensor`): True where a token is scored, shape `(B, S, K)`.

        Returns:
            `Callable`: Maps a codebook to a function from a slice of its scored tokens to logits `(rows, V)`.
        """

        def of_codebook(k: int) -> Callable[[slice], torch.Tensor]:
            streams = [
                (hidden if hidden.ndim == 3 else hidden[:, :, k])[mask[..., k]]
                for name in ("teacher_hidden", "teacher_hidden_uncond")
                if (hidden := batch.get(name)) is not None
            ]
            scales = step_scales(self.guidance_scale, self.early, mask.shape[1], mask)
            scales = scales_of_tokens(scales, mask[..., k])
            return guided_logits(heads[k], streams[0], streams[1] if streams[1:] else None, scales)

        return of_codebook


def load_teacher(teacher: str | PreTrainedModel | PeftModel, student: PreTrainedModel, policy: Policy) -> Any:
    """
    Load a teacher other than the initial model, such as the model of an earlier run.

    Args:
        teacher (`str`, `PreTrainedModel` or `PeftModel`): A model, its folder or name, or the folder of an adapter. An
            adapter is merged into its base. The teacher may be larger than the student.
        student (`PreTrainedModel`): The student. A loaded teacher gets its data type, and every teacher its device.
        policy (`Policy`): The policy of the student's family.

    Returns:
        `PreTrainedModel`: The teacher, not yet frozen or wrapped.

    Raises:
        ValueError: If the teacher's family or the size of its vocabulary differs from the student's, or, of a name or
            folder, the ids of its tokenizer.
    """
    if isinstance(teacher, str):
        _check_same_tokens(teacher, policy.tokenizer)
        dtype = next(p.dtype for p in student.parameters() if p.is_floating_point())
        teacher = _load_model_or_adapter(teacher, dtype)
    else:
        teacher = copy.deepcopy(teacher)  # it will be frozen, and may be the student itself
    model: Any = teacher.merge_and_unload() if isinstance(teacher, PeftModel) else teacher
    if (family := policy_class(model)) is not type(policy):
        raise ValueError(
            f"`teacher` is of another model family than the student: {family.__name__}, not {type(policy).__name__}"
        )
    sizes = [[head.weight.shape[0] for head in policy.heads(each)] for each in (model, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher` has another vocabulary than the student, {sizes[0]} tokens and not {sizes[1]}: the KL needs "
            "the same tokens; give a model with the student's tokenizer"
        )
    policy.prepare(model)
    return model.to(student.device)


def _check_same_tokens(teacher: str, tokenizer: Any) -> None:
    """The KL compares tokens by id: those that the tokenizers of teacher and student share must have the same ids."""
    if Path(teacher).is_dir() and not (Path(teacher) / "tokenizer_config.json").is_file():
        return
    try:
        theirs: dict[str, int] = AutoTokenizer.from_pretrained(teacher, trust_remote_code=False).get_vocab()
    except Exception as error:  # of the Hub, or of whatever a tokenizer needs
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(f"`teacher={teacher}`: its tokenizer cannot be loaded ({cause}); it must be the student's")
        return
    ours: dict[str, int] = tokenizer.get_vocab()
    shared = theirs.keys() & ours.keys()
    moved = next((token for token in sorted(shared) if theirs[token] != ours[token]), None)
    if moved is not None or len(shared) < min(len(theirs), len(ours)) / 2:
        example = (
            f"{moved!r} is {theirs[moved]} and not {ours[moved]}" if moved else f"they share {len(shared)} tokens"
        )
        raise ValueError(
            f"`teacher={teacher}` has another tokenizer than the student ({example}): the KL needs the same tokens; "
            "give a model with the student's tokenizer"
        )


def _load_model_or_adapter(name: str, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    if not (Path(name) / "adapter_config.json").is_file():
        model: PreTrainedModel = load_model(name, dtype=dtype)
        return model
    return load_adapter_model(name, dtype=dtype)


def _stack_prompts(
    cond_ids: torch.Tensor, cond_mask: torch.Tensor, uncond_ids: torch.Tensor, uncond_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional rows, then unconditional rows, left-padded to the same length: ids and mask `(2B, P)`."""
    longest = max(cond_ids.shape[1], uncond_ids.shape[1])

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (longest - tensor.shape[1], 0))

    return torch.cat([widen(cond_ids), widen(uncond_ids)]), torch.cat([widen(cond_mask), widen(uncond_mask)])

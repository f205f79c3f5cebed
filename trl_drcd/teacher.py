"""
The teacher: the initial model, or another, with classifier-free guidance, Eq. (1) of
https://huggingface.co/papers/2410.06084.

Letters: `B` sequences, `S` steps, `K` codebooks, `V` vocabulary, `H` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from trl_drcd.compat.trl_private import use_adapter
from trl_drcd.distributed import InsideForward
from trl_drcd.guidance import guide_hidden_states
from trl_drcd.heads import Head
from trl_drcd.losses import guided_logits
from trl_drcd.policies import Policy, policy_class
from trl_drcd.validation.model_folders import check_adapter_folder, load_model


class TeacherStates(NamedTuple):
    """Last hidden states `(B, S, H)` of the teacher on completions: `cond`, and `uncond` where it is guided."""

    cond: torch.Tensor
    uncond: torch.Tensor | None


class GuidedTeacher:
    """
    The initial model, guided: a frozen copy, or the student's own weights with the adapter off; or another model.

    It reads a rollout once ([`read`]); the loss then projects what [`stored`] keeps of it, token by token.

    Args:
        policy (`Policy`): Of the model family.
        copy (`PreTrainedModel`, *optional*): The frozen copy or the other model, as wrapped for the launch; `None`
            where the student is a PEFT model, whose base is the teacher.
        guidance_scale (`float`): gamma; 1 is the teacher without guidance.
        accelerator (`Accelerator`): Of the launch.
    """

    def __init__(self, policy: Policy, copy: PreTrainedModel | None, guidance_scale: float, accelerator: Accelerator):
        self.policy, self.copy, self.guidance_scale, self.accelerator = policy, copy, guidance_scale, accelerator
        self.inside_forward = InsideForward(accelerator)

    @property
    def guided(self) -> bool:
        """Whether there is an unconditional stream."""
        return self.guidance_scale != 1

    def model(self, student: Any) -> PreTrainedModel:
        """The unwrapped model that teaches `student`."""
        model: PreTrainedModel = self.accelerator.unwrap_model(student if self.copy is None else self.copy)
        return model

    @torch.no_grad()
    def read(
        self,
        student: Any,
        batch: dict[str, torch.Tensor],
        negative_prompt: tuple[torch.Tensor, torch.Tensor] | None,
        batch_size: int,
    ) -> TeacherStates:
        """
        The teacher's forward on completions; conditional and unconditional stream run as one batch.

        Args:
            student: The student as wrapped.
            batch (`dict`): `prompt_ids`, `prompt_mask` `(B, P)`, left-padded, and `completion_ids`, `completion_mask`.
            negative_prompt (`tuple`, *optional*): Ids and mask of each row's x^-, left-padded, int64 `(B, P')`; needed
                where the teacher is guided.
            batch_size (`int`): Sequences of a stream at one time; as many forwards on every process.
        """
        model, off = self.model(student), self.copy is None
        cond: list[torch.Tensor] = []
        uncond: list[torch.Tensor] = []
        was_training = model.training
        model.eval()
        with use_adapter(self.accelerator.unwrap_model(student), None) if off else nullcontext():
            for start in range(0, len(batch["prompt_ids"]), batch_size):
                rows = slice(start, start + batch_size)
                prompt = batch["prompt_ids"][rows], batch["prompt_mask"][rows]
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
        """The teacher's `K` heads; those of the base where the adapter is off."""
        off = use_adapter(self.accelerator.unwrap_model(student), None) if self.copy is None else nullcontext()
        with off, self.accelerator.autocast():
            return self.policy.heads(self.model(student))

    def stored(self, states: TeacherStates, student: Any) -> dict[str, torch.Tensor]:
        """
        What the loss needs of the teacher, by names for a batch; rows can be split and shuffled.

        Guided hidden states, float32 `(B, S, H)`: one projection gives the guided logits. Both streams where a head
        caps its logits, which then are guided themselves.
        """
        if states.uncond is None:
            return {"teacher_hidden": states.cond}
        if any(head.softcap is not None for head in self.heads(student)):
            return {"teacher_hidden": states.cond, "teacher_hidden_uncond": states.uncond}
        return {"teacher_hidden": guide_hidden_states(states.cond, states.uncond, self.guidance_scale)}

    def logits(
        self, heads: list[Head], batch: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> Callable[[int], Callable[[slice], torch.Tensor]]:
        """
        The guided logits of scored tokens, projected only for the rows that are asked for.

        Args:
            heads (`list[Head]`): [`heads`].
            batch (`dict`): With what [`stored`] made of it.
            mask (`torch.Tensor`): True where a token is scored, shape `(B, S, K)`.

        Returns:
            `Callable`: Maps a codebook to the function from a slice of its scored tokens to logits `(rows, V)`.
        """

        def of_codebook(k: int) -> Callable[[slice], torch.Tensor]:
            streams = [
                (hidden if hidden.ndim == 3 else hidden[:, :, k])[mask[..., k]]
                for name in ("teacher_hidden", "teacher_hidden_uncond")
                if (hidden := batch.get(name)) is not None
            ]
            return guided_logits(heads[k], streams[0], streams[1] if streams[1:] else None, self.guidance_scale)

        return of_codebook


def load_teacher(teacher: str | PreTrainedModel | PeftModel, student: PreTrainedModel, policy: Policy) -> Any:
    """
    A teacher other than the initial model, such as the model of an earlier run, whose guidance is distilled once more.

    Args:
        teacher (`str`, `PreTrainedModel` or `PeftModel`): A model, or the folder or name of one; of an adapter the
            folder, which is merged into its base. It may be larger than the student.
        student (`PreTrainedModel`): Whose vocabulary, data type and device the teacher must have, or gets.
        policy (`Policy`): Of the student's family.

    Raises:
        ValueError: If it is of another family, or has another vocabulary.
    """
    if isinstance(teacher, str):
        dtype = next(p.dtype for p in student.parameters() if p.is_floating_point())
        teacher = _load_model_or_adapter(teacher, dtype)
    else:
        teacher = copy.deepcopy(teacher)  # which is frozen, and may be the student
    model: Any = teacher.merge_and_unload() if isinstance(teacher, PeftModel) else teacher
    if (family := policy_class(model)) is not type(policy):
        raise ValueError(
            f"`teacher` is of another family than the student: {family.__name__}, {type(policy).__name__}"
        )
    sizes = [[head.weight.shape[0] for head in policy.heads(each)] for each in (model, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`teacher` has another vocabulary than the student, {sizes[0]} tokens and not {sizes[1]}: its "
            "distribution is over other tokens; give a model with the student's tokenizer"
        )
    policy.prepare(model)
    return model.to(student.device)


def _load_model_or_adapter(name: str, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    if not (Path(name) / "adapter_config.json").is_file():
        model: PreTrainedModel = load_model(name, dtype=dtype)
        return model
    check_adapter_folder("teacher", Path(name))
    base = load_model(str(PeftConfig.from_pretrained(name).base_model_name_or_path), dtype=dtype)
    return PeftModel.from_pretrained(base, name)


def _stack_prompts(
    cond_ids: torch.Tensor, cond_mask: torch.Tensor, uncond_ids: torch.Tensor, uncond_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional rows first, then unconditional ones, both left-padded to one length: ids and mask `(2B, P)`."""
    longest = max(cond_ids.shape[1], uncond_ids.shape[1])

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (longest - tensor.shape[1], 0))

    return torch.cat([widen(cond_ids), widen(uncond_ids)]), torch.cat([widen(cond_mask), widen(uncond_mask)])

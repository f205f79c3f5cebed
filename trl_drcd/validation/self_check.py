"""
Before the first update: what is scored is what the model says, and the teacher is the untrained student.

The loss does not call the model but its backbone, and projects by itself, in training mode, on padded rows, with the
adapter on or off. On a few tokens of the first rollout this is compared with the model's own forward in evaluation
mode on each unpadded row. A family whose head, padding or dropout is not known here is so refused, not trained on
another objective.

Letters: `B` sequences, `S` steps, `K` codebooks, `V` vocabulary, `N` scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trl_drcd.compat.trl_private import use_adapter
from trl_drcd.distributed import whole_heads
from trl_drcd.policies import Policy
from trl_drcd.reliability.processes import report_status
from trl_drcd.teacher import GuidedTeacher

STEPS = 8  # of a completion that are compared
# Nats per token between two computations of one distribution. Rounding of bfloat16 gives some 0.001; dropout of 0.1,
# a wrong head or a shifted position 0.1 to 5
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.05
PARTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")

Rows = dict[str, torch.Tensor]


def check_scoring(policy: Policy, teacher: GuidedTeacher, wrapped: Any, batch: Rows, untouched: bool) -> bool:
    """
    Refuse a model whose scoring is not its own forward, or whose teacher is not the student before it learns.

    (a) In training mode the log-probabilities that the loss would use equal those of the model's own forward in
    evaluation mode; (b), (c) with guidance 1 the KL of the untouched student to its teacher, the frozen copy or the
    base with the adapter off, is 0. All processes raise if one does.

    Args:
        policy ([`Policy`]): Of the model's family.
        teacher ([`~trl_drcd.teacher.GuidedTeacher`]): Of the run.
        wrapped: The student as wrapped for the launch.
        batch (`dict`): The first rollout: `prompt_ids`, `prompt_mask` `(B, P)`, `completion_ids`, `completion_mask`.
        untouched (`bool`): Whether the student has learned nothing in this run; else (b) and (c) are left out.

    Returns:
        `bool`: Whether there was a token to compare: `mask_truncated_completions` may leave none.

    Raises:
        ValueError: With what differs, by how much, and what to do.
    """
    report_status("it checks its scoring")
    device = teacher.accelerator.device
    _, mask = policy.ids_and_mask(batch["completion_ids"], batch["completion_mask"])
    if not teacher.accelerator.gather(mask.flatten(1).any(1)).any():
        return False
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout that is left on draws
        _check(policy, teacher, wrapped, batch, untouched)
    return True


def _check(policy: Policy, teacher: GuidedTeacher, wrapped: Any, batch: Rows, untouched: bool) -> None:
    rows, check = _few_rows(batch, policy), _Check(policy, teacher, wrapped)
    own = check.own(rows)
    found = [check.distance(own, check.scored(rows, training=True))]
    found.append(check.distance(check.scored(rows, training=False), check.taught(rows)) if untouched else 0.0)
    of_all = teacher.accelerator.gather(torch.tensor([found], device=teacher.accelerator.device)).amax(0)
    scoring, teaching = of_all.tolist()
    if not scoring <= check.tolerance:
        raise ValueError(check.blame(rows, own, scoring))
    if not teaching <= check.tolerance:
        what = "the base with its adapter off" if teacher.copy is None else "the frozen copy"
        raise ValueError(
            f"`model`: the teacher, {what}, is {teaching:.2g} nats per token away from the student before its first "
            "update, where 0 is right: the adapter changes the base, or was trained before. Merge it into the model "
            "first, and give a new one that begins at zero (`init_lora_weights=True`)"
        )


def _few_rows(batch: Rows, policy: Policy) -> Rows:
    """The rows of the shortest and of the longest prompt of a scored completion, the first steps of these."""
    _, mask = policy.ids_and_mask(batch["completion_ids"], batch["completion_mask"])
    if (some := mask.flatten(1).any(1)).any():
        batch = {name: batch[name][some] for name in PARTS}
    lengths = batch["prompt_mask"].sum(1)
    chosen = torch.stack([lengths.argmin(), lengths.argmax()])
    ids = max(STEPS, 2 * policy.num_codebooks) * policy.num_codebooks
    rows = {name: batch[name][chosen] for name in PARTS}
    return rows | {name: rows[name][:, :ids] for name in ("completion_ids", "completion_mask")}


class _Check:
    """One model's log-probabilities `(N, V)` of the scored tokens of rows, computed in several ways."""

    def __init__(self, policy: Policy, teacher: GuidedTeacher, wrapped: Any) -> None:
        self.policy, self.teacher, self.wrapped = policy, teacher, wrapped
        self.accelerator = teacher.accelerator
        self.student = self.accelerator.unwrap_model(wrapped)
        dtype = next(p.dtype for p in self.student.parameters() if p.is_floating_point())
        half = self.accelerator.mixed_precision in ("fp16", "bf16")
        self.tolerance = HALF_TOLERANCE if half else TOLERANCE.get(dtype, HALF_TOLERANCE)

    @torch.no_grad()
    def own(self, rows: Rows) -> torch.Tensor:
        """By the model's own forward in evaluation mode, each row without padding."""
        parts = []
        with _mode(self.student, training=False), self.accelerator.autocast():
            for row in range(len(rows["prompt_ids"])):
                prompt = rows["prompt_ids"][row][rows["prompt_mask"][row].bool()][None]
                completion = rows["completion_ids"][row : row + 1]
                logits = self.policy.own_logits(self.wrapped, prompt, completion)  # (S, K, V)
                parts.append(logits[self._scored(rows)[row]])
        return torch.cat(parts).float().log_softmax(-1)

    def _scored(self, rows: Rows) -> torch.Tensor:
        return self.policy.ids_and_mask(rows["completion_ids"], rows["completion_mask"])[1]

    def scored(self, rows: Rows, training: bool) -> torch.Tensor:
        """As the loss does it, by the student."""
        return self._projected(self.wrapped, self.student, rows, training)

    def taught(self, rows: Rows) -> torch.Tensor:
        """As the loss does it, by the teacher without guidance."""
        if self.teacher.copy is not None:
            return self._projected(self.teacher.copy, self.teacher.model(self.wrapped), rows, False)
        with use_adapter(self.student, None):
            return self._projected(self.wrapped, self.student, rows, False)

    @torch.no_grad()
    def _projected(self, wrapper: Any, model: Any, rows: Rows, training: bool) -> torch.Tensor:
        mask = self._scored(rows)

        def forward() -> torch.Tensor:
            with self.accelerator.autocast():
                hidden = self.policy.hidden_states(model, *(rows[name] for name in PARTS))
                heads = self.policy.heads(model)
            with whole_heads(*heads):
                logits = [
                    head.logits((hidden if hidden.ndim == 3 else hidden[:, :, k]).flatten(0, 1))
                    for k, head in enumerate(heads)
                ]
            return torch.stack(logits, dim=1).unflatten(0, mask.shape[:2])[mask]

        with _mode(model, training):
            logits: torch.Tensor = self.teacher.inside_forward(wrapper, model, forward)
        return logits.float().log_softmax(-1)

    @staticmethod
    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        """KL(one || other), nats, mean over tokens, 0 of none; what is not finite in both counts as equal."""
        if not len(one):
            return 0.0
        ratio = torch.where(one == other, 0.0, one - other)
        return float((one.exp() * ratio).nan_to_num(posinf=torch.inf).sum(-1).mean())

    def blame(self, rows: Rows, own: torch.Tensor, found: float) -> str:
        """What differs, and what to do."""
        name = type(self.student.get_base_model() if hasattr(self.student, "peft_config") else self.student).__name__
        begin = (
            f"`model`: what training would score is {found:.2g} nats per token away from what {name} says itself "
            f"(at most {self.tolerance:g} is rounding)"
        )
        alone = torch.cat([self.scored(row, training=False) for row in _each(rows)])
        if not self._agree(own, alone):
            return (
                f"{begin}: its logits are not its output embeddings times the last hidden state, in a way that is "
                "known here. This family cannot be trained; give one whose head is linear"
            )
        if not self._agree(own, self.scored(rows, training=False)):
            return (
                f"{begin}: it reads a prompt that is padded on the left otherwise than without padding. This family "
                "cannot be trained on prompts of several lengths"
            )
        return (
            f"{begin}: in training mode it computes something else than in evaluation mode. Turn off what differs "
            "(dropout of a kind of its own, noise, normalisation over the batch) in its configuration"
        )

    def _agree(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        distance = torch.tensor([self.distance(one, other)], device=self.accelerator.device)
        return bool(self.accelerator.gather(distance).amax() <= self.tolerance)


def _each(rows: Rows) -> Iterator[Rows]:
    """Rows one by one, without padding on the left."""
    for row in range(len(rows["prompt_ids"])):
        kept = rows["prompt_mask"][row].bool()
        one = {name: value[row : row + 1] for name, value in rows.items()}
        yield one | {name: one[name][:, kept] for name in ("prompt_ids", "prompt_mask")}


@contextmanager
def _mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """The whole model in training or evaluation mode; afterwards each module in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

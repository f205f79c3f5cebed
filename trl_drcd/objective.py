"""
The objective of a batch, Eq. (5) of https://huggingface.co/papers/2410.06084, from one student forward.

Letters: `B` sequences, `S` steps, `K` codebooks.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_drcd.distributed import whole_heads
from trl_drcd.losses import BatchTerms, batch_log_probs, batch_terms, policy_gradient_losses
from trl_drcd.policies import Policy
from trl_drcd.teacher import GuidedTeacher

PARTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class JointObjective:
    """
    Distillation and policy gradient losses of a batch.

    A batch is a dict with `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask` and the entries of
    [`~trl_drcd.teacher.GuidedTeacher.stored`].

    Args:
        policy (`Policy`): The policy of the model family.
        teacher ([`~trl_drcd.teacher.GuidedTeacher`]): The teacher.
        temperature (`float`): T of student and teacher.
        epsilons (`tuple[float, float]`): With several updates per rollout, the ratio is clipped to `[1 - low, 1 +
            high]`.
    """

    def __init__(self, policy: Policy, teacher: GuidedTeacher, temperature: float, epsilons: tuple[float, float]):
        self.policy, self.teacher, self.temperature, self.epsilons = policy, teacher, temperature, epsilons
        self.accelerator, self.inside_forward = teacher.accelerator, teacher.inside_forward

    def _forward(self, student: Any, batch: dict[str, Any]) -> Any:
        with self.accelerator.autocast():
            return self.policy.hidden_states(student, *(batch[name] for name in PARTS)), self.policy.heads(student)

    def terms(
        self, model: Any, wrapped: Any, batch: dict[str, Any], log_prob_weights: torch.Tensor | None = None
    ) -> BatchTerms:
        """
        [`~trl_drcd.losses.batch_terms`] of the student's forward.

        Args:
            model: The student as wrapped by the trainer for this forward.
            wrapped: The student as wrapped by Accelerate; with an adapter, its base is the teacher.
            batch (`dict`): See the class.
            log_prob_weights (`torch.Tensor`, *optional*): As in `batch_terms`.
        """
        student = self.accelerator.unwrap_model(model)

        def compute() -> BatchTerms:
            hidden, heads = self._forward(student, batch)
            ids, mask = self.policy.ids_and_mask(batch["completion_ids"], batch["completion_mask"])
            teacher_heads = self.teacher.heads(wrapped)
            with whole_heads(*heads, *teacher_heads):
                teacher_logits = self.teacher.logits(teacher_heads, batch, mask)
                return batch_terms(hidden, heads, ids, mask, teacher_logits, self.temperature, log_prob_weights)

        terms: BatchTerms = self.inside_forward(model, student, compute)
        return terms

    @torch.no_grad()
    def old_log_probs(self, wrapped: Any, batch: dict[str, Any], batch_size: int) -> torch.Tensor:
        """log p of each sampled token under the current student, nats, `(B, S, K)`; 0 where no token is scored."""
        student, parts = self.accelerator.unwrap_model(wrapped), []
        for start in range(0, len(batch["prompt_ids"]), batch_size):
            rows = {name: batch[name][start : start + batch_size] for name in PARTS}

            def forward(rows: dict[str, torch.Tensor] = rows) -> Any:
                return self._forward(student, rows)

            hidden, heads = self.inside_forward(wrapped, student, forward)
            ids, mask = self.policy.ids_and_mask(rows["completion_ids"], rows["completion_mask"])
            parts.append(batch_log_probs(hidden, heads, ids, mask, self.temperature))
        return torch.cat(parts)

    def losses(
        self, terms: BatchTerms, credits: dict[str, torch.Tensor], old_log_probs: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """
        The loss terms of each sequence, shape `(B,)`: `distillation` in nats, and one policy gradient per entry of
        `credits`.

        Args:
            terms (`BatchTerms`): The student's terms.
            credits (`dict`): Of [`term_credits`]: per sequence, shape `(B, 1, 1)`, or per token, `(B, S, K)`. The
                ratios to `old_log_probs` are per sequence or per token accordingly.
            old_log_probs (`torch.Tensor`, *optional*): See [`old_log_probs`].

        Returns:
            `dict[str, torch.Tensor]`: Name to loss.
        """
        losses = {"distillation": terms.kl}
        for name, credit in credits.items():
            log_probs, old = terms.log_probs, old_log_probs
            if credit.shape[1:] == (1, 1):
                credit, log_probs = credit[:, 0, 0], log_probs.sum((1, 2))
                old = None if old is None else old.sum((1, 2))
            losses[name] = policy_gradient_losses(log_probs, credit, old, *self.epsilons)
        return losses


def term_credits(batch: dict[str, Any], diversity_coef: float, rewarded: bool) -> dict[str, torch.Tensor]:
    """
    By how much each term beside the distillation raises log p of each token.

    Args:
        batch (`dict`): `diversity_advantages`, of each sequence, `(B,)`, or token, `(B, S, K)`, if they were computed;
            `advantages` `(B,)` of the extra rewards.
        diversity_coef (`float`): beta of the update.
        rewarded (`bool`): Whether there are extra rewards.

    Returns:
        `dict[str, torch.Tensor]`: `diversity` and perhaps `reward`, `(B, 1, 1)` or `(B, S, K)`.
    """
    zeros = torch.zeros(len(batch["prompt_ids"]), device=batch["prompt_ids"].device)
    credits = {"diversity": diversity_coef * batch.get("diversity_advantages", zeros)}
    if rewarded:
        credits["reward"] = batch["advantages"]
    return {name: credit[:, None, None] if credit.ndim == 1 else credit for name, credit in credits.items()}


def log_prob_weights(credits: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The derivative of the policy gradient losses with respect to log p, for one pass over all terms.

    Args:
        credits (`dict`): Of [`term_credits`].

    Returns:
        `torch.Tensor`: Minus the sum of the credits, `(B, 1, 1)` or `(B, S, K)`, in float64 so that it rounds as the
            separate terms do; in float32 on MPS, which has no float64.
    """
    columns = torch.broadcast_tensors(*credits.values())
    exact = torch.float32 if columns[0].device.type == "mps" else torch.float64
    return -torch.stack(columns).to(exact).sum(0)

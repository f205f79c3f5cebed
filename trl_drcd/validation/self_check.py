"""
Check, before the first update, that the loss scores the model's own distribution and that teacher and student agree.

The loss calls the model's backbone and applies the head itself, in training mode, on padded rows, with the adapter on
or off. On a few tokens of the first rollout, this is compared with the model's own forward in evaluation mode on each
unpadded row. A family with an unsupported head, padding or dropout then raises an error instead of being trained on a
different objective. An adapter has no effect before its first update, so this is done again with other values of its
weights. The log-probabilities at which the rollout was drawn are compared too, over more steps.

Letters: `B` sequences, `S` steps, `K` codebooks, `V` vocabulary, `N` scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from trl_drcd.compat.trl_private import use_adapter
from trl_drcd.distributed import whole_heads
from trl_drcd.heads import stack_logits
from trl_drcd.policies import Policy
from trl_drcd.reliability.processes import report_status
from trl_drcd.sampling import Rollout
from trl_drcd.teacher import GuidedTeacher
from trl_drcd.validation.sampler import HALF_TOLERANCE, TOLERANCE, largest_difference

STEPS = 8  # completion steps that are compared
SAMPLED_STEPS = 64  # with the log-probabilities that the sampler drew at
PADDING = 3  # positions of padding before the prompts that are compared
# For the second comparison noise is added to an adapter's weights, of this standard deviation and then of twice as
# much, until the model has moved by as many nats per token
SPREAD, DOUBLINGS, MOVED = 0.02, 8, 0.3
PARTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")

Rows = dict[str, torch.Tensor]


def check_scoring(
    policy: Policy,
    teacher: GuidedTeacher,
    wrapped: Any,
    batch: Rows,
    untouched: bool,
    sampled: Rollout | None = None,
    temperature: float = 1.0,
) -> bool:
    """
    Check that the loss scores the model's own distribution, and that an untrained student equals its teacher.

    (a) The log-probabilities used by the loss, in training mode, must equal those of the model's own forward in
    evaluation mode. (b) With guidance scale 1, the KL of the untrained student to its teacher must be 0, whether the
    teacher is (b1) a frozen copy or (b2) the base with the adapter off. Of a separate teacher (a) must hold, in place
    of (b). With guidance the rows are padded, as its two streams are. Of a student with an adapter, (a) must also
    hold, and its teacher (b2) stay the same, with noise added to the adapter's weights, which get their own values
    back; this is left out where these are sharded, and in half precision it sees only gross errors. (c) The
    log-probabilities of the tokens that were sampled must be those of the model's own forward: the mean of their
    differences is compared with the square root of twice the limit of a KL. If one process fails, all raise.

    Args:
        policy ([`Policy`]): The policy of the model's family.
        teacher ([`~trl_drcd.teacher.GuidedTeacher`]): The teacher.
        wrapped (`Any`): The student as wrapped by Accelerate.
        batch (`dict`): The first rollout: `prompt_ids` and `prompt_mask` of shape `(B, P)`, `completion_ids` and
            `completion_mask`.
        untouched (`bool`): Whether the student is untrained, and the teacher not a separate one; if not, (b) is
            skipped.
        sampled ([`~trl_drcd.sampling.Rollout`], *optional*): The rollout of these sequences; (c) is skipped without.
        temperature (`float`, *optional*, defaults to 1): At which it was sampled.

    Returns:
        `bool`: Whether there was a token to compare: `mask_truncated_completions` may leave none.

    Raises:
        ValueError: If one of them fails; the message gives the difference in nats per token, its cause and the fix.
    """
    report_status("it checks its scoring")
    device = teacher.accelerator.device
    _, mask = policy.ids_and_mask(batch["completion_ids"], batch["completion_mask"])
    if not teacher.accelerator.gather(mask.flatten(1).any(1)).any():
        return False
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout that is left on draws
        check = _Check(policy, teacher, wrapped)
        chosen = _chosen(batch, policy)
        _check(check, _few_rows(batch, policy, chosen), untouched)
        if sampled is not None:
            _check_sampled(check, _few_rows(batch, policy, chosen, SAMPLED_STEPS), chosen, sampled, temperature)
    return True


def _check_sampled(check: _Check, rows: Rows, chosen: torch.Tensor, sampled: Rollout, temperature: float) -> None:
    """(c) of [`check_scoring`], on rows of the batch that are the `chosen` ones of the rollout."""
    ids, mask = check.policy.ids_and_mask(rows["completion_ids"], rows["completion_mask"])
    drawn, at = (  # the same steps; a completion of no token has an end in its place
        torch.nn.functional.pad(part.to(mask.device)[chosen], (0, 0, 0, mask.shape[1] - part.shape[1]))
        for part in (sampled.drawn, sampled.log_probs)
    )
    own = (check.own(rows) / temperature).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
    away = (own - at[mask].to(own))[drawn[mask]].abs()
    furthest = check.of_all(float(away.mean()) if len(away) else 0.0)
    limit = largest_difference(check.tolerance)
    if not furthest <= limit:
        raise ValueError(
            f"`model`: the sampler draws tokens at log-probabilities {furthest:.2g} nats away from those of the "
            f"model's own forward pass (rounding explains at most {limit:.2g}): its cache or its positions are not "
            "supported. This family cannot be trained here"
        )


def _check(check: _Check, rows: Rows, untouched: bool) -> None:
    teacher = check.teacher
    if teacher.guided and rows["prompt_mask"].all():
        # The negative prompt is seldom as long as the prompts, so that one of them is padded
        limit = getattr(check.student.config.get_text_config(), "max_position_embeddings", None)
        length = rows["prompt_ids"].shape[1] + rows["completion_ids"].shape[1]
        padding = PADDING if limit is None else max(0, min(PADDING, limit - length))
        rows |= {name: torch.nn.functional.pad(rows[name], (padding, 0)) for name in ("prompt_ids", "prompt_mask")}
    what = "the base with its adapter off" if teacher.copy is None else "the frozen copy"
    away = check.scores_away(rows)
    if not away <= check.tolerance:
        raise ValueError(check.blame(rows, away))
    taught = check.taught(rows)
    if untouched:
        away = check.of_all(check.distance(check.scored(rows, training=False), taught))
        if not away <= check.tolerance:
            raise ValueError(
                f"`model`: the teacher, {what}, is {away:.2g} nats per token away from the student before its first "
                "update, which should be 0: the adapter changes the base, or was trained before. Merge it into the "
                "model first, and use a new adapter that starts at zero (`init_lora_weights=True`, of other kinds "
                "`init_weights=True`)"
            )
    elif teacher.copy is not None:
        away, limit = (
            check.of_all(check.distance(check.own(rows, teacher.copy), taught)),
            check.tolerance_of(teacher.copy),
        )
        if not away <= limit:
            raise ValueError(
                f"`teacher`: the loss reads it {away:.2g} nats per token away from its own forward pass (rounding "
                f"explains at most {limit:g}): its family is not supported, or left padding changes its "
                "output. Use one of the student's family"
            )
    with _other_adapter(check.student) as add_noise:
        if add_noise is None or not check.is_moved(rows, add_noise):
            return
        away = check.scores_away(rows)
        if not away <= check.tolerance:
            raise ValueError(
                f"`peft_config`: with other values of the adapter's weights, the training scores are {away:.2g} nats "
                f"per token away from the model's own forward pass (rounding explains at most {check.tolerance:g}): "
                "this kind of adapter does what the loss cannot see, such as drawing noise in training. Use another "
                "kind, such as LoRA"
            )
        away = check.of_all(check.distance(taught, check.taught(rows))) if teacher.copy is None else 0.0
        if not away <= check.tolerance:
            raise ValueError(
                f"`peft_config`: the teacher, {what}, moves by {away:.2g} nats per token with the adapter's weights, "
                "so it would change in training. Use another kind of adapter, such as LoRA"
            )


def _chosen(batch: Rows, policy: Policy) -> torch.Tensor:
    """The rows of the shortest and of the longest prompt of a scored completion, `(2,)`."""
    _, mask = policy.ids_and_mask(batch["completion_ids"], batch["completion_mask"])
    some = mask.flatten(1).any(1)
    rows = (some if some.any() else ~some).nonzero()[:, 0]
    lengths = batch["prompt_mask"].sum(1)[rows]
    return rows[torch.stack([lengths.argmin(), lengths.argmax()])]


def _few_rows(batch: Rows, policy: Policy, chosen: torch.Tensor, steps: int = STEPS) -> Rows:
    """The first steps of some rows."""
    ids = max(steps, 2 * policy.num_codebooks) * policy.num_codebooks
    rows = {name: batch[name][chosen] for name in PARTS}
    return rows | {name: rows[name][:, :ids] for name in ("completion_ids", "completion_mask")}


class _Check:
    """Log-probabilities `(N, V)` of the scored tokens, computed in several ways."""

    def __init__(self, policy: Policy, teacher: GuidedTeacher, wrapped: Any) -> None:
        self.policy, self.teacher, self.wrapped = policy, teacher, wrapped
        self.accelerator = teacher.accelerator
        self.student = self.accelerator.unwrap_model(wrapped)
        self.tolerance = self.tolerance_of(self.student)

    def tolerance_of(self, model: Any) -> float:
        """What rounding explains at most, of a model of this dtype."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        half = self.accelerator.mixed_precision in ("fp16", "bf16")
        return HALF_TOLERANCE if half else TOLERANCE.get(dtype, HALF_TOLERANCE)

    def scores_away(self, rows: Rows) -> float:
        """How far the training scores are from the model's own forward, the largest distance of all processes."""
        return self.of_all(self.distance(self.own(rows), self.scored(rows, training=True)))

    def is_moved(self, rows: Rows, add_noise: Callable[[float], None]) -> bool:
        """Add more and more noise until the model's own forward has moved; whether it has, and is finite."""
        before, spread, moved = self.own(rows), SPREAD, 0.0
        for _ in range(DOUBLINGS):
            add_noise(spread)
            moved = self.of_all(self.distance(before, self.own(rows)))
            if not moved < MOVED:
                break
            spread *= 2
        return 0 < moved < math.inf

    def of_all(self, distance: float) -> float:
        """The largest value of all processes; NaN if one is."""
        return float(self.accelerator.gather(torch.tensor([distance], device=self.accelerator.device)).amax())

    @torch.no_grad()
    def own(self, rows: Rows, model: Any = None) -> torch.Tensor:
        """Log-probabilities from the own forward of a model, by default the student, in evaluation mode, unpadded."""
        parts, model = [], self.wrapped if model is None else model
        with _mode(self.accelerator.unwrap_model(model), training=False), self.accelerator.autocast():
            for row in range(len(rows["prompt_ids"])):
                prompt = rows["prompt_ids"][row][rows["prompt_mask"][row].bool()][None]
                completion = rows["completion_ids"][row : row + 1]
                logits = self.policy.own_logits(model, prompt, completion)  # (S, K, V)
                parts.append(logits[self._scored(rows)[row]])
        return torch.cat(parts).float().log_softmax(-1)

    def _scored(self, rows: Rows) -> torch.Tensor:
        return self.policy.ids_and_mask(rows["completion_ids"], rows["completion_mask"])[1]

    def scored(self, rows: Rows, training: bool) -> torch.Tensor:
        """The student's log-probabilities, computed as in the loss."""
        return self._projected(self.wrapped, self.student, rows, training)

    def taught(self, rows: Rows) -> torch.Tensor:
        """The teacher's log-probabilities without guidance, computed as in the loss."""
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
            return stack_logits(logits).unflatten(0, mask.shape[:2])[mask]

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

    def blame(self, rows: Rows, found: float) -> str:
        """The error message: the cause of the difference, and the fix."""
        own = self.own(rows)
        name = type(self.student.get_base_model() if hasattr(self.student, "peft_config") else self.student).__name__
        begin = (
            f"`model`: the training scores are {found:.2g} nats per token away from the forward pass of {name} "
            f"(rounding explains at most {self.tolerance:g})"
        )
        alone = torch.cat([self.scored(row, training=False) for row in _each(rows)])
        if not self._agree(own, alone):
            return (
                f"{begin}: its logits are not a supported function of its output embeddings and last hidden state. "
                "This family cannot be trained; use one whose head is linear"
            )
        if not self._agree(own, self.scored(rows, training=False)):
            return (
                f"{begin}: left padding changes its output. This family cannot be trained on prompts of different "
                "lengths"
            )
        return (
            f"{begin}: its output differs between training and evaluation mode. Turn off the cause (custom dropout, "
            "noise, batch normalisation) in its configuration"
        )

    def _agree(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return self.of_all(self.distance(one, other)) <= self.tolerance


def _each(rows: Rows) -> Iterator[Rows]:
    """Iterate over the rows one at a time, without left padding."""
    for row in range(len(rows["prompt_ids"])):
        kept = rows["prompt_mask"][row].bool()
        one = {name: value[row : row + 1] for name, value in rows.items()}
        yield one | {name: one[name][:, kept] for name in ("prompt_ids", "prompt_mask")}


@contextmanager
def _other_adapter(model: Any) -> Iterator[Callable[[float], None] | None]:
    """
    A function that adds noise of a given standard deviation to the weights of a model's adapter; on exit all are as
    before.

    Modules that are trained as a whole beside the adapter stay as they are. `None` for a model without an adapter, or
    with sharded weights.
    """
    weights = [
        (p, p.detach().clone())
        for name, p in model.named_parameters()
        if isinstance(model, PeftModel) and p.requires_grad and "modules_to_save" not in name
    ]
    if not weights or any(type(p) is not torch.nn.Parameter or hasattr(p, "ds_id") for p, _ in weights):
        yield None
        return

    @torch.no_grad()
    def add_noise(spread: float) -> None:
        for p, _ in weights:
            p.add_(spread * torch.randn_like(p))

    try:
        yield add_noise
    finally:
        with torch.no_grad():
            for p, before in weights:
                p.copy_(before)


@contextmanager
def _mode(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """Put the whole model in training or evaluation mode; on exit restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

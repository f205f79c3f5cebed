"""
Diversity-rewarded CFG distillation as a subclass of TRL's RLOO trainer.

What is TRL's: samplers, extra reward functions, logging, checkpoints. What differs, in the order of a step:
completions are sampled without guidance; the guided teacher reads them; their diversity gets an unbiased advantage;
the loss is Eq. (5), from one student forward.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import RLOOTrainer
from trl.models import unwrap_model_for_generation

from trl_drcd.callbacks import SampleCallback, WarmupCheck
from trl_drcd.cards import base_of, final_metrics, trained_model, write_card
from trl_drcd.clipping import SeparateGradient, check_clipping
from trl_drcd.compat.torch_distributed import set_group_timeout
from trl_drcd.compat.trl_private import get_config_model_id
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.distributed import check_sharding, frozen_copy, prepare_frozen, shard, whole_weights
from trl_drcd.diversity import DiversityReward
from trl_drcd.diversity_term import DiversityTerm
from trl_drcd.files import local_name
from trl_drcd.guidance import ancestral_generation_config, left_pad
from trl_drcd.hub.push import push_to_hub
from trl_drcd.hub.upload import check_target
from trl_drcd.losses import BatchTerms
from trl_drcd.mixture import as_embedder
from trl_drcd.monitoring import GradientNorms, RunningMeans, Stopwatch
from trl_drcd.objective import JointObjective
from trl_drcd.policies import Policy, allowed_token_ids, policy_class, teacher_prompt_ids
from trl_drcd.reliability.batches import BadBatchError
from trl_drcd.reliability.failures import explained_failures
from trl_drcd.reliability.guard import BatchGuard
from trl_drcd.reliability.identity import run_identity
from trl_drcd.reliability.processes import report_status
from trl_drcd.reliability.sampler import EpochSampler
from trl_drcd.reliability.signals import SignalStop
from trl_drcd.reliability.snapshot import Snapshot, load_rollout, save_rollout, set_random_states
from trl_drcd.reliability.writer import CheckpointWriter
from trl_drcd.teacher import GuidedTeacher, TeacherStates, load_teacher
from trl_drcd.validation.before_loading import check_before_loading
from trl_drcd.validation.once_loaded import check_lengths, check_once_loaded, check_skipping
from trl_drcd.validation.self_check import check_scoring
from trl_drcd.validation.vllm import check_vllm_lengths

logger = get_logger(__name__)


class CFGDistillDiversityTrainer(RLOOTrainer):
    """
    Trainer of *Diversity-Rewarded CFG Distillation* (https://huggingface.co/papers/2410.06084).

    The student samples groups of completions without guidance. The teacher is the initial model with classifier-free
    guidance: a frozen copy, or, with a PEFT adapter, the same weights with the adapter switched off; or another model,
    `teacher`. The loss of an update is

        mean over sequences of  sum over tokens KL(student || guided teacher)
                                - (diversity_coef * A_diversity + A_extra) * log p(sequence)

    with `A_diversity` from [`~trl_drcd.diversity.diversity_advantages`] and `A_extra` RLOO's leave-one-out advantage
    of the extra reward functions, weighted by `reward_weights`. One student forward and backward serves all terms.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): As in [`~trl.RLOOTrainer`]. A causal LM or a MusicGen.
        reward_funcs (*optional*): Extra per-sample rewards, as in [`~trl.RLOOTrainer`]; the diversity reward is not
            among them, it comes with `embedder`.
        args ([`CFGDistillDiversityConfig`], *optional*): The paper's settings if `None`.
        train_dataset (`Dataset` or `IterableDataset`): Column `prompt`, and perhaps `negative_prompt`, and
            `teacher_prompt`, which the teacher reads in place of `prompt`.
        eval_dataset (*optional*): The same, or a dictionary of such.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Loaded with the model if `None`.
        embedder (`Callable`, *optional*): E of the diversity reward; needed where `diversity_coef` is above 0. Without
            it diversity is not measured. See [`DiversityReward`]. A mapping of names to embedders rewards the mean of
            their distances ([`~trl_drcd.mixture.EmbedderMixture`], which takes weights as well).
        codec (*optional*): Turns completion ids into audio, for models of audio tokens; then E and the logged samples
            get audio. `None` is the model's own, where it has one (MusicGen).
        teacher (`str`, `PreTrainedModel` or `PeftModel`, *optional*): A model or adapter with the student's vocabulary
            whose guidance is distilled in place of the initial model's, such as that of an earlier run (iterated
            amplification) or a larger one. It costs its memory.
        **kwargs (*optional*): `callbacks`, `optimizers`, `peft_config`, `quantization_config`,
            `reward_processing_classes` of [`~trl.RLOOTrainer`].

    Raises:
        ValueError: Before any sampling, if something cannot give a right result: see the messages.
    """

    args: CFGDistillDiversityConfig
    _tag_names = ["trl", "trl-drcd", "cfg-distillation"]
    _name = "Diversity-Rewarded CFG Distillation"
    _paper = {
        "title": "Diversity-Rewarded CFG Distillation",
        "id": "2410.06084",
        "citation": textwrap.dedent("""\
            @inproceedings{cideron2025diversity,
                title     = {{Diversity-Rewarded CFG Distillation}},
                author    = {Geoffrey Cideron and Andrea Agostinelli and Johan Ferret and Sertan Girgin and Romuald Elie and Olivier Bachem and Sarah Perrin and Alexandre Ram{\\'e}},
                year      = 2025,
                booktitle = {International Conference on Learning Representations},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: CFGDistillDiversityConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        embedder: Any = None,
        codec: Any = None,
        teacher: str | PreTrainedModel | PeftModel | None = None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CFGDistillDiversityConfig(f"{name.rstrip('/').split('/')[-1]}-DRCD")
        embedder = as_embedder(embedder)
        extra_rewards = [] if reward_funcs is None else reward_funcs
        extra_rewards = extra_rewards if isinstance(extra_rewards, list) else [extra_rewards]
        check_before_loading(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            kwargs.get("peft_config"),
            extra_rewards,
            embedder,
            codec,
            teacher,
        )
        if isinstance(model, str):
            args.model_init_kwargs = {"use_safetensors": True} | (args.model_init_kwargs or {})
        revision = (args.model_init_kwargs or {}).get("revision")
        family = policy_class(model, revision)
        with family.in_trl.patched():
            super().__init__(
                model=model,
                reward_funcs=extra_rewards,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=family.in_trl.processing_class(model, processing_class, revision),
                **kwargs,
            )
        self._updates_per_rollout = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        check_sharding(self.accelerator, self._updates_per_rollout, family.frozen is not None)
        check_skipping(args, self.is_deepspeed_enabled)
        check_clipping(args.max_grad_norm_diversity, self.accelerator)
        set_group_timeout(args.ddp_timeout)
        student = self.accelerator.unwrap_model(self.model)
        allowed, suppressed = allowed_token_ids(args.allowed_token_ids, student, self._tokenizer, self.eos_token_ids)
        self.policy: Policy = family(self._tokenizer, student.config, self.chat_template_kwargs, allowed)
        self.policy.check_length(args.max_completion_length)
        self.policy.prepare(student)
        # What is sampled is what is scored, whatever the model came with; saved models sample as they were trained to
        student.generation_config = ancestral_generation_config(
            student.generation_config, args.temperature, suppress_tokens=suppressed
        )
        check_once_loaded(
            self.policy, student, self._tokenizer, self.train_dataset, args, codec, self._tokenize_prompts
        )
        self.codec = self.policy.codec(student) if codec is None else codec
        self._make_parts(student, embedder, teacher)
        self.add_callback(self._signals)
        self.add_callback(WarmupCheck())
        if args.sample_steps:
            self.add_callback(SampleCallback(self, self.codec))

    def _make_parts(self, student: PreTrainedModel, embedder: Any, teacher: Any) -> None:
        """What the trainer has: teacher, diversity term, objective, guard, checkpoints, and what is measured."""
        args = self.args
        self._diversity: DiversityTerm | None = None
        if embedder is not None:
            reward, decode = DiversityReward(embedder, args.num_generations, self.codec), self._decoded
            self._diversity = DiversityTerm(reward, decode, args, self.policy.num_codebooks, self.accelerator)
        other = None if teacher is None else load_teacher(teacher, student, self.policy)
        identity = run_identity(args, student, self.train_dataset, other)
        self._other_teacher = None if other is None else base_of(other)
        taught_by = self._make_teacher(student, other)
        self.teacher = GuidedTeacher(self.policy, taught_by, args.guidance_scale, self.accelerator)
        self.joint_objective = JointObjective(
            self.policy, self.teacher, self.temperature, (args.epsilon, self.epsilon_high)
        )
        self._guard = BatchGuard(args.on_bad_batch, self._tokenizer, self.accelerator)
        self.reward_funcs = self._guard.checked_rewards(self.reward_funcs)
        self._checkpoints = CheckpointWriter(args, self.accelerator)
        self._checkpoints.identity = identity
        self._snapshot: Snapshot | None = None  # after the last update
        self._scoring_checked = False
        self.aux_loss_enabled = False  # TRL's load balancing of experts, which Eq. (5) has not
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._gradient_norms = GradientNorms(self.accelerator)
        self._diversity_gradient = SeparateGradient(self.accelerator)
        self._stopwatch = Stopwatch(self.accelerator)
        self._signals = SignalStop(self.accelerator)

    def _make_teacher(self, student: PreTrainedModel, other: PreTrainedModel | None) -> PreTrainedModel | None:
        """
        The frozen copy or the other model, as the launch wraps it, or `None` where the adapter's base teaches; with
        FSDP2 the student is sharded here too.
        """
        parts_stay_whole = self.is_fsdp_enabled and self.policy.frozen is not None
        if parts_stay_whole:
            self.accelerator.state.fsdp_plugin.ignored_modules = self.policy.frozen
        if other is not None:
            copy = prepare_frozen(other, self.accelerator)
        else:
            copy = None if is_peft_model(student) else frozen_copy(student, self.accelerator)
        if parts_stay_whole:
            shard(student, self.accelerator)
        return copy

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("negative_prompt", "teacher_prompt"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    # ---------------------------------------------------------------- rollouts

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        self._check_lengths(prompt_ids, "a prompt")
        check_vllm_lengths(prompt_ids, self.args)
        # Autocast around the whole rollout casts the weights once, not once per token; vLLM has a precision of its own
        autocast = nullcontext() if self.use_vllm else self.accelerator.autocast()
        with self._stopwatch.timed("rollout"), autocast:
            if self._samples_with_trl(images, multimodal_fields):
                student = self.accelerator.unwrap_model(self.model)
                weights = nullcontext() if self.use_vllm else whole_weights(student)
                with weights, self._guard.watched_sampling(self.policy.sampled_from(student), prompt_ids):
                    completion_ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields)
            else:
                completion_ids = self._sample(prompt_ids)
        # RLOO looks at the last token of each completion; one that is empty stands as a single eos
        return [ids or [self._tokenizer.eos_token_id] for ids in completion_ids]

    def _samples_with_trl(self, images, multimodal_fields) -> bool:
        """Whether TRL's own way is asked for: vLLM, continuous batching, settings of `generate`, images."""
        asked = self.use_vllm or self.use_transformers_continuous_batching
        asked = asked or self.args.cache_implementation or self.args.generation_kwargs
        return self.policy.rolls_out_with_trl and bool(asked or images or multimodal_fields)

    def _check_lengths(self, prompt_ids: list[list[int]], what: str):
        if self.policy.rolls_out_with_trl:  # else an encoder reads the prompt
            student = self.accelerator.unwrap_model(self.model)
            check_lengths(prompt_ids, what, self.max_completion_length, student)

    @contextmanager
    def model_for_sampling(self) -> Iterator[PreTrainedModel]:
        """The student, unwrapped and whole: what is sharded is gathered once, so every process must come along."""
        generation = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with generation as model, whole_weights(model):
            yield getattr(model, "_orig_mod", model)  # a compiled model's own: decoding has a shape for each step

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions by the policy's own sampling, without guidance."""
        report_status("it samples")
        with self.model_for_sampling() as model:
            rollout = self.policy.rollout(
                model,
                prompt_ids,
                temperature=self.temperature,
                max_new_tokens=self.max_completion_length,
                eos_token_ids=self.eos_token_ids,
            )
        report_status("it has sampled")
        self._guard.note_not_finite(~rollout.finite, prompt_ids)
        return rollout.completions()

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        # TRL asks for the log-probabilities at sampling; `_old_log_probs` computes them, where somebody reads them
        return torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device), None, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self._stopwatch.timed("reward"), self._guard.watched_rewards():
            if not self.reward_funcs:  # TRL sums over the functions' columns: none, then, of one column
                rows = len(prompts) * self.accelerator.num_processes
                return torch.zeros(rows, 1, device=self.accelerator.device)
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            start = self.accelerator.process_index * len(prompts)
            own = rewards[start : start + len(prompts)]
            self._guard.check_model_rewards(self.reward_func_names, self.reward_funcs, own, prompts)
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        del output["old_logps"]
        if self._mode == "train" and not self._scoring_checked:
            untouched = self.state.global_step == 0 and self._other_teacher is None
            self._scoring_checked = check_scoring(self.policy, self.teacher, self.model_wrapped, output, untouched)
        with self._stopwatch.timed("teacher"):
            output |= self.teacher.stored(self._teacher_states(inputs, output), self.model_wrapped)
        if self._updates_per_rollout > 1 and self._mode == "train":
            output["old_log_probs"] = self.joint_objective.old_log_probs(self.model_wrapped, output, self._batch_size)
        if self._diversity is not None:
            with self._stopwatch.timed("reward"):
                output["diversity_advantages"] = self._score_diversity(inputs, output)
        if not self.reward_funcs:
            del output["advantages"]
        self._log_rollout(output)
        return output

    def _teacher_states(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> TeacherStates:
        """What the guided teacher makes of the completions."""
        negative = prompt = None
        if self.teacher.guided:
            negative_ids = self.policy.negative_prompt_ids(inputs, self.args.negative_prompt)
            negative = self._padded(negative_ids, "a negative prompt")
        if any(row.get("teacher_prompt") is not None for row in inputs):
            prompt = self._padded(teacher_prompt_ids(self.policy, inputs), "a teacher's prompt")
        return self.teacher.read(self.model_wrapped, output, negative, self._batch_size, prompt)

    def _padded(self, prompt_ids: list[list[int]], what: str) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_lengths(prompt_ids, what)
        ids, mask = left_pad(prompt_ids, self._tokenizer.pad_token_id)
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    @property
    def _batch_size(self) -> int:
        """Sequences per forward and process."""
        if self._mode == "train":
            return self.args.per_device_train_batch_size
        return self.args.per_device_eval_batch_size

    def _score_diversity(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> torch.Tensor:
        """Diversity advantages of this process's completions, `(b,)`, or of their codes; logs the diversity of all."""
        metrics, train = self._metrics[self._mode], self.model.training
        # Completions that `mask_truncated_completions` has masked are as long as they may be
        lengths = [n or self.max_completion_length for n in output["completion_mask"].sum(1).tolist()]
        ids = [row[:n] for row, n in zip(output["completion_ids"].tolist(), lengths, strict=True)]
        _, mask = self.policy.ids_and_mask(output["completion_ids"], output["completion_mask"])
        group = self.num_generations if train else self.num_generations_eval
        scored = self._diversity.score([row["prompt"] for row in inputs], ids, mask, group, fit=train)
        diversity = self._gather_rows(scored.rewards).mean().item()
        for name, value in ({"diversity": diversity} | scored.metrics).items():
            metrics[name].append(value)
        columns: Any = self._logs["rewards"]
        columns["diversity"].extend(scored.all_rewards.tolist())
        return scored.advantages.to(output["advantages"])

    def _log_rollout(self, output: dict[str, torch.Tensor]) -> None:
        """
        The advantages that the loss uses, a mean over each one's tokens, go into the table of completions; the reward
        is the diversity where that is all of it.
        """
        metrics, rows = self._metrics[self._mode], self.accelerator.num_processes * len(output["prompt_ids"])
        _, mask = self.policy.ids_and_mask(output["completion_ids"], output["completion_mask"])
        total = sum((credit * mask).sum((1, 2)) for credit in self._credits(output).values())
        total = total / mask.sum((1, 2)).clamp(min=1)
        logged = self._logs["advantages"]
        for _ in range(min(rows, len(logged))):  # those of the extra rewards alone
            logged.pop()
        logged.extend(self.accelerator.gather(total).tolist())
        if self.reward_funcs:
            return
        for name in ("reward", "reward_std", "frac_reward_zero_std"):
            metrics.pop(name, None)  # TRL's, of no function
        if self._diversity is not None:
            metrics["reward"] = list(metrics["diversity"])

    # ---------------------------------------------------------------- the loss

    @property
    def _diversity_coef(self) -> float:
        return self.args.diversity_coef_at(self.state.global_step, self.state.max_steps)

    @property
    def _max_grad_norm_diversity(self) -> float | None:
        return self.args.max_grad_norm_diversity_at(self.state.global_step, self.state.max_steps)

    def _credits(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """By how much each term beside the distillation raises log p of each token: `(B, 1, 1)`, or `(B, S, K)`."""
        zeros = torch.zeros(len(inputs["prompt_ids"]), device=self.accelerator.device)
        credits = {"diversity": self._diversity_coef * inputs.get("diversity_advantages", zeros)}
        if self.reward_funcs:
            credits["reward"] = inputs["advantages"]
        return {name: credit[:, None, None] if credit.ndim == 1 else credit for name, credit in credits.items()}

    def _compute_loss(self, model, inputs):
        train, credits = self._mode == "train", self._credits(inputs)
        apart = train and bool(self._max_grad_norm_diversity)
        # One by one where the gradient of one term alone is asked for, or where a weight depends on `log_probs`
        separately = train and self._is_logging_step() and self._gradient_norms.measured
        separately = separately and (self._diversity_coef > 0 or bool(self.reward_funcs))
        weights = None
        if train and not (separately or apart) and "old_log_probs" not in inputs:
            # In float64, so that the sum of credits rounds as the separate terms do; MPS has none
            exact = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
            weights = -torch.stack(torch.broadcast_tensors(*credits.values())).to(exact).sum(0)
        terms = self.joint_objective.terms(model, self.model_wrapped, inputs, weights)
        losses = self.joint_objective.losses(terms, credits, inputs.get("old_log_probs"))
        if separately:
            parts = {name: losses[name].mean() for name in credits if not (apart and name == "diversity")}
            self._gradient_norms.add(self.model, parts, self.current_gradient_accumulation_steps)
        means = self._log_terms(inputs, terms, losses)
        if apart:
            loss = losses["diversity"].mean()
            self._diversity_gradient.add(self.model, loss, self.current_gradient_accumulation_steps)
            losses["diversity"] = losses["diversity"].detach()
        if not train:  # of the whole global batch, which Trainer would take for a mean over this process's rows
            return means.sum().to(terms.kl)
        return sum(loss.mean() for loss in losses.values()) if terms.loss is None else terms.loss

    def _log_terms(self, inputs: dict[str, Any], terms: BatchTerms, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Adds this forward's terms, of all processes, to the metrics; returns their means, nats.

        Raises if one is not finite.
        """
        columns = losses | {"entropy": terms.entropy, "tokens": terms.tokens}
        rows = self._gather_rows(torch.stack([column.detach().to(terms.kl) for column in columns.values()], dim=1))
        means = rows[:, : len(losses)].mean(0)
        own = {
            "student": terms.entropy + terms.log_probs.detach().sum((1, 2)),
            "kl": terms.kl,
            "advantages": sum(credit.sum((1, 2)) for credit in self._credits(inputs).values()),
        }
        self._guard.check_losses(means, own, inputs["prompt_ids"])
        metrics, running = self._metrics[self._mode], self._means[self._mode]
        if "kl" not in metrics:  # cleared since by `log`
            running.reset()
        running.add(dict(zip(columns, rows.T, strict=True)))
        metrics |= {name: [value] for name, value in running.values().items()}
        metrics["diversity_coef"].append(self._diversity_coef)
        return means

    def _gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all processes; in evaluation without the first ones again that fill up the last batch."""
        return self.accelerator.gather(rows) if self.model.training else self.accelerator.gather_for_metrics(rows)

    def _is_logging_step(self) -> bool:
        return (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0

    def get_eval_dataloader(self, eval_dataset=None):
        loader = super().get_eval_dataloader(eval_dataset)
        if isinstance(loader.dataset, Dataset):
            rows = len(loader.dataset) * self.num_generations_eval
            loader.dataset.total_dataset_length = rows  # accelerate counts prompts, to know what fills the last batch
            batch = self.args.eval_batch_size * self.accelerator.num_processes
            if rows % batch and self.accelerator.num_processes > 1:
                logger.warning_once(
                    f"{len(loader.dataset)} prompts of evaluation do not fill batches of {batch} sequences: the first "
                    f"prompts fill up the last one, and count twice in TRL's metrics (rewards, lengths), not in ours."
                )
        return loader

    # ---------------------------------------------------------------- steps, and what stops them

    def training_step(self, model, inputs, num_items_in_batch):
        with self._stopwatch.timed("update"):
            loss = self._guarded_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            logged = self._is_logging_step()
            norms = self._measured_norms() if logged else {}
            for name, value in (norms | self._stopwatch.lap()).items():
                self._metrics["train"][name].append(value)
        return loss

    def _measured_norms(self) -> dict[str, float]:
        return self._gradient_norms.measure(self.model, self._diversity_coef, self._diversity_gradient.mean())

    def _guarded_step(self, model, inputs, num_items_in_batch):
        if not self._guard.skips(self.state.global_step):
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            except BadBatchError as error:
                self._skip_update(error)
        self._step += 1
        return torch.zeros((), device=self.args.device)

    def _skip_update(self, problem: BadBatchError) -> None:
        """Without gradients the optimizer changes neither weights nor its state; the rollout is not used again."""
        self._guard.skip(self.state.global_step, problem)
        self.model.zero_grad(set_to_none=True)
        self._diversity_gradient.clear()
        self._buffered_inputs = None

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if (longest := self._max_grad_norm_diversity) is not None:
            grad_norm = math.hypot(float(grad_norm), self._diversity_gradient.join(self.model, longest))
        problem = self._guard.gradient_problem(grad_norm, self.args.fp16, self.is_deepspeed_enabled)
        if problem is None:
            return grad_norm
        self._skip_update(BadBatchError(problem))
        return 0.0

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        with self._stopwatch.paused():  # evaluation is not part of the update's times
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Trains; see [`~transformers.Trainer.train`].

        `resume_from_checkpoint=True` is the newest complete checkpoint of `output_dir`. A bad batch that stops the run
        leaves a checkpoint of the state before it; a process that is lost is named. A run that was complete makes no
        more updates. SIGTERM and Ctrl-C end it after the update under way, with a checkpoint (`SystemExit` with 143,
        `KeyboardInterrupt`).
        """
        checkpoint = self._checkpoints.resolve(resume_from_checkpoint)
        explained = explained_failures(
            lambda: self.state.global_step, self._keep_last_state, self.args.on_bad_batch, self.args.ddp_timeout
        )
        self._last_loaded_step = -1  # whatever vLLM was given before, it gets the weights of now
        # transformers aligns the special tokens of tokenizer and model
        with explained, self._checkpoints.alone(), self.policy.in_trl.patched(), self._signals.watching():
            result = super().train(checkpoint, *args, **kwargs)
        self._last_loaded_step = -1  # `load_best_model_at_end` loads others at the same step
        self._signals.end(self.state.global_step, self._where_to_resume())
        self._restore_special_tokens()
        return result

    def set_initial_training_values(self, args, dataloader):
        epochs, *values = super().set_initial_training_values(args, dataloader)
        max_steps = values[-1]
        return (0 if self._checkpoints.resumed_step >= max_steps else epochs, *values)

    def _restore_special_tokens(self) -> PreTrainedModel:
        student = self.accelerator.unwrap_model(self.model)
        self.policy.in_trl.restore_special_tokens(student.generation_config, student.config)
        return student

    # ---------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict=None):
        student = self._restore_special_tokens()
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.policy.save_extras(student, output_dir or self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        Saves all that is needed to sample, and a model card; see [`~transformers.Trainer.save_model`].

        It pushes nothing: [`push_to_hub`] does.
        """
        super().save_model(output_dir, _internal_call=True)
        if _internal_call or not self.args.should_save:  # of a checkpoint, or not the process that writes
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the card says what matters of it
        # An adapter's folder has none of its own, and the base's would be read in its place
        self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)
        if not self.policy.has_own_codec and hasattr(self.codec, "save_pretrained"):
            self.codec.save_pretrained(folder / "codec")
        self.write_card(folder)

    def write_card(self, folder: str | Path, license: str | None = None, **settings):
        """Writes `README.md`: what the model is, how to sample from it; see [`~trl_drcd.cards.write_card`]."""
        student = self.accelerator.unwrap_model(self.model)
        if self._other_teacher is not None:
            settings["teacher"] = local_name(self._other_teacher)
        about = trained_model(
            student, self.args, self.state, self.policy, self._tokenizer, self.codec is not None, **settings
        )
        metrics = final_metrics(self.state.log_history, self.args.eval_strategy != "no")
        write_card(folder, about, metrics, license)

    def create_model_card(self, *args, **kwargs):
        """[`write_card`] in the output folder, where TRL has a card of its own."""
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir)

    def _get_output_dir(self, trial):
        return self._checkpoints.place(super()._get_output_dir(trial))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """Before training: whether the model may be pushed at its end, so that no run ends at a name that is taken."""
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            public = (self.args.hub_private_repo if private is None else private) is False
            self.hub_model_id = check_target(name, public, token or self.args.hub_token)
        self.push_in_progress = None

    def push_to_hub(self, commit_message: str = "End of training", *args, token: str | None = None, **kwargs):
        """
        Pushes what [`save_model`] left in `output_dir`, by the rules of [`~trl_drcd.hub.push_to_hub`].

        The repository is private unless `hub_private_repo=False`.

        Returns:
            `str`: Address of the repository; `None` in the other processes.
        """
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo(token)
        public, token = self.args.hub_private_repo is False, token or self.args.hub_token
        return push_to_hub(str(self.args.output_dir), self.hub_model_id, public=public, token=token)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing: a checkpoint holds optimizer states and pickles; the finished model is pushed."""

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial))
        with self._checkpoints.writing(run, self.state) as folder:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and self._diversity is not None:
                self._diversity.save(folder)
            used_up = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
            if self._buffered_inputs is not None and not used_up:
                ranks = self.accelerator.process_index, self.accelerator.num_processes
                save_rollout(folder, self._buffered_inputs, self._step, *ranks)
        self._checkpoints.rotate(run, self.state)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        self._checkpoints.saved_step = self.state.global_step
        if checkpoint is not None:
            if self._diversity is not None:
                self._diversity.load(Path(checkpoint))
            ranks = self.accelerator.process_index, self.accelerator.num_processes
            batches = self.args.steps_per_generation
            if loaded := load_rollout(Path(checkpoint), batches, *ranks, self.accelerator.device):
                self._buffered_inputs, self._step = loaded

    def _get_train_sampler(self, dataset=None):
        return EpochSampler(super()._get_train_sampler(dataset), self)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.args.logging_strategy == "no":
            self._metrics["train"].clear()  # what a log would have emptied
        critic = {} if self._diversity is None else self._diversity.state
        self._snapshot = Snapshot(self.state.global_step, self._step, self._buffered_inputs, critic)

    def _keep_last_state(self) -> str:
        """Makes a checkpoint of the state after the last update, unless there is one; says where it is."""
        step, last = self.state.global_step, self._snapshot
        if self._checkpoints.saved_step != step:
            if self.args.save_strategy == "no":
                return self._where_to_resume()
            if last is not None and last.global_step == step:
                self._step, self._buffered_inputs = last.forward, last.rollout
                if self._diversity is not None:
                    self._diversity.state = last.critic
                set_random_states(last.random)
            self._save_checkpoint(self.model, None)
        return "Nothing was learned before" if step == 0 else self._where_to_resume(" before")

    def _where_to_resume(self, which: str = "") -> str:
        step = self.state.global_step
        if self._checkpoints.saved_step != step:
            return "Nothing is saved, as `save_strategy='no'` says"
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        return f"The state{which} is in {folder}: `resume_from_checkpoint=True` goes on from there"

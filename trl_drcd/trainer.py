"""
Diversity-rewarded CFG distillation as a subclass of TRL's RLOO trainer.

What is TRL's: samplers, generation, reward functions, logging, checkpoints. What changes: the loss, the unbiased
baseline of the diversity reward, the guided teacher, and no pass for `old_logps` when there is one update per rollout.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import get_config_model_id, use_adapter

from trl_drcd.callbacks import SampleCallback
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.distributed import check_sharding, frozen_copy, shard, whole_heads, whole_weights
from trl_drcd.diversity import DiversityReward, diversity_advantages, group_diversity
from trl_drcd.guidance import ancestral_generation_config, left_pad
from trl_drcd.losses import (
    TokenTerms,
    WeightedTerms,
    guided_logits,
    policy_gradient_loss,
    sum_per_sequence,
    token_terms,
    weighted_terms,
)
from trl_drcd.monitoring import GradientNorms, RunningMeans, Stopwatch
from trl_drcd.policies import Policy, policy_class
from trl_drcd.reliability.guard import GuardedRLOOTrainer
from trl_drcd.validation.training import (
    check_adapter,
    check_codec,
    check_datasets,
    check_family,
    check_finite_weights,
    check_lengths,
    check_longest,
    check_names,
    check_null_prompt,
    check_rewards,
    check_rollout_size,
    check_vocabulary,
)

logger = get_logger(__name__)


def _no_reward(prompts: list, **kwargs) -> list[float]:
    """Stands in for reward functions where distillation is all there is: RLOO asks for one."""
    return [0.0] * len(prompts)


def diversity_coef_at(step: int, diversity_coef: float, warmup_steps: int) -> float:
    """
    Diversity coefficient of an update: rises linearly from 0 and stays at `diversity_coef` from `warmup_steps` on.

    Args:
        step (`int`): Updates already done.
        diversity_coef (`float`): beta of Eq. (5).
        warmup_steps (`int`): Updates until the full value.

    Returns:
        `float`: In `[0, diversity_coef]`.
    """
    return diversity_coef * min(1.0, step / warmup_steps) if warmup_steps else diversity_coef


class CFGDistillDiversityTrainer(GuardedRLOOTrainer):
    """
    Trainer of *Diversity-Rewarded CFG Distillation* (https://huggingface.co/papers/2410.06084).

    The student samples groups of completions without guidance. The teacher is the initial model with classifier-free
    guidance: a frozen copy, or, with a PEFT adapter, the same weights with the adapter switched off. The loss of an
    update is

        mean over sequences of  sum over tokens KL(student || guided teacher)
                                - (diversity_coef * A_diversity + A_extra) * log p(sequence)

    with `A_diversity` from [`~trl_drcd.diversity.diversity_advantages`] and `A_extra` RLOO's leave-one-out advantage
    of the extra reward functions, weighted by `reward_weights`. One student forward and backward serves all terms.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): As in [`~trl.RLOOTrainer`]. A causal LM or a mono MusicGen.
        reward_funcs (*optional*): Extra per-sample rewards, as in [`~trl.RLOOTrainer`]; the diversity reward is not
            among them, it comes with `embedder`.
        args ([`CFGDistillDiversityConfig`], *optional*): The paper's settings if `None`.
        train_dataset (`Dataset` or `IterableDataset`): Column `prompt`, and perhaps `negative_prompt`.
        eval_dataset (*optional*): The same, or a dictionary of such.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Loaded with the model if `None`.
        embedder (`Callable`, *optional*): E of the diversity reward; needed where `diversity_coef` is above 0. Without
            it diversity is not measured. See [`DiversityReward`].
        codec (*optional*): Turns completion ids into audio, for models of audio tokens; then E and the logged samples
            get audio. `None` is the model's own, where it has one (MusicGen).
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
        **kwargs,
    ):
        peft_config = kwargs.get("peft_config")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CFGDistillDiversityConfig(f"{name.rstrip('/').split('/')[-1]}-DRCD")
        check_datasets(train_dataset, eval_dataset)
        check_rollout_size(train_dataset, args)
        check_names(model, args, processing_class, peft_config)
        check_adapter(model, peft_config)
        extra_rewards = (
            [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        )
        check_rewards(args, extra_rewards, embedder)
        if isinstance(model, str):
            args.model_init_kwargs = {"use_safetensors": True} | (args.model_init_kwargs or {})
        revision = (args.model_init_kwargs or {}).get("revision")
        family = policy_class(model, revision)
        check_family(family, args)
        self._inside_trl = family.inside_trl
        self.diversity_reward = None if embedder is None else DiversityReward(embedder, args.num_generations, codec)
        self.has_extra_rewards = bool(extra_rewards)
        # RLOO rewards the extra functions; the diversity reward stands there only where nothing else does, for its log
        if not extra_rewards:
            extra_rewards = [self.diversity_reward or _no_reward]

        with self._inside_trl():
            super().__init__(
                model=model,
                reward_funcs=extra_rewards,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=family.processing_class(model, processing_class, revision),
                **kwargs,
            )
        updates_per_rollout = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        self._needs_old_logps = updates_per_rollout > 1
        check_sharding(self.accelerator, updates_per_rollout, family.frozen is not None)
        student = self.accelerator.unwrap_model(self.model)
        self.policy: Policy = family(self._tokenizer, student.config, self.chat_template_kwargs)
        self.policy.check_length(args.max_completion_length)
        self.policy.prepare(student)
        # What is sampled is what is scored, whatever the model came with; saved models sample as they were trained to
        student.generation_config = ancestral_generation_config(student.generation_config, args.temperature)
        check_vocabulary(self.policy, student, self._tokenizer)
        check_finite_weights(student)
        check_codec(codec, self.policy, student)
        check_longest(self.policy, self.train_dataset, args, student, self._tokenize_prompts)
        if args.guidance_scale != 1:
            check_null_prompt(self.policy, self.train_dataset, args.negative_prompt)
        if any(head.softcap is not None for head in self.policy.heads(student)):
            logger.warning(
                "This model caps its logits: guidance is applied to the logits, one more projection per token."
            )
        sharded_here = self.is_fsdp_enabled and family.frozen is not None
        if sharded_here:
            self.accelerator.state.fsdp_plugin.ignored_modules = family.frozen
        self.teacher = None if is_peft_model(student) else frozen_copy(student, self.accelerator)
        if sharded_here:
            shard(student, self.accelerator)
        self.codec = self.policy.codec(student) if codec is None else codec
        if self.diversity_reward is not None:
            self.diversity_reward.codec = self.codec
        self._forward_redirection = _ForwardRedirection()
        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        self._gradient_norms = GradientNorms(self.accelerator)
        self._stopwatch = Stopwatch(self.accelerator)
        if args.sample_steps:
            self.add_callback(SampleCallback(self, self.codec))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "negative_prompt" not in self._signature_columns:
            self._signature_columns.append("negative_prompt")

    def train(self, *args, **kwargs):
        with self._inside_trl():  # transformers aligns the special tokens of tokenizer and model
            result = super().train(*args, **kwargs)
        self.policy.restore_special_tokens(self.accelerator.unwrap_model(self.model).generation_config)
        return result

    def _save(self, output_dir: str | None = None, state_dict=None):
        student = self.accelerator.unwrap_model(self.model)
        self.policy.restore_special_tokens(student.generation_config)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.policy.save_extras(student, output_dir or self.args.output_dir)

    # ---------------------------------------------------------------- rollouts and rewards

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        self._check_lengths(prompt_ids, "a prompt")
        # Autocast around the whole rollout casts the weights once, not once per token
        watched = self._watched_sampling(prompt_ids)
        with self._stopwatch.timed("rollout"), self.accelerator.autocast(), watched:
            if not self.policy.rolls_out_with_trl:
                return self._sample(prompt_ids)
            student = self.accelerator.unwrap_model(self.model)
            with nullcontext() if self.use_vllm else whole_weights(student):
                completion_ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        # RLOO looks at the last token of each completion; one that is empty stands as a single eos
        return [ids or [self._tokenizer.eos_token_id] for ids in completion_ids]

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
            yield model

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions by the policy's own sampling, without guidance."""
        with self.model_for_sampling() as model:
            return self.policy.sample(
                model, prompt_ids, temperature=self.temperature, max_new_tokens=self.max_completion_length
            )

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if not (self._needs_old_logps and self.model.training):
            # With one update per rollout the ratio to the sampling policy is 1: nobody reads this forward's result
            return torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device), None, None
        if not self.policy.rolls_out_with_trl:
            return self._log_probs(model, input_ids, attention_mask, logits_to_keep, *args[:1]), None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    @torch.no_grad()
    def _log_probs(
        self, model, input_ids: torch.Tensor, mask: torch.Tensor, length: int, batch_size: int | None = None
    ) -> torch.Tensor:
        """
        Log-probability of each id of the completions, nats, shape `(B, length)`; 0 where none is scored.

        Args:
            model: Perhaps wrapped.
            input_ids, mask (`torch.Tensor`): Prompt and completion in one row, int64 `(B, P + length)`.
            length (`int`): Ids of a completion.
            batch_size (`int`, *optional*): Sequences at one time; all if `None`.
        """
        student, rows = self.accelerator.unwrap_model(model), []

        def forward():
            with self.accelerator.autocast():
                return self.policy.hidden_states(student, *prompt, *completion), self.policy.heads(student)

        size = batch_size or len(input_ids)
        for ids, part in zip(input_ids.split(size), mask.split(size), strict=True):
            prompt, completion = (ids[:, :-length], part[:, :-length]), (ids[:, -length:], part[:, -length:])
            hidden, heads = self._inside_forward(model, student, forward)
            tokens, valid = self.policy.ids_and_mask(*completion)
            log_probs = torch.zeros(tokens.shape, device=hidden.device)
            for k, head in enumerate(heads):
                scored = valid[..., k]
                log_p = (head.logits(hidden[scored]) / self.temperature).log_softmax(-1)
                log_probs[..., k][scored] = log_p.gather(-1, tokens[..., k][scored][:, None]).squeeze(-1).float()
            flat = log_probs.flatten(1)
            rows.append(torch.nn.functional.pad(flat, (0, length - flat.shape[1])))
        return torch.cat(rows)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        mode = "train" if self.model.training else "eval"
        with self._stopwatch.timed("reward"):
            if self.diversity_reward is not None:
                self.diversity_reward.num_generations = (
                    self.num_generations if mode == "train" else self.num_generations_eval
                )
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            if self.diversity_reward is not None and self.has_extra_rewards:
                self.diversity_reward(prompts=prompts, completions=completions, completion_ids=completion_ids_list)
        return rewards

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        output = super()._generate_and_score_completions(inputs)
        local = output["completion_ids"].shape[0]
        if not self.has_extra_rewards:
            output["advantages"] = torch.zeros_like(output["advantages"])
        output["diversity_advantages"] = torch.zeros_like(output["advantages"])
        if self.diversity_reward is not None:
            embeddings, group = self.diversity_reward.embeddings, self.diversity_reward.num_generations
            advantages = diversity_advantages(embeddings, group).to(output["advantages"])
            start = self.accelerator.process_index * local
            output["diversity_advantages"] = advantages[start : start + local]
            diversity = self._gather_rows(group_diversity(embeddings, group)[start : start + local])
            self._metrics[mode]["diversity"].append(diversity.mean().item())
        if not (self._needs_old_logps and mode == "train"):
            del output["old_logps"]
        if not self.has_extra_rewards and self.diversity_reward is None:
            for name in [n for n in self._metrics[mode] if n.startswith(("reward", "frac_reward"))]:
                del self._metrics[mode][name]
        if self.args.guidance_scale != 1:
            negative_ids = self.policy.negative_prompt_ids(inputs, self.args.negative_prompt)
            self._check_lengths(negative_ids, "a negative prompt")
            ids, mask = left_pad(negative_ids, self._tokenizer.pad_token_id)
            output["negative_prompt_ids"] = ids.to(self.accelerator.device)
            output["negative_prompt_mask"] = mask.to(self.accelerator.device)
        return output

    # ---------------------------------------------------------------- the loss

    def _inside_forward(self, wrapper, model, method: Callable[[], Any]) -> Any:
        """What `method` returns, called inside the forward of `model` as wrapped for several processes."""
        if not self.is_fsdp_enabled:
            return self._forward_redirection(wrapper, model, method)
        kept: list[Any] = []

        def forward():
            kept.append(method())
            return kept[0]

        # FSDP2 looks for gradients at what a forward returns, but then rounds it to bfloat16: take what was before
        self._forward_redirection(wrapper, model, forward)
        return kept[0]

    def _unwrapped_teacher(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model if self.teacher is None else self.teacher)

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any]) -> Any:
        """
        The guided teacher on the student's completions: a function from codebook and rows to logits `(rows, V)`.

        Conditional and unconditional stream run as one batch.
        """
        student, teacher = self.accelerator.unwrap_model(self.model), self._unwrapped_teacher()
        completion = inputs["completion_ids"], inputs["completion_mask"]
        prompt = inputs["prompt_ids"], inputs["prompt_mask"]
        guided = "negative_prompt_ids" in inputs
        if guided:
            prompt = _stack_prompts(*prompt, inputs["negative_prompt_ids"], inputs["negative_prompt_mask"])
            completion = completion[0].repeat(2, 1), completion[1].repeat(2, 1)

        def forward():
            with self.accelerator.autocast():
                return self.policy.hidden_states(teacher, *prompt, *completion), self.policy.heads(teacher)

        was_training = teacher.training
        teacher.eval()
        with use_adapter(student, None) if self.teacher is None else nullcontext():
            hidden, heads = self._inside_forward(self.teacher or self.model_wrapped, teacher, forward)
        teacher.train(was_training)

        _, mask = self.policy.ids_and_mask(inputs["completion_ids"], inputs["completion_mask"])
        cond, uncond = hidden.chunk(2) if guided else (hidden, None)

        def logits(codebook: int):
            valid = mask[..., codebook]
            return guided_logits(
                heads[codebook],
                cond[valid],
                None if uncond is None else uncond[valid],
                self.args.guidance_scale,
            )

        return logits

    def _student_terms(
        self,
        student: PreTrainedModel,
        inputs: dict[str, Any],
        teacher_logits: Any,
        weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        """
        Token terms summed over the steps and codebooks of each sequence, `(B,)`, and the tokens of each, `(B,)`.

        With `weights` of each sequence's KL and log-probability, `(B,)` each, their weighted sum and its gradient come
        along, at less cost.
        """
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        with self.accelerator.autocast():
            hidden = self.policy.hidden_states(student, *(inputs[name] for name in names))
            heads = self.policy.heads(student)
        ids, mask = self.policy.ids_and_mask(inputs["completion_ids"], inputs["completion_mask"])
        losses, sums = [], []
        with whole_heads(*heads, *self.policy.heads(self._unwrapped_teacher())):
            for k, head in enumerate(heads):
                valid = mask[..., k]
                tokens = hidden[valid], head, ids[..., k][valid], teacher_logits(k)
                if weights is None:
                    terms = token_terms(*tokens, self.temperature)
                else:
                    kl_weights, log_prob_weights = (weight[:, None].expand(valid.shape)[valid] for weight in weights)
                    loss, *terms = weighted_terms(*tokens, kl_weights, log_prob_weights, self.temperature)
                    losses.append(loss)
                sums.append([sum_per_sequence(term, valid[..., None]) for term in terms])
        terms = TokenTerms(*(torch.stack(term).sum(0) for term in zip(*sums, strict=True)))
        return WeightedTerms(sum(losses), *terms) if losses else terms, mask.sum(dim=(1, 2))

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        with self._stopwatch.timed("teacher"):
            teacher_logits = self._teacher_logits(inputs)
        coef = diversity_coef_at(self.state.global_step, self.args.diversity_coef, self.args.diversity_warmup_steps)
        advantages = coef * inputs["diversity_advantages"] + inputs["advantages"]
        # One by one where the gradient of one term alone is asked for, or where a weight depends on `log_probs`
        separately = mode == "train" and self._is_logging_step() and (coef > 0 or self.has_extra_rewards)
        separately = separately and self._gradient_norms.measured
        weights = None
        if mode == "train" and not separately and "old_logps" not in inputs:
            weights = torch.ones_like(advantages), -advantages

        student = self.accelerator.unwrap_model(model)
        terms, lengths = self._inside_forward(
            model, student, lambda: self._student_terms(student, inputs, teacher_logits, weights)
        )
        distillation = terms.kl.mean()
        diversity = policy_gradient_loss(
            terms.log_probs, advantages, inputs.get("old_logps"), self.epsilon_low, self.epsilon_high
        )
        if separately:
            self._gradient_norms.add(self.model, diversity, self.current_gradient_accumulation_steps)
        means = self._log_terms(mode, inputs, terms, lengths, advantages, coef)
        if mode == "eval":  # of the whole global batch, which Trainer would take for a mean over this process's rows
            return means.to(distillation)
        return distillation + diversity if weights is None else terms.loss / len(advantages)

    def _log_terms(self, mode, inputs, terms: TokenTerms | WeightedTerms, lengths, advantages, coef: float):
        """
        Takes this forward's terms, of all processes, into the metrics; returns the loss, a scalar, in nats.

        Raises if the loss is not finite.
        """
        known = [inputs["old_logps"]] if "old_logps" in inputs else []
        columns = [terms.kl, terms.entropy, lengths, terms.log_probs, advantages, *known]
        rows = self._gather_rows(torch.stack([column.detach().to(terms.kl) for column in columns], dim=1))
        kl, entropy, tokens, log_probs, advantages, *known = rows.T
        diversity = policy_gradient_loss(
            log_probs, advantages, known[0] if known else None, self.epsilon_low, self.epsilon_high
        )
        self._check_losses(torch.stack([kl.mean(), diversity]), inputs, terms)
        if "kl" not in self._metrics[mode]:  # cleared since by `log`
            self._means[mode].reset()
        self._means[mode].add(kl, entropy, tokens, diversity)
        self._metrics[mode] |= {name: [value] for name, value in self._means[mode].values().items()}
        self._metrics[mode]["diversity_coef"].append(coef)
        return kl.mean() + diversity

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

    def training_step(self, model, inputs, num_items_in_batch):
        with self._stopwatch.timed("update"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            norms = self._gradient_norms.measure(self.model) if self._is_logging_step() else {}
            for name, value in (norms | self._stopwatch.lap()).items():
                self._metrics["train"][name].append(value)
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        with self._stopwatch.paused():  # evaluation is not part of the update's times
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


def _stack_prompts(cond_ids, cond_mask, uncond_ids, uncond_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional rows first, then unconditional ones, both left-padded to one length: ids and mask `(2B, P)`."""
    longest = max(cond_ids.shape[1], uncond_ids.shape[1])

    def widen(tensor):
        return torch.nn.functional.pad(tensor, (longest - tensor.shape[1], 0))

    return torch.cat([widen(cond_ids), widen(uncond_ids)]), torch.cat([widen(cond_mask), widen(uncond_mask)])

"""
Diversity-rewarded CFG distillation as a subclass of TRL's RLOO trainer.

What is TRL's: samplers, extra reward functions, logging, checkpoints. What differs, in the order of a step:
completions are sampled without guidance; the guided teacher reads them; their diversity gets an unbiased advantage;
the loss is Eq. (5), from one student forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import RLOOTrainer

from trl_drcd.callbacks import SampleCallback, WarmupCheck
from trl_drcd.cards import CITATION, base_of, final_metrics, trained_model, write_card
from trl_drcd.compat.products import fast_products
from trl_drcd.compat.torch_distributed import set_group_timeout
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.distributed import count_completions, separate_teacher
from trl_drcd.diversity import DiversityReward
from trl_drcd.diversity_term import DiversityTerm
from trl_drcd.files import local_name, open_to_readers
from trl_drcd.guidance import ancestral_generation_config
from trl_drcd.hub.training import check_run_repository, push_run
from trl_drcd.mixture import as_embedder
from trl_drcd.monitoring import StepLog, Stopwatch
from trl_drcd.objective import JointObjective, log_prob_weights, term_credits
from trl_drcd.policies import Policy, allowed_token_ids, policy_class
from trl_drcd.reliability.failures import explained_failures
from trl_drcd.reliability.guard import BatchGuard
from trl_drcd.reliability.identity import run_identity
from trl_drcd.reliability.progress import Progress
from trl_drcd.reliability.sampler import EpochSampler
from trl_drcd.reliability.signals import SignalStop
from trl_drcd.reliability.writer import CheckpointWriter
from trl_drcd.rollout import StudentSampler, no_log_probs, seed_colocated_vllm
from trl_drcd.teacher import GuidedTeacher, load_teacher
from trl_drcd.term_gradients import TermGradients
from trl_drcd.validation.before_loading import check_before_loading
from trl_drcd.validation.launch import check_launch
from trl_drcd.validation.once_loaded import check_head, check_once_loaded
from trl_drcd.validation.self_check import check_scoring


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
        model (`str`, `PreTrainedModel` or `PeftModel`): As in [`~trl.RLOOTrainer`]. A causal LM, a MusicGen or a
            Dia.
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
            get audio. `None` is the model's own, where it has one (MusicGen, Dia).
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
    _paper = CITATION

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
            name = model if isinstance(model, str) else model.config.name_or_path
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
        # Whether an update lies between two batches of one rollout
        self._reuses_rollouts = (
            args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) > 0
        )
        check_launch(args, self.accelerator, self._reuses_rollouts, family.frozen is not None)
        set_group_timeout(args.ddp_timeout)
        seed_colocated_vllm(args, self.accelerator)
        student = self.accelerator.unwrap_model(self.model)
        check_head(student)
        allowed, suppressed = allowed_token_ids(args.allowed_token_ids, student, self._tokenizer, self.eos_token_ids)
        self.policy: Policy = family(self._tokenizer, student.config, self.chat_template_kwargs, allowed)
        self.policy.prepare(student)
        # What is sampled is what is scored, whatever the model came with; saved models sample as they were trained to
        student.generation_config = ancestral_generation_config(
            student.generation_config, args.temperature, suppress_tokens=suppressed
        )
        check_once_loaded(
            self.policy, student, self._tokenizer, self.train_dataset, args, codec, self._tokenize_prompts
        )
        self._some_prompts = [row["prompt"] for row in islice(self.train_dataset, 8)]  # for the card
        # Updates of the weights, if `load_best_model_at_end` has loaded others than the last
        self._best_step: int | None = None
        self.codec = self.policy.codec(student) if codec is None else codec
        self._make_parts(student, embedder, teacher)
        self.add_callback(self._signals)
        self.add_callback(WarmupCheck())
        if args.sample_steps:
            self.add_callback(SampleCallback(self, self.codec))

    def _make_parts(self, student: PreTrainedModel, embedder: Any, teacher: Any) -> None:
        """Build teacher, diversity term, objective, guard, checkpoints, and measurements."""
        args = self.args
        self._diversity: DiversityTerm | None = None
        if embedder is not None:
            reward = DiversityReward(embedder, args.num_generations, self.codec)
            decode = partial(self._tokenizer.batch_decode, skip_special_tokens=True)
            self._diversity = DiversityTerm(reward, decode, args, self.policy, self.accelerator)
        other = None if teacher is None else load_teacher(teacher, student, self.policy)
        rewards = [
            self.accelerator.unwrap_model(r) if isinstance(r, torch.nn.Module) else r for r in self.reward_funcs
        ]
        identity = run_identity(args, student, self.train_dataset, other, embedder, rewards)
        self._other_teacher = None if other is None else base_of(other)
        taught_by = separate_teacher(student, other, self.accelerator, self.policy.frozen)
        self.teacher = GuidedTeacher(self.policy, taught_by, args.guidance_scale, self.accelerator, args.early)
        self.joint_objective = JointObjective(
            self.policy, self.teacher, self.temperature, (args.epsilon, self.epsilon_high)
        )
        self._guard = BatchGuard(args.on_bad_batch, self._tokenizer, self.accelerator)
        self.reward_funcs = self._guard.checked_rewards(self.reward_funcs)
        self._sampler = StudentSampler(
            self.policy, args, self._tokenizer, self.eos_token_ids, self._guard, self.accelerator
        )
        self._checkpoints = CheckpointWriter(args, self.accelerator)
        self._checkpoints.identity = identity
        self._progress = Progress(args, self.accelerator, self._diversity)
        self._scoring_checked = False
        self.aux_loss_enabled = False  # TRL's load balancing of experts, which Eq. (5) has not
        self._step_log = StepLog(self._metrics, self._logs, self.accelerator)
        self._gradients = TermGradients(self.accelerator)
        self._stopwatch = Stopwatch(self.accelerator)
        self._signals = SignalStop(self.accelerator)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("negative_prompt", "teacher_prompt"):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    # ---------------------------------------------------------------- rollouts

    def _tokenize_prompts(self, prompts):
        # Without images, what a tokenizer returns beside ids (`token_type_ids`) is nothing that the loss reads
        return super()._tokenize_prompts(prompts)[0], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        by_trl = partial(super()._generate_single_turn, prompt_ids, images, multimodal_fields)
        with self._stopwatch.timed("rollout"):
            return self._sampler.rollout(self.model_wrapped, prompt_ids, self.sample, by_trl)

    def sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """
        One completion of each prompt, token ids, without guidance, at the temperature of the run.

        Sharded weights are gathered, so call it on every process.
        """
        return self._sampler.sample(self.model_wrapped, prompt_ids)

    def model_for_sampling(self) -> AbstractContextManager[PreTrainedModel]:
        """The unwrapped student; sharded weights are gathered once, so call it on every process."""
        return self._sampler.model(self.model_wrapped)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        return no_log_probs(input_ids, logits_to_keep)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self._stopwatch.timed("reward"), self._guard.watched_rewards():
            if not self.reward_funcs:  # TRL sums over the functions' columns: none, then, of one column
                rows = len(prompts) * self.accelerator.num_processes
                return torch.zeros(rows, 1, device=self.accelerator.device)
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self._guard.check_model_rewards(self.reward_func_names, self.reward_funcs, rewards, prompts)
        return rewards

    def _generate_and_score_completions(self, inputs):
        output, mode = super()._generate_and_score_completions(inputs), self._mode
        sampled = self._sampler.taken()
        del output["old_logps"]
        if mode == "train" and not self._scoring_checked:
            untouched = self.state.global_step == 0 and self._other_teacher is None
            self._scoring_checked = check_scoring(
                self.policy, self.teacher, self.model_wrapped, output, untouched, sampled, self.args.temperature
            )
        with self._stopwatch.timed("teacher"):
            negative, own = self.teacher.prompts(
                inputs, self.args.negative_prompt, partial(self._sampler.padded, self.model)
            )
            states = self.teacher.read(self.model_wrapped, output, negative, self._batch_size, own)
            output |= self.teacher.stored(states, self.model_wrapped)
            hidden = states.cond
            del states  # what is not stored, the largest part of a rollout, lives no longer
        if mode == "train" and self._reuses_rollouts:
            output["old_log_probs"] = self.joint_objective.old_log_probs(self.model_wrapped, output, self._batch_size)
        if self._diversity is not None:
            with self._stopwatch.timed("reward"):
                scored = self._diversity.score(inputs, output, mode, hidden)
            self._step_log.diversity(mode, scored)
            output["diversity_advantages"] = scored.advantages.to(output["advantages"])
        completions = output["completion_ids"], output["completion_mask"]
        if ended := getattr(self.policy, "ended", None):
            self._step_log.ends(mode, ended(*completions), completions[1].sum(1))
        _, mask = self.policy.ids_and_mask(*completions)
        self._step_log.advantages(self._credits(output).values(), mask)
        if not self.reward_funcs:
            del output["advantages"]
            self._step_log.reward_is_diversity(mode)
        return output

    @property
    def _batch_size(self) -> int:
        """Sequences per forward and process."""
        args = self.args
        return args.per_device_train_batch_size if self._mode == "train" else args.per_device_eval_batch_size

    # ---------------------------------------------------------------- the loss

    @property
    def _diversity_coef(self) -> float:
        return self.args.diversity_coef_at(self.state.global_step, self.state.max_steps)

    @property
    def _max_grad_norm_diversity(self) -> float | None:
        return self.args.max_grad_norm_diversity_at(self.state.global_step, self.state.max_steps)

    def _credits(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return term_credits(inputs, self._diversity_coef, bool(self.reward_funcs))

    def _compute_loss(self, model, inputs):
        mode, credits = self._mode, self._credits(inputs)
        apart = mode == "train" and bool(self._max_grad_norm_diversity)
        rewarded = self._diversity_coef > 0 or bool(self.reward_funcs)
        alone = self._gradients.needed(credits, mode == "train" and rewarded and self._is_logging_step(), apart)
        at_once = mode == "train" and not alone and "old_log_probs" not in inputs  # else a weight depends on log p
        weights = log_prob_weights(credits) if at_once else None
        terms = self.joint_objective.terms(model, self.model_wrapped, inputs, weights)
        losses = self.joint_objective.losses(terms, credits, inputs.get("old_log_probs"))
        gathered = self._step_log.gathered_terms(mode, terms, losses)
        means = torch.stack([gathered[name].mean() for name in losses])
        self._guard.check_losses(means, terms, credits, inputs["prompt_ids"])
        self._step_log.terms(mode, gathered, self._diversity_coef)
        if mode == "eval":  # of the whole global batch, which Trainer would take for a mean over this process's rows
            return means.sum().to(terms.kl)
        if alone:
            self._gradients.take(self.model, losses, alone, apart, self.current_gradient_accumulation_steps)
        return sum(loss.mean() for loss in losses.values()) if terms.loss is None else terms.loss

    def _is_logging_step(self) -> bool:
        return (self.state.global_step + 1) % max(1, int(self.state.logging_steps or 1)) == 0

    def get_eval_dataloader(self, eval_dataset=None):
        loader = super().get_eval_dataloader(eval_dataset)
        batch, processes = self.args.eval_batch_size, self.accelerator.num_processes
        count_completions(loader, self.num_generations_eval, batch * processes, processes)
        return loader

    # ---------------------------------------------------------------- steps, and what stops them

    def training_step(self, model, inputs, num_items_in_batch):
        step = partial(super().training_step, model, inputs, num_items_in_batch)
        with self._stopwatch.timed("update"), fast_products():
            loss = self._guard.guarded(self.state.global_step, step, self._drop_update)
        if loss is None:
            self._step += 1  # TRL's count of forwards
            loss = torch.zeros((), device=self.args.device)
        if self._step % self.current_gradient_accumulation_steps == 0:
            norms = {}
            if self._is_logging_step():
                rollout = (self._step - 1) // (self.args.steps_per_generation * self.num_iterations)
                norms = self._gradients.measure(self.model, self._diversity_coef, rollout)
            self._step_log.add("train", norms | self._stopwatch.lap())
        return loss

    def _drop_update(self) -> None:
        """Drop gradients and rollout: without gradients the optimizer changes neither weights nor its state."""
        self.model.zero_grad(set_to_none=True)
        self._gradients.clear()
        self._buffered_inputs = None

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if (longest := self._max_grad_norm_diversity) is not None:
            grad_norm = self._gradients.join(self.model, longest, float(grad_norm))
        problem = self._guard.gradient_problem(grad_norm, self.args.fp16, self.is_deepspeed_enabled)
        if problem is None:
            return grad_norm
        self._guard.skip(self.state.global_step, problem, self._drop_update)
        return 0.0

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        with self._stopwatch.paused(), fast_products():  # evaluation is not part of the update's times
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Trains; see [`~transformers.Trainer.train`].

        `resume_from_checkpoint=True` is the newest complete checkpoint of `output_dir`; `"auto"` is the same if there
        is one, and else starts afresh. A bad batch that stops the run leaves a checkpoint of the state before it; a
        lost process is named. A run that was complete makes no more updates. SIGTERM and Ctrl-C end it after the
        update under way, with a checkpoint (`SystemExit` with 143, `KeyboardInterrupt`).
        """
        checkpoint = self._checkpoints.resolve(resume_from_checkpoint)
        explained = explained_failures(
            lambda: self.state.global_step, self._keep_last_state, self.args.on_bad_batch, self.args.ddp_timeout
        )
        self._best_step = None
        self._last_loaded_step = -1  # whatever vLLM was given before, it gets the weights of now
        # transformers aligns the special tokens of tokenizer and model
        with explained, self._checkpoints.alone(), self.policy.in_trl.patched(), self._signals.watching():
            result = super().train(checkpoint, *args, **kwargs)
        self._last_loaded_step = -1  # `load_best_model_at_end` loads others at the same step
        self._signals.end(self.state.global_step, self._checkpoints.where(self.state.global_step))
        self._restore_special_tokens()
        return result

    def _load_best_model(self):
        super()._load_best_model()
        self._best_step = self.state.best_global_step

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
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call:  # of a checkpoint
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                self._save_generation_config(folder)
            return
        with self._checkpoints.finishing(folder, self.state.global_step):
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                self._finish(folder)

    def _finish(self, folder: Path) -> None:
        """Write the files of a saved model beside its weights and tokenizer."""
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the card says what matters of it
        self._save_generation_config(folder)
        if not self.policy.has_own_codec and hasattr(self.codec, "save_pretrained"):
            self.codec.save_pretrained(folder / "codec")
        open_to_readers(folder)
        self.write_card(folder)

    def _save_generation_config(self, folder: Path) -> None:
        """Write `generation_config.json`, which an adapter has none of: the base's would be read in its place."""
        self.accelerator.unwrap_model(self.model).generation_config.save_pretrained(folder)

    def write_card(self, folder: str | Path, license: str | None = None, **settings):
        """Writes `README.md`: what the model is, how to sample from it; see [`~trl_drcd.cards.write_card`]."""
        student = self.accelerator.unwrap_model(self.model)
        if self._other_teacher is not None:
            settings["teacher"] = local_name(self._other_teacher)
        about = trained_model(
            student, self.args, self.state, self.policy, self._some_prompts, self.codec is not None, settings,
            self._best_step,
        )  # fmt: skip
        write_card(folder, about, self.final_metrics(), license)

    def final_metrics(self) -> dict[str, dict[str, float]]:
        """Metrics before and after training, of the weights that are saved; see [`~trl_drcd.cards.final_metrics`]."""
        return final_metrics(self.state.log_history, self.args.eval_strategy != "no", self._best_step)

    def create_model_card(self, *args, **kwargs):
        """[`write_card`] in the output folder, where TRL has a card of its own."""
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir)

    def _get_output_dir(self, trial):
        return self._checkpoints.place(super()._get_output_dir(trial))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """Check before training that the model can be pushed at its end, such as that its name is free."""
        if self.is_world_process_zero():
            self.hub_model_id = check_run_repository(self.args, token, private)
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
        return push_run(self.args, self.hub_model_id, token)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing: a checkpoint holds optimizer states and pickles; the finished model is pushed."""

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial))
        with self._checkpoints.writing(run, self.state) as folder:
            super()._save_checkpoint(model, trial)
            self._progress.save(folder, self._step, self._buffered_inputs)
        self._checkpoints.rotate(run, self.state)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        self._checkpoints.saved_step = self.state.global_step
        if checkpoint is not None and (loaded := self._progress.load(Path(checkpoint))):
            self._step, self._buffered_inputs = loaded

    def _get_train_sampler(self, dataset=None):
        return EpochSampler(super()._get_train_sampler(dataset), self)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.args.logging_strategy == "no":
            self._metrics["train"].clear()  # what a log would have emptied
        self._progress.remember(self.state.global_step, self._step, self._buffered_inputs)

    def _keep_last_state(self) -> str:
        """Make a checkpoint of the state after the last update, unless there is one; say where it is."""
        step = self.state.global_step
        if self._checkpoints.saved_step != step and self.args.save_strategy != "no":
            if last := self._progress.go_back(step):
                self._step, self._buffered_inputs = last
            self._save_checkpoint(self.model, None)
        return self._checkpoints.where(step, " before")

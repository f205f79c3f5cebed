"""Validate the trainer's arguments before loading a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import transformers
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PeftType, PromptLearningConfig
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from trl_drcd.audio.front_end import SavedModule
from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.diversity import DiversityReward
from trl_drcd.files import check_writable
from trl_drcd.mixture import EmbedderMixture
from trl_drcd.policies import CausalLMPolicy, Policy, policy_class
from trl_drcd.validation.model_folders import check_adapter_folder, check_model, check_on_hub
from trl_drcd.validation.rows import check_columns, check_rows
from trl_drcd.validation.saved_files import INDEX, WEIGHTS, read_json

Model: TypeAlias = str | PreTrainedModel | PeftModel
TrainData: TypeAlias = Dataset | IterableDataset
EvalData: TypeAlias = TrainData | Mapping[str, TrainData] | None
# Options that only TRL's own sampling of causal LMs supports
CAUSAL_LM_ONLY = ("use_vllm", "use_transformers_continuous_batching", "mask_truncated_completions")
# Options with which TRL samples
TRL_SAMPLES = ("use_vllm", "use_transformers_continuous_batching", "cache_implementation", "generation_kwargs")
# Options of TRL that change the advantages of reward functions, with the value that turns each off
REWARD_SETTINGS = {"normalize_advantages": False, "reward_clip_range": None}
# Arguments of `from_pretrained` with which the files have other paths or names than `check_model` expects
ELSEWHERE = {"subfolder", "variant", "gguf_file"}
# LoRA initialisations that leave the model's output unchanged
NEUTRAL_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Kinds of PEFT that this trainer cannot train as they are meant
OTHER_PEFT = {
    PeftType.ADALORA: "allocates its ranks in calls, and with a penalty, that this trainer does not make",
    PeftType.POLY: "needs task ids in every forward", PeftType.XLORA: "mixes adapters that are already trained",
    PeftType.SHADOW: "adds a second network to the forward",
    PeftType.PVERA: "draws noise in training, so that it scores another distribution than it samples from",
    PeftType.LILY: "mixes positions and sequences of a batch, so that no token has a probability of its own",
}  # fmt: skip
# Options of LoRA with which it is one of these kinds
OTHER_LORA = {
    "alora_invocation_tokens": "turns the adapter on at a token, which the loss cannot see",
    "kasa_config": "changes the base, and with it the teacher",
    "monteclora_config": "draws noise in training, so that it scores another distribution than it samples from",
}
FAMILIES = "give a causal LM, a MusicGen or a Dia"
IMAGES = {"image", "images", "video", "videos"}


def check_before_loading(
    model: Model,
    args: CFGDistillDiversityConfig,
    train_dataset: TrainData,
    eval_dataset: EvalData,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    peft_config: PeftConfig | None,
    extra_rewards: Sequence[object],
    embedder: object,
    codec: object = None,
    teacher: object = None,
) -> None:
    """
    Validate the trainer's arguments before a model is loaded.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, peft_config, embedder, codec, teacher: As passed to
            the trainer.
        extra_rewards (`Sequence`): The trainer's `reward_funcs`, as a list.

    Raises:
        FileExistsError: If the output folder is a file.
        FileNotFoundError: If the model is neither a folder nor on the Hub.
        DiskError: If the output folder is read-only.
        TypeError: If an argument has a type that the trainer does not accept.
        ValueError: If a value is invalid; the message gives the valid values.
    """
    if not isinstance(args, CFGDistillDiversityConfig):
        raise TypeError(f"`args` must be a `CFGDistillDiversityConfig`, got {type(args).__name__}")
    _check_output(args, peft_config is not None or isinstance(model, PeftModel))
    _check_datasets(train_dataset, eval_dataset, args)
    _check_rollout_size(train_dataset, args)
    _check_kinds(model, args, processing_class, peft_config)
    _check_teacher(teacher, args)
    _check_adapter(model, peft_config)
    _check_checkpointing(model, args, peft_config)
    _check_rewards(args, extra_rewards, embedder)
    _check_best(args, extra_rewards)
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    family = policy_class(model, options.get("revision"))
    _check_family(family, args)
    _check_columns(family, train_dataset, eval_dataset)
    parts = list(embedder.embedders.values()) if isinstance(embedder, EmbedderMixture) else [embedder]
    hearing = [type(part).__name__ for part in parts if isinstance(part, SavedModule)]
    if hearing and codec is None and not family.has_own_codec:
        raise ValueError(f"`embedder` is a {hearing[0]}, which needs audio, but there is no `codec`; pass a `codec`")


def _check_output(args: CFGDistillDiversityConfig, adapter: bool) -> None:
    """The output folder must be writable and hold no model of the other kind, which could be loaded instead."""
    folder = Path(str(args.output_dir))
    check_writable("output_dir", folder)
    here, others = ("an adapter", (WEIGHTS, INDEX)) if adapter else ("a whole model", ("adapter_config.json",))
    if found := [name for name in others if (folder / name).is_file()]:
        raise ValueError(
            f"`output_dir={folder}` has the {found[0]} of another run, and this one saves {here}: either could be "
            "loaded from there; give another folder, or remove that model"
        )


# ---------------------------------------------------------------- data


def _check_datasets(train_dataset: TrainData, eval_dataset: EvalData, args: CFGDistillDiversityConfig) -> None:
    """Every data set must have text prompts; evaluation needs data, and a streamed training set `max_steps`."""
    for name, dataset in _named(train_dataset, eval_dataset).items():
        if dataset is None and name != "train_dataset":
            continue
        if dataset is None:
            raise ValueError("`train_dataset` is required, got None; give a `Dataset` with a column `prompt`")
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got {type(dataset).__name__}")
        check_rows(dataset, f"`{name}`")
        if images := IMAGES & set(dataset.column_names or ()):
            raise ValueError(
                f"`{name}` has a column `{min(images)}`: completions would be sampled with it but scored without it; "
                "use text-only prompts"
            )
    if args.eval_strategy != "no" and not eval_dataset:
        strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
        raise ValueError(f"`eval_strategy={strategy}` needs `eval_dataset`, got None")
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(f"`train_dataset` is a stream of unknown length: set `max_steps`, got {args.max_steps}")


def _named(train_dataset: TrainData, eval_dataset: EvalData) -> dict[str, TrainData | None]:
    """All data sets, by the argument's name or the key in `eval_dataset`."""
    evals = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval_dataset": eval_dataset}
    return {"train_dataset": train_dataset, **evals}


def _check_columns(family: type[Policy], train_dataset: TrainData, eval_dataset: EvalData) -> None:
    """Refuse columns of prompts that the family does not read, such as a voice to clone."""
    for name, dataset in _named(train_dataset, eval_dataset).items():
        columns = [] if dataset is None else dataset.column_names or list(next(iter(dataset), {}))
        check_columns(f"`{name}`", columns, getattr(family, "refused_columns", ()))


def _check_rollout_size(train_dataset: TrainData, args: CFGDistillDiversityConfig) -> None:
    """The data must fill at least one rollout: TRL's sampler drops an incomplete last rollout."""
    prompts = (args.generation_batch_size or 0) // args.num_generations
    if isinstance(train_dataset, Dataset):
        rows = len(train_dataset)
    else:
        rows = sum(1 for _ in train_dataset.take(prompts))
    if rows < prompts:
        raise ValueError(
            f"`train_dataset` has {rows} rows, but one rollout takes {prompts} prompts "
            f"(`generation_batch_size={args.generation_batch_size}` / `num_generations={args.num_generations}`), so "
            "there would be no step; give more prompts, or lower `per_device_train_batch_size` or "
            "`gradient_accumulation_steps`"
        )


# ---------------------------------------------------------------- model


def _check_kinds(
    model: object, args: CFGDistillDiversityConfig, processing_class: object, peft_config: object
) -> None:
    """Check the types of `model`, `processing_class` and `peft_config`."""
    if isinstance(model, str):
        _check_name(model, args)
    elif not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(f"`model` must be a name, a folder or a loaded model, got {type(model).__name__}")
    elif not hasattr(model, "generate") or (
        model.get_output_embeddings() is None and policy_class(model) is CausalLMPolicy
    ):
        raise ValueError(f"`model` is a {type(model).__name__}, which cannot generate; {FAMILIES}")
    elif policy_class(model) is CausalLMPolicy and model.config.is_encoder_decoder:
        raise ValueError(f"`model` is a {type(model).__name__}, an encoder-decoder; {FAMILIES}")
    kinds = {
        "processing_class": (PreTrainedTokenizerBase | ProcessorMixin, "a tokenizer, or `None` for the model's"),
        "peft_config": (PeftConfig, "a `LoraConfig`"),
    }
    for name, value in {"processing_class": processing_class, "peft_config": peft_config}.items():
        kind, in_words = kinds[name]
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"`{name}` must be {in_words}, got {type(value).__name__}")


def _check_teacher(teacher: object, args: CFGDistillDiversityConfig) -> None:
    """Check a separate teacher in the same way as the model."""
    if isinstance(teacher, str):
        if (Path(teacher) / "adapter_config.json").is_file():
            return check_adapter_folder("teacher", Path(teacher))
        check_model("teacher", teacher, args.trust_remote_code)
        if not Path(teacher).is_dir():
            check_on_hub(f"`teacher={teacher}`", teacher)
    elif teacher is not None and not isinstance(teacher, PreTrainedModel | PeftModel):
        raise TypeError(f"`teacher` must be a name, a folder or a loaded model, got {type(teacher).__name__}")


def _check_name(model: str, args: CFGDistillDiversityConfig) -> None:
    """A folder must hold a model that can be loaded safely; any other name must be on the Hub or in its cache."""
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    if ELSEWHERE & set(options):
        return
    check_model("model", model, args.trust_remote_code)
    if Path(model).is_dir():
        config = read_json(Path(model) / "config.json")
    else:
        config = check_on_hub(f"`model={model}`", model, options.get("revision"))
    for name in (config.get("architectures") or ())[:1]:  # TRL loads the first
        known = getattr(transformers, str(name), None)  # one of code from elsewhere is not known here
        if isinstance(known, type) and not issubclass(known, GenerationMixin):
            raise ValueError(f"`model={model}` is a {name}, which cannot generate; {FAMILIES}")
        if config.get("is_encoder_decoder") and policy_class(model, options.get("revision")) is CausalLMPolicy:
            raise ValueError(f"`model={model}` is a {name}, an encoder-decoder; {FAMILIES}")


def _check_adapter(model: object, peft_config: object) -> None:
    """The teacher is the model with its adapter off, so the adapter must be untrained and have no effect yet."""
    if isinstance(peft_config, PromptLearningConfig):
        raise ValueError(
            f"`peft_config` of type {type(peft_config).__name__} adds virtual tokens that the loss does not "
            "support; use LoRA"
        )
    for config in [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else [])]:
        _check_base_is_kept(config, new=config is peft_config)
    if peft_config is not None and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "`model` carries an adapter already, which `peft_config` would replace, and the teacher would be the base "
            "without it. Merge it (`PeftModel.from_pretrained(base, adapter).merge_and_unload()`), or leave "
            "`peft_config` out to train that adapter from the model as it is"
        )
    if not isinstance(model, PeftModel):
        return
    if list(model.active_adapters) != ["default"]:
        raise ValueError(
            f"`model` is a `PeftModel` with the adapters {sorted(model.peft_config)}, of which "
            f"{list(model.active_adapters)} are active; exactly one is trained, and must be called `default`"
        )
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    if base := next((name for name in names if not set(name.split(".")) & set(model.peft_config)), None):
        raise ValueError(
            f"`model` is a `PeftModel` with a trainable weight of its base, {base}: the teacher is the base with the "
            "adapter off, and would change with it. Freeze it (`requires_grad_(False)`), or name its module in "
            "`modules_to_save`"
        )
    parts = [(name, p) for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    if not parts:
        raise ValueError(
            "`model` is a `PeftModel` without LoRA weights, so it is unknown whether its adapter is untrained; "
            "pass the base model and a `peft_config`"
        )
    if any(p.detach().any() for _, p in parts):
        raise ValueError(
            "`model` has an adapter that was already trained, and the teacher would be the base without it. Merge "
            "it (`model.merge_and_unload()`) and pass the merged model with a new `peft_config`"
        )


def _check_base_is_kept(config: object, new: bool) -> None:
    """With the adapter off, the model must stay equal to the given model during the whole of training."""
    if isinstance(config, PeftConfig) and (reason := OTHER_PEFT.get(PeftType(config.peft_type))):
        raise ValueError(f"`peft_config` of type {type(config).__name__} {reason}, which is not supported; use LoRA")
    for option, reason in OTHER_LORA.items():
        if getattr(config, option, None):
            raise ValueError(f"`peft_config` has `{option}`, which {reason}; leave it out")
    if (layers := getattr(config, "layer_replication", None)) is not None:
        raise ValueError(
            f"`peft_config` has `layer_replication={layers}`, which makes another model of the base: the teacher "
            "would be the one with copied layers. Leave it out, or save the deeper model first and train that one"
        )
    init = getattr(config, "init_lora_weights", True)
    if (new and init is False) or (isinstance(init, str) and init.lower() not in NEUTRAL_INITS):
        raise ValueError(
            f"`peft_config` has `init_lora_weights={init!r}`, which changes the base or gives the adapter an effect "
            "before the first update; the teacher is the base with the adapter off. Leave it at True"
        )
    if (bias := getattr(config, "bias", "none")) != "none":
        raise ValueError(
            f"`peft_config` has `bias={bias!r}`, which trains biases of the base; the teacher is the base with the "
            "adapter off, and would change with them. Set `bias='none'`, or `lora_bias=True` for biases of the adapter"
        )


def _check_checkpointing(model: object, args: CFGDistillDiversityConfig, peft_config: object) -> None:
    """Reentrant checkpointing of all weights cannot give the gradient of one term, whose norm is logged."""
    given = args.gradient_checkpointing_kwargs
    reentrant = isinstance(given, dict) and given.get("use_reentrant")
    if args.gradient_checkpointing and reentrant and peft_config is None and not isinstance(model, PeftModel):
        raise ValueError(
            "`gradient_checkpointing_kwargs={'use_reentrant': True}` does not work with the training of all weights; "
            "set it to False"
        )


def leaves_sampling_to_trl(args: CFGDistillDiversityConfig) -> dict[str, object]:
    """The arguments with which TRL samples causal LMs; a static cache is one of this package's own loop."""
    given = {name: value for name in TRL_SAMPLES if (value := getattr(args, name))}
    return {name: value for name, value in given.items() if (name, value) != ("cache_implementation", "static")}


def _check_family(family: type[Policy], args: CFGDistillDiversityConfig) -> None:
    """Refuse options of TRL's own sampling for other families than causal LMs, and with `allowed_token_ids`."""
    if args.allowed_token_ids:
        if not family.rolls_out_with_trl:
            raise ValueError("`allowed_token_ids` is for causal LMs: this model's ids are all codes; leave it out")
        for name, value in leaves_sampling_to_trl(args).items():
            raise ValueError(
                f"`{name}={value}` samples in TRL, which does not know `allowed_token_ids`; leave one of them out"
            )
    if family.rolls_out_with_trl:
        return
    for name in CAUSAL_LM_ONLY:
        if getattr(args, name):
            raise ValueError(f"`{name}=True` is not supported for this model family; set it to False")
    if args.cache_implementation not in (None, "static"):
        raise ValueError(
            f"`cache_implementation={args.cache_implementation}` is not supported for this model family; leave it "
            "out, or set static"
        )


# ---------------------------------------------------------------- rewards


def _check_best(args: CFGDistillDiversityConfig, extra_rewards: Sequence[object]) -> None:
    """What chooses the best model, or the learning rate, must not be a loss with a policy gradient in it."""
    by_metric = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    name = "load_best_model_at_end" if args.load_best_model_at_end else "lr_scheduler_type" if by_metric else None
    rewarded = args.diversity_coef > 0 or bool(extra_rewards)
    if name and rewarded and str(args.metric_for_best_model).endswith("loss"):
        value = getattr(getattr(args, name), "value", getattr(args, name))
        raise ValueError(
            f"`{name}={value}` goes by `metric_for_best_model={args.metric_for_best_model}`, but with a "
            "reward the loss has a policy gradient's term, whose value says nothing of the model; set another metric "
            "of the log, such as `metric_for_best_model=eval_kl` with `greater_is_better=False`, or `eval_diversity`"
        )


def _check_rewards(args: CFGDistillDiversityConfig, extra_rewards: Sequence[object], embedder: object) -> None:
    """Rewards, their weights and the embedder must fit together."""
    if any(isinstance(reward, DiversityReward) for reward in extra_rewards):
        raise ValueError(
            "`reward_funcs` contains a `DiversityReward`, for which RLOO's leave-one-out baseline is biased. Pass its "
            "embedder as `embedder=` (and `codec=`) and its weight as `diversity_coef`"
        )
    if isinstance(embedder, str):
        raise TypeError(
            f"`embedder` must be callable, got the str {embedder!r}; give the embedder itself, such as "
            f"`SentenceEmbedder({embedder!r})`"
        )
    if embedder is None and args.diversity_coef > 0:
        raise ValueError(f"`diversity_coef={args.diversity_coef}` needs `embedder`, got None")
    if embedder is not None and args.num_generations_eval == 1:
        raise ValueError("`num_generations_eval=1` is too small: diversity compares at least 2 generations")
    if not extra_rewards and args.reward_weights is not None:
        raise ValueError(f"`reward_weights={args.reward_weights}` without `reward_funcs`; set `reward_weights=None`")
    for name, off in REWARD_SETTINGS.items():
        if getattr(args, name) != off and (not extra_rewards or args.diversity_coef > 0):
            raise ValueError(
                f"`{name}={getattr(args, name)}` only applies to the advantages of `reward_funcs`: diversity has its "
                f"own unbiased advantages, scaled by `diversity_coef`; set `{name}={off}`"
            )

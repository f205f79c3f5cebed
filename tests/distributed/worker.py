"""
One process of a launch: trains tiny models whose samples depend on their global row alone, and records everything.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 tests/distributed/worker.py OUT NAMES

For each scenario NAME of `scenarios.py` the first process writes OUT/NAME.safetensors (embeddings, rewards, advantages
and losses of each step, final weights) and OUT/NAME.json (the log). With `text_drcd ARGUMENTS` it is that recipe.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import save_file
from transformers import training_args
from trl import RLOOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from scenarios import SCENARIOS, make_trainer, pinned_codes, pinned_completion, pinned_speech

from recipes import text_drcd
from trl_drcd import CFGDistillDiversityTrainer
from trl_drcd.policies import DiaPolicy


def take_cpus_for_gpus() -> None:
    """accelerate offers FSDP and DeepSpeed on accelerators alone: let it take each process's CPU for one."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True


def pinned_rollout(self, prompt_ids, *_):
    """Stands in for the sampling: completions that depend on mode, rollout and row of the global batch."""
    mode, count = ("train" if self.model.training else "eval"), len(prompt_ids)
    self.rollouts = getattr(self, "rollouts", {"train": 0, "eval": 0})
    self.rollouts[mode] += 1
    rows = range(self.accelerator.process_index * count, (self.accelerator.process_index + 1) * count)
    if self.policy.rolls_out_with_trl:
        return [pinned_completion(mode, self.rollouts[mode], row, len(self._tokenizer)) for row in rows]
    if isinstance(self.policy, DiaPolicy):
        return [pinned_speech(mode, self.rollouts[mode], row, self.policy.layout) for row in rows]
    layout = self.policy.mask_id, self.policy.num_codebooks
    return [pinned_codes(mode, self.rollouts[mode], row, *layout) for row in rows]


def recording(trainer, scenario) -> dict[str, torch.Tensor]:
    """Has the trainer put global embeddings, rewards, advantages and losses, step by step, into the dictionary."""
    tensors: dict[str, torch.Tensor] = {}
    score, reward = trainer._generate_and_score_completions, trainer._calculate_rewards
    loss, score_diversity = trainer._compute_loss, trainer._diversity.reward.score
    counts = {"train": 0, "eval": 0}

    def put(name, values):
        if values.ndim > 1:  # processes pad to their own longest completion
            values = trainer.accelerator.pad_across_processes(values, dim=1)
        tensors[name] = trainer.accelerator.gather(values.detach().contiguous()).double().cpu()

    def scored(inputs):
        output, mode = score(inputs), "train" if trainer.model.training else "eval"
        counts[mode] += 1
        name = f"{mode}{counts[mode]}"
        for key in sorted({"advantages", "diversity_advantages"} & set(output)):
            put(f"{name}/{key}", output[key])
        return output

    def diversity(*args):
        result, mode = score_diversity(*args), "train" if trainer.model.training else "eval"
        name = f"{mode}{counts[mode] + 1}"
        tensors[f"{name}/embeddings"] = result.embeddings.double().cpu()
        tensors[f"{name}/diversity_rewards"] = result.rewards.double().cpu()
        return result

    def rewarded(*args):
        rewards, mode = reward(*args), "train" if trainer.model.training else "eval"
        tensors[f"{mode}{counts[mode] + 1}/rewards"] = rewards.double().cpu()
        return rewards

    def lost(model, inputs):
        value = loss(model, inputs)
        mode = "train" if trainer.model.training else "eval"
        key = f"{mode}{counts[mode]}/loss"
        share = 1 if mode == "eval" else scenario.accumulate
        mean = trainer.accelerator.gather(value.detach()[None]).double().mean()[None].cpu() / share
        tensors[key] = tensors.get(key, 0.0) + mean
        return value

    trainer._generate_and_score_completions, trainer._calculate_rewards = scored, rewarded
    trainer._compute_loss, trainer._diversity.reward.score = lost, diversity
    return tensors


def full(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter in whole, whoever holds the parts."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def run(name: str, output: Path) -> None:
    """Trains, evaluates and saves as the scenario says, and writes what was recorded."""
    scenario = SCENARIOS[name]
    trainer = make_trainer(scenario, output / "runs" / name)
    with ExitStack() as patches:
        if scenario.pinned:
            patches.enter_context(mock.patch.object(RLOOTrainer, "_generate_single_turn", pinned_rollout))
            patches.enter_context(mock.patch.object(CFGDistillDiversityTrainer, "sample", pinned_rollout))
        tensors = recording(trainer, scenario) if scenario.pinned else {}
        trainer.train()
        if scenario.evaluates:
            trainer.evaluate()
    for key, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        tensors[f"weights/{key}"] = full(parameter).double().cpu()
    if scenario.saves:
        trainer.save_model(str(output / f"{name}_saved"))
    logs = gather_object([trainer.state.log_history])
    if trainer.accelerator.is_main_process:
        save_file({key: value.contiguous() for key, value in tensors.items()}, output / f"{name}.safetensors")
        (output / f"{name}.json").write_text(json.dumps(logs, default=float))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ):
        take_cpus_for_gpus()
    if sys.argv[1] == "text_drcd":
        text_drcd.main(sys.argv[2:])
    else:
        for scenario_name in sys.argv[2:]:
            run(scenario_name, Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of torch's has once aborted a process that was ending, "without an active exception"

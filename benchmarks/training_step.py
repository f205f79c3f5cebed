"""
Seconds and peak memory of one training step, against two baselines measured in the same run.

- `ours`: `CFGDistillDiversityTrainer`, guided teacher and diversity reward;
- `rloo`: TRL's `RLOOTrainer` with the same reward and no teacher;
- `dense`: `RLOOTrainer` with a straightforward distillation term: full `(B, S, V)` logits of the student, of the
  conditional and of the unconditional teacher, each from a separate forward, then `log_softmax` and the KL.

All three get the same model, prompts, reward, optimizer and completion length (a bias on the head prevents eos, so
every completion has the maximum length). They alternate: a round is one fresh process for each, and a process does one
warm-up step, `--steps` timed steps, and one logging step, in which ours also measures the gradient of each term.
Float32 on a CPU unless `--bf16`, bfloat16 autocast on a GPU; no gradient checkpointing.

Peak memory on a CPU is the peak resident set of the process (`VmHWM` of `/proc/self/status`, so Linux only) minus the
resident set before the model was built; on a GPU it is `torch.cuda.max_memory_allocated`. Both include the weights,
the teacher's copy, gradients, optimizer state and activations. `processor` is seconds of processor time, which is
meaningful on a busy machine. `of peak` is what teacher and update of ours reach of the throughput of one large matrix
product with the same threads, counting only operations of linear weights on completion tokens: 2 per weight and token
in a forward, 4 in a backward; prompts, attention and the optimizer are not counted.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --output benchmarks/results/training_step.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from rollout import peak, processor_name
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import RLOOConfig, RLOOTrainer

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer, DiversityReward
from trl_drcd.guidance import guide_logits, left_pad
from trl_drcd.losses import policy_gradient_loss, reverse_kl
from trl_drcd.policies import CausalLMPolicy

SHIPPED = Path(__file__).parents[1] / "recipes" / "tiny_music" / "models" / "musiclm"
TRAINERS = ("ours", "rloo", "dense")
PARTS = ("rollout", "old log-probs", "reward", "teacher", "update")
GUIDANCE_SCALE = 3.0
DIVERSITY_COEF = 5.0
TEMPERATURE = 0.99
CAPTIONS = [
    " ".join(filter(None, ("a", tempo, kind, "for", instrument, key)))
    for tempo, kind, instrument, key in product(
        ("slow", "fast"), ("reel", "jig"), ("flute", "church organ"), ("", "in G major")
    )
]


class TimedRLOO(RLOOTrainer):
    """RLOO with a stopwatch: `seconds` holds what each part of the present step has taken."""

    def __init__(self, *args, **kwargs):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        super().__init__(*args, **kwargs)

    def _clocked(self, part: str, function, *args, **kwargs):
        synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize()
        self.seconds[part] += time.perf_counter() - start
        return result

    def _generate_single_turn(self, *args, **kwargs):
        return self._clocked("rollout", super()._generate_single_turn, *args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        return self._clocked("reward", super()._calculate_rewards, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._clocked("old log-probs", super()._get_per_token_logps_and_entropies, *args, **kwargs)


class DenseCFGTrainer(TimedRLOO):
    """RLOO and Eq. (2) the plain way: all logits of student and of both teacher streams, a forward for each."""

    def __init__(self, model, *args, **kwargs):
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        super().__init__(model, *args, **kwargs)
        self.teacher.to(self.accelerator.device)
        self.policy = CausalLMPolicy(self.processing_class)

    def _completion_logits(self, model, prompt_ids, prompt_mask, inputs):
        length = inputs["completion_ids"].shape[1]
        with self.accelerator.autocast():
            output = model(
                input_ids=torch.cat([prompt_ids, inputs["completion_ids"]], 1),
                attention_mask=torch.cat([prompt_mask, inputs["completion_mask"]], 1),
                logits_to_keep=length + 1,
                use_cache=False,
            )
        return output.logits[:, :-1].float()

    @torch.no_grad()
    def _teacher_logits(self, inputs):
        rows = [{"prompt": ""}] * len(inputs["prompt_ids"])
        null = left_pad(self.policy.negative_prompt_ids(rows, None), self.processing_class.pad_token_id)
        null_ids, null_mask = (tensor.to(self.accelerator.device) for tensor in null)
        cond = self._completion_logits(self.teacher, inputs["prompt_ids"], inputs["prompt_mask"], inputs)
        uncond = self._completion_logits(self.teacher, null_ids, null_mask, inputs)
        return guide_logits(cond, uncond, GUIDANCE_SCALE)

    def _compute_loss(self, model, inputs):
        teacher = self._clocked("teacher", self._teacher_logits, inputs)
        student = self._completion_logits(model, inputs["prompt_ids"], inputs["prompt_mask"], inputs)
        mask = inputs["completion_mask"]
        kl = (reverse_kl(student, teacher, self.temperature) * mask).sum(1)
        log_probs = (student / self.temperature).log_softmax(-1)
        log_probs = log_probs.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
        advantages = DIVERSITY_COEF * inputs["advantages"]
        return kl.mean() + policy_gradient_loss((log_probs * mask).sum(1), advantages, inputs["old_logps"])


class Clock(TrainerCallback):
    """Seconds of each step, from its first forward to the end of its update, and of the step's parts."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        step = {"total": time.perf_counter() - self.start, "processor": time.process_time() - self.cpu_start}
        if isinstance(self.trainer, TimedRLOO):
            step |= self.trainer.seconds
            self.trainer.seconds = dict.fromkeys(PARTS, 0.0)
        else:
            logged = self.trainer._metrics["train"]
            step |= {part: logged[f"time/{part}"][-1] for part in ("rollout", "reward", "teacher")}
            step["old log-probs"] = 0.0
        step["update"] = step["total"] - sum(step[part] for part in PARTS if part != "update")
        self.steps.append(step)


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """`<s> words <audio>`, with as many words as there are to be."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<audio>", *dict.fromkeys(" ".join(CAPTIONS).split())]
    words += [f"w{i}" for i in range(vocab_size - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A <audio>", special_tokens=[("<s>", 1), ("<audio>", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def load(settings: argparse.Namespace):
    """The model, given or random, which cannot end a completion, and its tokenizer."""
    if settings.model:
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=settings.vocab_size,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=settings.completion_length + 64,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model, tokenizer = LlamaForCausalLM(config), word_tokenizer(settings.vocab_size)
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[tokenizer.eos_token_id] = -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model, tokenizer


def prompts(tokenizer, tokens: int | None) -> list[str]:
    """The captions, or texts of about that many tokens that begin with each of them."""
    if tokens is None:
        return CAPTIONS
    long = [" ".join([caption, *CAPTIONS] * (1 + tokens // 40)) for caption in CAPTIONS]
    return [tokenizer.decode(ids[:tokens]) for ids in tokenizer(long, add_special_tokens=False)["input_ids"]]


def embed(texts: list[str]) -> torch.Tensor:
    """A cheap E: how often each byte occurs; `(len, 256)`."""
    return torch.stack(
        [torch.bincount(torch.frombuffer(bytearray(b"." + text.encode()), dtype=torch.uint8), minlength=256)
         for text in texts]
    ).float()  # fmt: skip


def build(trainer: str, settings: argparse.Namespace, output_dir: str, clock: Clock):
    """One of the three trainers, ready to train."""
    model, tokenizer = load(settings)
    common = {
        "output_dir": output_dir,
        "max_steps": settings.steps + 2,
        "logging_steps": settings.steps + 2,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "num_generations": settings.generations,
        "max_completion_length": settings.completion_length,
        "temperature": TEMPERATURE,
        "learning_rate": 1.5e-4,
        "beta": 0.0,
        "bf16": settings.bf16 or torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    data = {
        "model": model,
        "train_dataset": Dataset.from_dict({"prompt": prompts(tokenizer, settings.prompt_tokens)}),
        "processing_class": tokenizer,
        "callbacks": [clock],
    }
    if trainer == "ours":
        args = CFGDistillDiversityConfig(
            **common, guidance_scale=GUIDANCE_SCALE, diversity_coef=DIVERSITY_COEF, diversity_warmup_steps=0
        )
        return CFGDistillDiversityTrainer(args=args, embedder=embed, **data)
    peer = TimedRLOO if trainer == "rloo" else DenseCFGTrainer
    return peer(args=RLOOConfig(**common), reward_funcs=DiversityReward(embed, settings.generations), **data)


def resident(field: str) -> float:
    """MiB of this process: `VmRSS`, resident now, or `VmHWM`, the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def of_peak(model: torch.nn.Module, tokens: int, seconds: float, dtype: torch.dtype) -> float:
    """Share of the peak of a guided teacher (two forwards) and an update (forward and backward) of `tokens` tokens."""
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return (2 * 2 + 2 + 4) * weights * tokens / seconds / peak(next(model.parameters()).device, dtype)


def measure(trainer: str, settings: argparse.Namespace) -> dict:
    """Seconds of the steps and MiB at the peak of one trainer, in this process, which has done nothing else."""
    torch.set_num_threads(settings.threads)
    clock = Clock()
    before = resident("VmRSS")
    # The trainers print their logs
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        clock.trainer = build(trainer, settings, folder, clock)
        clock.trainer.train()
    lengths = set(clock.trainer._buffered_inputs[0]["completion_mask"].sum(1).tolist())
    if lengths != {settings.completion_length}:
        raise RuntimeError(f"completions of {lengths} tokens instead of {settings.completion_length}")
    memory = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resident("VmHWM") - before
    timed, logging = clock.steps[1:-1], clock.steps[-1]
    median = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
    figures = median | {"logging step": logging["total"], "memory": memory}
    if trainer == "ours":
        tokens = settings.batch * settings.accumulation * settings.completion_length
        dtype = torch.bfloat16 if clock.trainer.args.bf16 else torch.float32
        figures["of peak"] = of_peak(clock.trainer.model, tokens, median["teacher"] + median["update"], dtype)
    return figures


def table(rounds: list[dict[str, dict]]) -> str:
    """Medians over the rounds, and the medians of the rounds' ratios, as Markdown."""
    names = {"ours": "ours", "rloo": "RLOO, no teacher", "dense": "RLOO + dense CFG-KL"}
    columns = ("total", *PARTS, "logging step", "processor", "memory")

    def row(name: str, digits: dict[str, int], value) -> str:
        cells = []
        for column in columns:
            values = [x for r in rounds if (x := value(r, column)) is not None]
            cells.append(f"{statistics.median(values):.{digits.get(column, 2)}f}" if values else "-")
        return f"| {name} | " + " | ".join(cells) + " |"

    def ratio(peer: str):
        return lambda r, column: r["ours"][column] / r[peer][column] if r[peer][column] else None

    lines = ["| seconds a step | " + " | ".join(columns[:-1]) + " | peak MiB |", "|---" * (len(columns) + 1) + "|"]
    lines += [row(names[t], {"memory": 0}, lambda r, column, t=t: r[t][column]) for t in TRAINERS]
    lines += [row(f"ours / {names[peer]}", {}, ratio(peer)) for peer in TRAINERS[1:]]
    share = statistics.median(r["ours"]["of peak"] for r in rounds)
    return "\n".join([*lines, "", f"Teacher and update of ours: {share:.2f} of the peak."])


def machine() -> dict[str, object]:
    """What the numbers depend on besides the settings."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder of a causal LM; the shipped one if no vocabulary is given")
    parser.add_argument("--vocab_size", type=int, help="a random Llama (6 x 256) with this vocabulary instead")
    parser.add_argument("--batch", type=int, default=16, help="sequences a forward")
    parser.add_argument("--accumulation", type=int, default=1, help="forwards a step")
    parser.add_argument("--generations", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--prompt_tokens", type=int, help="length of the prompts; short captions if not given")
    parser.add_argument("--completion_length", type=int, default=200, help="tokens of every completion")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each trainer in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast on a CPU too, as the recipes have it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the settings, the machine and every round")
    settings = parser.parse_args()
    if settings.model and settings.vocab_size:
        parser.error("`--vocab_size` builds a random model: it cannot go with `--model`")
    if not settings.vocab_size and not settings.model and SHIPPED.exists():
        settings.model = os.path.relpath(SHIPPED)
    if not settings.model and not settings.vocab_size:
        settings.vocab_size = 2200
    return settings


def main() -> None:
    settings = parse()
    rounds: list[dict[str, dict]] = []
    record = {"settings": {k: v for k, v in vars(settings).items() if k != "output"}, "machine": machine()}
    with (
        # A process for each measurement, so that no trainer sees the memory of another
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
        tqdm(total=settings.rounds * len(TRAINERS), unit="run") as bar,
    ):
        for _ in range(settings.rounds):
            rounds.append({})
            for trainer in TRAINERS:
                bar.set_description(trainer)
                rounds[-1][trainer] = pool.submit(measure, trainer, settings).result()
                bar.update()
    record["load at the end"] = os.getloadavg()
    print(table(rounds))
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = settings.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(record | {"rounds": rounds}, indent=1) + "\n")
        os.replace(temporary, settings.output)


if __name__ == "__main__":
    main()

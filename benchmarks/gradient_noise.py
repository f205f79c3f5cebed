"""
Signal-to-noise ratio of the diversity term's gradient, for each estimator of it.

The gradient of one group (a prompt and its completions) is `g = mean_j sum_n A_j(n) grad log p(token n of j)`.
Measured over groups of different prompts:

- signal: the squared norm of the mean, `mean over pairs p != q of g_p . g_q`, which is not inflated by noise;
- noise: the trace of the covariance, `mean |g_p|^2 - signal`;
- SNR: signal over the noise of the mean of the groups in 128 sequences;
- cosine: between the means of this estimator and of the unbiased one with least noise, the critic with most
  prefixes and `gae_lambda` 1;
- gain: SNR over that of `sequence`, whose signal is that of the unbiased one too: their means are the same.

Standard errors are jackknife estimates over groups. Estimators: `sequence`, one advantage for all tokens of a
completion; `critic M L`, from `trl_drcd.critic` with M prefixes and `gae_lambda` L, with a critic fitted, rollout by
rollout, to the groups of three folds and used on the fourth; `hidden M L`, the same with a critic that also reads
hidden states; a word before these names the kernel. `distillation` is the gradient of the KL to the guided teacher,
for the cosine between an update of `--update-groups` groups, its two terms clipped in different ways, and the mean
distillation gradient of the groups that are not in it.

Inner products of gradients are computed from sketches (random signs, sums of every 65,536th entry), whose error is
far below the noise. Samples and sketches are written to `--folder` one by one, and a second start continues where the
first one ended.

    OMP_NUM_THREADS=1 nice python benchmarks/gradient_noise.py --output results/gradient/music
    OMP_NUM_THREADS=1 nice python benchmarks/gradient_noise.py --lora --output results/gradient/music_lora
    python recipes/text/get_smollm2.py
    OMP_NUM_THREADS=1 nice python benchmarks/gradient_noise.py --model text --lora --output results/gradient/text_lora
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_drcd.audio import MusicEmbedder, SpectralCodec
from trl_drcd.compat.glibc import keep_freed_memory
from trl_drcd.credit import per_code
from trl_drcd.critic import PrefixCritic, critic_advantages, embed_prefixes, hidden_means, prefix_steps
from trl_drcd.evaluation.tables import markdown_table
from trl_drcd.files import write_bytes, write_text
from trl_drcd.gradient_snr import sketch
from trl_drcd.guidance import left_pad
from trl_drcd.kernels import kernel_advantages
from trl_drcd.losses import guided_logits, reverse_kl
from trl_drcd.policies import Policy, policy_for
from trl_drcd.text import SentenceEmbedder

ROOT = Path(__file__).parents[1]
ESTIMATORS = ["sequence", "critic 9 1", "critic 9 0.9", "critic 9 0.7", "critic 9 0.4", "critic 9 0", "critic 4 0.4"]
KERNELS = ["logdet sequence", "logdet critic 9 0.4", "vendi sequence", "vendi critic 9 0.4"]
SKETCH = 2**16
CHUNK = 8  # prompts that are sampled together
FOLDS = 4
ROLLOUT = 4  # groups of a rollout that the critic learns from


@dataclass
class World:
    """A base, its prompts and what embeds its completions."""

    model: Any
    tokenizer: Any
    policy: Policy
    embed: Callable[[list[list[int]]], torch.Tensor]
    embed_prefixes: Callable[[list[list[int]], list[int], int], tuple[torch.Tensor, torch.Tensor]]
    prompts: list[dict[str, Any]]
    steps: int
    first: int = 0
    """Place of the first prompt in the seeded order."""
    temperature: float = 0.99
    guidance_scale: float = 3.0

    def prompt_ids(self, row: dict[str, Any]) -> list[int]:
        if isinstance(row["prompt"], str):
            return list(self.tokenizer(row["prompt"])["input_ids"])
        encoding = self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        return list(encoding["input_ids"])

    def batch(self, prompt: list[int], completions: list[list[int]]) -> tuple[torch.Tensor, ...]:
        """Ids and masks of a prompt and of its completions, padded to `steps`."""
        prompts, mask = left_pad([prompt] * len(completions), 0)
        flipped, flipped_mask = left_pad([c[::-1] for c in completions] + [[0] * self.steps], 0)
        return prompts, mask, flipped[:-1].flip(1), flipped_mask[:-1].flip(1)


def load_world(name: str, lora: bool, prompts: int, first: int) -> World:
    """The shipped base of the music recipe or SmolLM2 of the text recipe; prompts in seeded order from `first` on."""
    if name == "music":
        models = ROOT / "recipes/tiny_music/models"
        folder, data, steps = models / "musiclm", ROOT / "recipes/tiny_music/data/train_prompts.jsonl", 200
        codec, embedder = (
            SpectralCodec.from_pretrained(models / "codec"),
            MusicEmbedder.from_pretrained(models / "embedder"),
        )
    else:
        folder, data, steps = ROOT / "outputs/smollm2", ROOT / "recipes/text/prompts/train.jsonl", 40
        sentences = SentenceEmbedder(str(ROOT / "outputs/minilm"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = policy_for(model, tokenizer)
    if lora:
        targets: Any = ["q_proj", "v_proj"] if name == "music" else "all-linear"
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))

    def embed(completions: list[list[int]]) -> torch.Tensor:
        if name == "music":
            return torch.as_tensor(embedder(codec.decode(completions))).float()
        return torch.as_tensor(sentences(tokenizer.batch_decode(completions, skip_special_tokens=True))).float()

    def prefixes(completions: list[list[int]], lengths: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As the trainer embeds them: those of music decoded in one pass."""
        if name != "music":
            return embed_prefixes(embed, completions, lengths, size)
        return embed_prefixes(
            lambda sounds: torch.as_tensor(embedder(sounds)), completions, lengths, size, 1, codec.draft
        )

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    chosen = [rows[i] for i in order[first : first + prompts]]
    return World(model, tokenizer, policy, embed, prefixes, chosen, steps, first)


# ---------------------------------------------------------------- samples


@torch.no_grad()
def sample_chunk(world: World, start: int, group: int) -> list[dict[str, Any]]:
    """Groups of the prompts from `start` on: prompt, completions, embeddings."""
    torch.manual_seed(world.first + start)
    prompts = [world.prompt_ids(row) for row in world.prompts[start : start + CHUNK]]
    rows = [prompt for prompt in prompts for _ in range(group)]
    completions = world.policy.rollout(
        world.model, rows, temperature=world.temperature, max_new_tokens=world.steps
    ).completions()
    embeddings, groups = world.embed(completions).split(group), []
    for i, prompt in enumerate(prompts):
        own = completions[i * group : (i + 1) * group]
        row = {"row": world.prompts[start + i], "prompt": prompt, "completions": own}
        groups.append(row | {"embeddings": embeddings[i], "mask": world.batch(prompt, own)[3].bool()})
    return groups


def samples(world: World, folder: Path, group: int, prefixes: int) -> list[dict[str, Any]]:
    """All groups with their prefixes, from `folder` where they are there."""
    groups = []
    for start in tqdm(range(0, len(world.prompts), CHUNK), desc="samples", unit="chunk"):
        file = folder / f"samples_{group}_{world.first + start:04d}.safetensors"
        if not file.exists():
            save(sample_chunk(world, start, group), file)
        groups += load(file)
    steps = prefix_steps(world.steps, prefixes)
    for index, row in enumerate(tqdm(groups, desc="prefixes", unit="group"), world.first):
        file = folder / f"prefixes_{group}_{prefixes}_{index:04d}.safetensors"
        if not file.exists():
            save(world.embed_prefixes(row["completions"], steps, row["embeddings"].shape[1]), file)
        row["prefixes"], row["reached"] = load(file)
    return groups[: len(world.prompts)]


def save(what: Any, file: Path) -> None:
    """Dictionaries, lists, texts, numbers and tensors as one safetensors file, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value.contiguous()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {name: pack(part) for name, part in value.items()}
        return [pack(part) for part in value] if isinstance(value, list | tuple) else value

    structure = json.dumps(pack(what))
    save_file(tensors, file.with_suffix(".part"), {"structure": structure})
    file.with_suffix(".part").rename(file)


def load(file: Path) -> Any:
    """What [`save`] wrote; tuples come back as lists."""
    with safe_open(file, framework="pt") as tensors:

        def unpack(value: Any) -> Any:
            if isinstance(value, dict):
                own = set(value) == {"tensor"}
                return tensors.get_tensor(value["tensor"]) if own else {k: unpack(part) for k, part in value.items()}
            return [unpack(part) for part in value] if isinstance(value, list) else value

        return unpack(json.loads(tensors.metadata()["structure"]))


# ---------------------------------------------------------------- advantages


def kernel_of(name: str) -> str:
    """The kernel of an estimator."""
    return name.split()[0] if name.split()[0] in ("logdet", "vendi") else "pairs"


def cross_fitted(
    data: dict[str, torch.Tensor], steps: list[int], gae_lambda: float, kernel: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """Advantages `(P, G, S)` from a critic that has learnt from the other folds, and its metrics, mean over folds."""
    groups, size, length = data["mask"].shape
    result, metrics = torch.zeros(groups, size, length), {}
    for fold in range(FOLDS):
        held_out = torch.arange(groups) % FOLDS == fold
        critic = PrefixCritic(len(steps), hidden_states="means" in data)
        rollouts = [(rows, True) for rows in (~held_out).nonzero().flatten().split(ROLLOUT)]
        for rows, fit in [*rollouts, (held_out.nonzero().flatten(), False)]:
            found = (data[key][rows].flatten(0, 1) for key in ("prefixes", "reached", "embeddings"))
            means = data["means"][rows].flatten(0, 1) if "means" in data else None
            output = critic_advantages(critic, *found, size, gae_lambda, kernel, fit, means)
        mask = data["mask"][held_out].flatten(0, 1)
        result[held_out] = per_code(output.advantages, steps, mask[..., None]).view(-1, size, length).float()
        metrics |= {key: metrics.get(key, 0.0) + value / FOLDS for key, value in output.metrics.items()}
    return result, metrics


def all_advantages(
    groups: list[dict[str, Any]], names: list[str], max_steps: int, prefixes: int, hidden: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Advantages `(P, G, S)` and metrics of the critic, by estimator."""
    data = {
        key: torch.stack([group[key] for group in groups]) for key in ("embeddings", "mask", "prefixes", "reached")
    }
    all_steps, (count, size) = prefix_steps(max_steps, prefixes), data["mask"].shape[:2]
    result, metrics = {}, {}
    for name in tqdm(names, desc="advantages", unit="estimator"):
        if name.endswith("sequence"):
            plain = kernel_advantages(data["embeddings"].flatten(0, 1), size, kernel_of(name))
            result[name] = (plain.view(count, size, 1) * data["mask"]).float()
            continue
        number, gae_lambda = name.split()[-2:]
        steps = prefix_steps(max_steps, int(number))
        kept = [all_steps.index(step) for step in steps]
        part = data | {key: data[key][:, :, kept] for key in ("prefixes", "reached")}
        if "hidden" in name.split():
            part["means"] = hidden[:, :, kept]
        result[name], metrics[name] = cross_fitted(part, steps, float(gae_lambda), kernel_of(name))
    return result, metrics


@torch.no_grad()
def read_hidden(world: World, groups: list[dict[str, Any]], steps: list[int], folder: Path) -> torch.Tensor:
    """The base's [`~trl_drcd.critic.hidden_means`], `(P, G, M, F)`; from `folder` where they are there."""
    means = []
    for index, group in enumerate(tqdm(groups, desc="hidden states", unit="group"), world.first):
        file = folder / f"means_{len(group['completions'])}_{len(steps)}_{index:04d}.safetensors"
        if not file.exists():
            hidden = world.policy.hidden_states(world.model, *world.batch(group["prompt"], group["completions"]))
            save([hidden_means(hidden, group["mask"], steps)], file)
        means += load(file)
    return torch.stack(means)


# ---------------------------------------------------------------- gradients


def gradients(world: World, group: dict[str, Any], advantages: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Sketch and squared length of one group's gradient, by estimator, and of the distillation term."""
    parameters = [p for p in world.model.parameters() if p.requires_grad]
    batch, head = world.batch(group["prompt"], group["completions"]), world.policy.heads(world.model)[0]
    ids, mask = (t[..., 0] for t in world.policy.ids_and_mask(*batch[2:]))
    hidden = world.policy.hidden_states(world.model, *batch)
    logits = head.logits(hidden[mask])
    log_probs = torch.zeros(mask.shape)
    log_probs[mask] = (logits / world.temperature).log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]
    with torch.no_grad():  # the base is its own teacher
        null = world.policy.negative_prompt_ids([{"prompt": group["row"]["prompt"]}], None)[0]
        uncond = world.policy.hidden_states(world.model, *world.batch(null, group["completions"])[:2], *batch[2:])
        teacher = guided_logits(head, hidden[mask].detach(), uncond[mask], world.guidance_scale)(slice(None))
    kl = reverse_kl(logits, teacher, world.temperature).sum() / len(mask)
    terms = {name: -(a * log_probs).sum() / len(mask) for name, a in advantages.items()} | {"distillation": kl}
    result = {}
    for name, term in terms.items():
        gradient = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        result[name] = {"sketch": sketch(gradient, SKETCH), "square": sum(float(g.square().sum()) for g in gradient)}
    return result


# ---------------------------------------------------------------- statistics


def leave_one_out(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of all rows and of all but each one; shapes `(...)` and `(P, ...)`."""
    total = values.sum(0)
    return total, total - values


def pair_means(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean over p != q of `a_p . b_q`, of all groups first, then without each group; shape `(1 + P,)`."""
    count = len(a)
    (sum_a, rest_a), (sum_b, rest_b) = leave_one_out(a), leave_one_out(b)
    own, rest_own = leave_one_out((a * b).sum(-1))
    whole = (sum_a @ sum_b - own) / (count * (count - 1))
    rest = ((rest_a * rest_b).sum(-1) - rest_own) / ((count - 1) * (count - 2))
    return torch.cat([whole[None], rest])


def with_error(values: torch.Tensor) -> tuple[float, float]:
    """The first, of all groups, and its jackknife standard error from the others."""
    rest = values[1:]
    return float(values[0]), float(((len(rest) - 1) * (rest - rest.mean()).square().mean()).sqrt())


def unbiased_of(kernel: str, names: list[str]) -> str | None:
    """The unbiased estimator with least noise: for `pairs` the critic of most prefixes with `gae_lambda` 1."""
    if kernel != "pairs":
        return f"{kernel} sequence" if f"{kernel} sequence" in names else None
    critics = [name for name in names if name.startswith("critic ") and float(name.split()[2]) == 1]
    return max(critics, key=lambda name: int(name.split()[1]), default=None)


def statistics(found: list[dict[str, Any]], size: int) -> dict[str, dict[str, float]]:
    """Rows of the table by estimator."""
    sketches = {name: torch.stack([f[name]["sketch"] for f in found]).double() for name in found[0]}
    signals = {name: pair_means(sketch, sketch) for name, sketch in sketches.items()}
    noises = {}
    for name, signal in signals.items():
        total, rest = leave_one_out(torch.tensor([f[name]["square"] for f in found], dtype=torch.float64))
        noises[name] = torch.cat([total[None] / len(found), rest / (len(found) - 1)]) - signal
    rows = {}
    for name, signal in signals.items():
        values = {"noise": noises[name], "signal": signal, "SNR": signal / noises[name] * 128 / size}
        if unbiased := unbiased_of(kernel_of(name), list(found[0])):
            scale = (signal * signals[unbiased]).clamp(min=1e-30).sqrt()
            values["cosine"] = pair_means(sketches[name], sketches[unbiased]) / scale
        if unbiased and kernel_of(name) == "pairs" and "sequence" in found[0] and name != "distillation":
            values["gain"] = signal / noises[name] / (signals[unbiased] / noises["sequence"])
        rows[name] = {}
        for key, value in values.items():
            rows[name] |= dict(zip((key, f"{key} se"), with_error(value), strict=True))
    return rows


def clippings(found: list[dict[str, Any]], name: str, coef: float, groups: int) -> dict[str, float]:
    """
    Mean cosine between an update of `groups` groups and the mean distillation gradient of the others.

    `sum`: the sum of both terms, which clipping its length does not turn; `apart`: each clipped to length 1 for
    itself; `bounded`: diversity no longer than distillation; `distillation`: no diversity at all.
    """
    distillation = torch.stack([f["distillation"]["sketch"] for f in found])
    diversity = coef * torch.stack([f[name]["sketch"] for f in found])
    cosines: dict[str, list[float]] = {}
    for start in range(0, len(found) - groups + 1, groups):
        here = torch.zeros(len(found), dtype=torch.bool)
        here[start : start + groups] = True
        d, g, reference = distillation[here].mean(0), diversity[here].mean(0), distillation[~here].mean(0)
        updates = {
            "distillation": d,
            "sum": d + g,
            "apart": d / d.norm().clamp(min=1) + g / g.norm().clamp(min=1),
            "bounded": d + g * (d.norm() / g.norm()).clamp(max=1),
        }
        for way, update in updates.items():
            cosines.setdefault(way, []).append(float(torch.cosine_similarity(update, reference, dim=0)))
    return {way: sum(values) / len(values) for way, values in cosines.items()}


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """SNR against cosine to the unbiased gradient, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, row in rows.items():
        if "cosine" in row and name != "distillation":
            axes.errorbar(row["cosine"], row["SNR"], row["SNR se"], row["cosine se"], fmt="o", capsize=2, label=name)
    axes.set(xlabel="cosine to the unbiased mean gradient", ylabel="SNR at 128 sequences", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path.with_suffix(".part"), format="png", dpi=120, bbox_inches="tight")
    write_bytes(path, path.with_suffix(".part").read_bytes())
    path.with_suffix(".part").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["music", "text"], default="music", help="shipped base, or SmolLM2")
    parser.add_argument("--lora", action="store_true", help="gradients of a fresh adapter, not of all weights")
    parser.add_argument("--prompts", type=int, default=96, help="groups")
    parser.add_argument("--skip-prompts", type=int, default=0, help="groups before them, in the seeded order")
    parser.add_argument("--num-generations", type=int, default=8, help="completions of a group")
    parser.add_argument("--estimators", nargs="+", default=ESTIMATORS + KERNELS, metavar="NAME", help="as above")
    parser.add_argument(
        "--prefixes", type=int, default=9, help="that are embedded; those of each estimator are some of these"
    )
    parser.add_argument("--coef", type=float, default=100.0, help="diversity_coef of the clipped updates")
    parser.add_argument("--update-groups", type=int, default=4, help="groups of an update")
    parser.add_argument("--folder", type=Path, help="of samples and sketches; outputs/gradient_noise/... by default")
    parser.add_argument("--output", type=Path, help="path of a .json and a .png, without the ending")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    keep_freed_memory()
    folder = args.folder or ROOT / "outputs/gradient_noise" / args.model
    folder.mkdir(parents=True, exist_ok=True)

    numbers = sorted({int(name.split()[-2]) for name in args.estimators if "sequence" not in name})
    if strange := [n for n in numbers if (args.prefixes + 1) % (n + 1)]:
        parser.error(
            f"--estimators: prefixes {strange} are not among the {args.prefixes} equally spaced of --prefixes"
        )
    if args.skip_prompts % CHUNK:
        parser.error(f"--skip-prompts {args.skip_prompts} must be a multiple of {CHUNK}, which are sampled together")
    world = load_world(args.model, args.lora, args.prompts, args.skip_prompts)
    groups = samples(world, folder, args.num_generations, args.prefixes)
    hidden = read_hidden(world, groups, prefix_steps(world.steps, args.prefixes), folder)
    advantages, metrics = all_advantages(groups, args.estimators, world.steps, args.prefixes, hidden)
    found = []
    for i, group in enumerate(tqdm(groups, desc="gradients", unit="group")):
        name = f"gradients{'_lora' * args.lora}_{args.num_generations}_{len(groups)}_{world.first}_{i:04d}"
        file = folder / f"{name}.safetensors"
        there = load(file) if file.exists() else {}
        if new := {name: a[i] for name, a in advantages.items() if name not in there}:
            there |= gradients(world, group, new)
            save(there, file)
        found.append({name: there[name] for name in [*args.estimators, "distillation"]})
    rows = statistics(found, args.num_generations)
    clips = {n: clippings(found, n, args.coef, args.update_groups) for n in args.estimators if n in ESTIMATORS}
    print(markdown_table(rows), markdown_table(clips), markdown_table(metrics), sep="\n\n")
    if args.output:
        settings = {"model": args.model, "lora": args.lora, "groups": len(groups), "size": args.num_generations}
        report = settings | {"estimators": rows, "clipping": clips, "critic": metrics}
        write_text(args.output.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
        plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()

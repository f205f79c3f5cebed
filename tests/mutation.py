"""
Breaks one central line at a time, in a copy of the package, and shows that a fast test fails.

    python tests/mutation.py                       # all, some seconds each
    python tests/mutation.py --only temperature    # those whose name contains the word
    python tests/mutation.py --table               # the list, as it stands in CONTRIBUTING.md

A line is found by its text, which must stand in its file exactly once: where code has moved, the tool says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 300


class Mutation(NamedTuple):
    """A line of `trl_drcd/<file>`, what is put in its place, and the test that must then fail."""

    name: str
    file: str
    line: str
    broken: str
    test: str


MUTATIONS = [
    # What is computed: Eq. (1) to (7)
    Mutation(
        "guidance scale off by one",
        "guidance.py",
        "guided = uncond + guidance_scale * (cond - uncond)",
        "guided = uncond + (guidance_scale - 1) * (cond - uncond)",
        "tests/test_guidance.py",
    ),
    Mutation(
        "capped logits guided before the cap",
        "losses.py",
        "    if head.softcap is not None:\n\n        def guided_rows",
        "    if False:\n\n        def guided_rows",
        "tests/test_trainer.py::test_soft_capped_logits_are_guided_after_the_cap",
    ),
    Mutation(
        "one early step too many",
        "guidance.py",
        "return self.guidance_scale if step < self.count else guidance_scale",
        "return self.guidance_scale if step <= self.count else guidance_scale",
        "tests/test_trainer.py::test_loss_and_gradient_equal_the_dense_reference",
    ),
    Mutation(
        "KL direction reversed",
        "heads.py",
        "weighted_log_ratio = log_ratio.mul_(p)",
        "weighted_log_ratio = log_ratio.mul_(-(log_p - log_ratio).exp())",
        "tests/test_losses.py",
    ),
    Mutation(
        "KL direction reversed, in the definition",
        "heads.py",
        "summands = log_p.exp() * log_ratio",
        "summands = log_q.exp() * -log_ratio",
        "tests/test_losses.py::test_reverse_kl_is_its_definition",
    ),
    Mutation(
        "student at temperature 1",
        "heads.py",
        "log_p = (logits / temperature).log_softmax(-1)",
        "log_p = logits.log_softmax(-1)",
        "tests/test_losses.py",
    ),
    Mutation(
        "teacher at temperature 1",
        "heads.py",
        "log_ratio = (teacher_logits / temperature).log_softmax(-1)",
        "log_ratio = teacher_logits.log_softmax(-1)",
        "tests/test_losses.py",
    ),
    Mutation(
        "gradient of the log-probability reversed",
        "heads.py",
        "grad.scatter_add_(1, ids[:, None], log_prob_weights)",
        "grad.scatter_add_(1, ids[:, None], -log_prob_weights)",
        "tests/test_losses.py",
    ),
    Mutation(
        "TRL's biased baseline",
        "diversity.py",
        "baseline = (total - to_others) / pairs_without_j",
        "baseline = (reward.sum(-1, keepdim=True) - reward) / (num_generations - 1)",
        "tests/test_diversity.py",
    ),
    Mutation(
        "groups mixed over prompts",
        "diversity.py",
        "return unit_vectors(embeddings).view(-1, num_generations, embeddings.shape[1])",
        "return unit_vectors(embeddings).view(num_generations, -1, embeddings.shape[1]).transpose(0, 1)",
        "tests/test_diversity.py",
    ),
    Mutation(
        "sign of the advantage",
        "losses.py",
        "if log_probs.ndim > 1 else -advantages * log_probs",
        "if log_probs.ndim > 1 else advantages * log_probs",
        "tests/test_trainer.py::test_loss_and_gradient_equal_the_dense_reference",
    ),
    Mutation(
        "sign of the advantage, gradient taken with the terms",
        "objective.py",
        "return -torch.stack(columns)",
        "return torch.stack(columns)",
        "tests/test_trainer.py::test_an_update_is_the_same_whether_its_terms_are_logged",
    ),
    Mutation(
        "ratio not clipped",
        "losses.py",
        "losses = -torch.minimum(ratio * advantages, clipped * advantages)",
        "losses = -(ratio * advantages)",
        "tests/test_losses.py",
    ),
    Mutation(
        "mean over tokens in place of sequences",
        "losses.py",
        "total = (torch.stack(losses).sum() / len(mask))",
        "total = (torch.stack(losses).sum() / mask.sum())",
        "tests/test_trainer.py::test_an_update_is_the_same_whether_its_terms_are_logged",
    ),
    Mutation(
        "one codebook dropped",
        "losses.py",
        "total = (torch.stack(losses).sum() / len(mask))",
        "total = (torch.stack(losses)[:-1].sum() / len(mask))",
        "tests/test_musicgen.py::test_an_update_is_the_same_whether_its_terms_are_logged",
    ),
    Mutation(
        "lambda reversed",
        "merging/blend.py",
        "return [1 - interpolation_weight, float(interpolation_weight)]",
        "return [float(interpolation_weight), 1 - interpolation_weight]",
        "tests/merging/test_in_memory.py",
    ),
    Mutation(
        "products of an adapter without their scaling",
        "merging/lora.py",
        "return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank",
        "return 1.0",
        "tests/merging/test_adapters.py",
    ),
    # Who plays which part
    Mutation(
        "adapter not off for the teacher",
        "teacher.py",
        "with use_adapter(self.accelerator.unwrap_model(student), None) if off else nullcontext():",
        "with nullcontext():",
        "tests/test_trainer.py::test_adapter_off_teacher_equals_the_base_and_needs_no_copy",
    ),
    Mutation(
        "teacher in training mode",
        "teacher.py",
        "        model.eval()\n",
        "        model.train()\n",
        "tests/test_trainer.py::test_the_teacher_reads_in_evaluation_mode",
    ),
    Mutation(
        "teacher unconditional in place of conditional",
        "teacher.py",
        "first, *second = hidden.chunk(2) if self.guided else (hidden,)",
        "*second, first = hidden.chunk(2) if self.guided else (hidden,)",
        "tests/test_trainer.py::test_loss_and_gradient_equal_the_dense_reference",
    ),
    Mutation(
        "teacher trains along",
        "distributed.py",
        "teacher = copy.deepcopy(model, memo={id(parameter): parameter for parameter in frozen})",
        "teacher = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})",
        "tests/test_trainer.py::test_frozen_copy_does_not_move_and_is_no_alias",
    ),
    Mutation(
        "extra rewards ignored",
        "objective.py",
        'credits["reward"] = batch["advantages"]',
        'credits["reward"] = torch.zeros_like(batch["advantages"])',
        "tests/test_trainer.py::test_extra_rewards_add_with_their_weights",
    ),
    Mutation(
        "coefficient falls in place of rising",
        "config.py",
        "return diversity_coef * min(1.0, step / warmup_steps) if warmup_steps else diversity_coef",
        "return diversity_coef * (1 - min(1.0, step / warmup_steps)) if warmup_steps else diversity_coef",
        "tests/test_trainer.py::test_diversity_coef_rises_linearly",
    ),
    # What is sampled is what is scored
    Mutation(
        "mask of the completion ignored",
        "policies/causal_lm.py",
        "ids, mask = completion_ids[..., None], completion_mask[..., None].bool()",
        "ids, mask = completion_ids[..., None], torch.ones_like(completion_mask[..., None]).bool()",
        "tests/test_trainer.py::test_loss_and_gradient_equal_the_dense_reference",
    ),
    Mutation(
        "logits one step late",
        "policies/causal_lm.py",
        "hidden = hidden[:, -completion_ids.shape[1] :]",
        "hidden = hidden[:, -completion_ids.shape[1] :].roll(1, 1)",
        "tests/test_trainer.py::test_loss_and_gradient_equal_the_dense_reference",
    ),
    Mutation(
        "sampled at temperature 1",
        "sampling/loop.py",
        "new = draw(logits.view(len(uniform), -1), uniform, temperature)",
        "new = draw(logits.view(len(uniform), -1), uniform)",
        "tests/sampling",
    ),
    Mutation(
        "eos does not end a sequence",
        "sampling/loop.py",
        "ends = (torch.isin(tokens, eos) & counts).any(1)",
        "ends = (torch.isin(tokens, eos[:0]) & counts).any(1)",
        "tests/sampling",
    ),
    Mutation(
        "a static cache goes on where the last rollout ended",
        "sampling/compiled.py",
        "layer.cumulative_length.fill_(filled)",
        "layer.cumulative_length.add_(0 if int(layer.cumulative_length) else filled)",
        "tests/sampling/test_compiled.py",
    ),
    Mutation(
        "every codebook ends with the eos of the first",
        "sampling/loop.py",
        "counts = counts & (step <= ended[:, None] + after)",
        "counts = counts & (step <= ended[:, None])",
        "tests/policies/test_dia.py",
    ),
    Mutation(
        "an eos on every codebook",
        "policies/dia.py",
        "Head(weight[: self.layout.eos_id + (k == 0)])",
        "Head(weight[: self.layout.eos_id + 1])",
        "tests/policies/test_dia.py",
    ),
    Mutation(
        "the decoder does not read where a codebook ends",
        "policies/delayed.py",
        "read = steps.where(frame < end, self.pad_id).where(frame != end, self.eos_id)",
        "read = steps.where(frame < end, self.pad_id)",
        "tests/policies/test_dia.py",
    ),
    Mutation(
        "the null prompt of Dia is the prompt",
        "policies/dia.py",
        "return [0] * len(ids) if negative is None else ids",
        "return ids",
        "tests/policies/test_dia.py",
    ),
    Mutation(
        "delays reversed",
        "audio/codecs.py",
        "delayed[:, late : late + frames, k] = codes[..., k]",
        "delayed[:, delays[-1] - late : delays[-1] - late + frames, k] = codes[..., k]",
        "tests/test_musicgen.py::test_delayed_layout_is_that_of_generate",
    ),
    Mutation(
        "delay off by one where it is undone",
        "audio/codecs.py",
        "return torch.stack([delayed[:, late : late + frames, k] for k, late in enumerate(delays)], dim=-1)",
        "return torch.stack([delayed[:, max(0, late - 1) :][:, :frames, k] for k, late in enumerate(delays)], dim=-1)",
        "tests/test_musicgen.py::test_delayed_layout_is_that_of_generate",
    ),
    # The critic of prefixes
    Mutation(
        "critic knows the completion's own embedding",
        "credit.py",
        "    error = error.masked_fill(itself, 0.0)\n",
        "",
        "tests/test_critic.py",
    ),
    Mutation(
        "advantages of steps look back",
        "credit.py",
        "later = (step[:, None] - step).clamp(min=0)  # row: later step, column: earlier step\n"
        "    weights = torch.tensor(gae_lambda, dtype=delta.dtype, device=delta.device).pow(later).tril()",
        "later = (step - step[:, None]).clamp(min=0)\n"
        "    weights = torch.tensor(gae_lambda, dtype=delta.dtype, device=delta.device).pow(later).triu()",
        "tests/test_critic.py",
    ),
    # What is reported
    Mutation(
        "norm of a term's gradient not over all forwards",
        "term_gradients.py",
        "part.add(model, losses[name].mean() / forwards)",
        "part.add(model, losses[name].mean())",
        "tests/test_trainer.py::test_gradient_norms_of_the_terms_are_those_of_separate_losses",
    ),
    Mutation(
        "a beaten point on the front",
        "evaluation/fronts.py",
        "if last is None or points[index, 1] > last[1] or",
        "if last is None or points[index, 1] < last[1] or",
        "tests/test_fronts.py",
    ),
]


def problems(mutation: Mutation) -> list[str]:
    """Why a mutation cannot be tried."""
    found = []
    times = (ROOT / "trl_drcd" / mutation.file).read_text().count(mutation.line)
    if times != 1:
        found.append(f"its line stands {times} times in trl_drcd/{mutation.file}: {mutation.line!r}")
    path, _, function = mutation.test.partition("::")
    if not (ROOT / path).exists() or (function and f"def {function}(" not in (ROOT / path).read_text()):
        found.append(f"there is no {mutation.test}")
    return found


def broken_copy(mutation: Mutation, folder: Path) -> None:
    """The project in `folder`, its package a copy with the one line broken."""
    for path in ROOT.iterdir():
        if path.name != "trl_drcd" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "trl_drcd", folder / "trl_drcd", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "trl_drcd" / mutation.file
    file.write_text(file.read_text().replace(mutation.line, mutation.broken))


class FirstFailure:
    """A pytest plugin that keeps the name of the first test that fails."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def _try(mutation: Mutation, answer: Connection) -> None:
    """In a process of its own: sends the first test that fails on the broken copy, empty if none does."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with tempfile.TemporaryDirectory() as folder:
        broken_copy(mutation, Path(folder))
        os.chdir(folder)
        sys.path[:] = [folder, *(entry for entry in sys.path if entry not in ("", str(ROOT), str(ROOT / "tests")))]
        sys.dont_write_bytecode = True
        found = FirstFailure()
        words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--rootdir", folder, mutation.test]
        code = pytest.main(words, plugins=[found])
        assert folder in sys.modules["trl_drcd"].__file__
        answer.send((int(code), found.name))


def first_failure(mutation: Mutation) -> tuple[str, float]:
    """The first test that fails on the broken copy, empty if none does, and the seconds it took."""
    start = time.perf_counter()
    forked = get_context("fork")  # what is imported once need not be imported again
    mine, theirs = forked.Pipe(duplex=False)
    process = forked.Process(target=_try, args=(mutation, theirs))
    process.start()
    theirs.close()
    if not mine.poll(SECONDS):
        process.kill()
        raise SystemExit(f"{mutation.name}: {mutation.test} takes more than {SECONDS} s")
    code, name = mine.recv()
    process.join()
    if code not in (0, 1):
        raise SystemExit(f"{mutation.name}: pytest ended with {code} on {mutation.test}")
    return name, time.perf_counter() - start


def table() -> str:
    """The list in Markdown."""
    rows = [f"| {m.name} | `trl_drcd/{m.file}` | `{m.test}` |" for m in MUTATIONS]
    return "\n".join(["| broken | in | caught by |", "|---|---|---|", *rows])


def main(argv: list[str] | None = None) -> int:
    """Tries the mutations; 1 if one is not caught, or cannot be tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the name")
    parser.add_argument("--table", action="store_true", help="print the list and end")
    args = parser.parse_args(argv)
    if args.table:
        print(table())
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import trl.trainer.rloo_trainer  # noqa: F401 - the slow part of every test's start

    bad = 0
    for mutation in (m for m in MUTATIONS if args.only in m.name):
        if reasons := problems(mutation):
            print(f"CANNOT   {mutation.name}: {'; '.join(reasons)}", flush=True)
            bad += 1
            continue
        failed, seconds = first_failure(mutation)
        bad += not failed
        verdict = "caught  " if failed else "SURVIVES"
        print(f"{verdict} {mutation.name}: {failed or mutation.test} ({seconds:.0f} s)", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())

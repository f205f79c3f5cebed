"""Column `teacher_prompt`: the teacher reads it in place of `prompt`, in training and in guided rows."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from test_grid import judged  # noqa: F401
from test_trainer import PROMPTS, make_trainer, settings

from trl_drcd import CFGDistillDiversityTrainer
from trl_drcd.evaluation.grid import EvaluateArguments, evaluate
from trl_drcd.evaluation.likelihood import teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.guidance import guide_logits
from trl_drcd.losses import reverse_kl
from trl_drcd.policies import CausalLMPolicy, teacher_prompt_ids
from trl_drcd.prompts import load_prompts

TAUGHT = ["a fast tune for drum", None]  # of the first two prompts
NEGATIVE = [None, "slow slow harp"]


@pytest.fixture
def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for turn in messages %}{{ ' ' + ('harp' if turn.role == 'system' else 'a') + ' ' + turn.content }}"
        "{% endfor %}{% if add_generation_prompt %} <audio>{% endif %}"
    )
    return tokenizer


def own_logits(model, prefix, completion):
    return model(torch.tensor([prefix + completion])).logits[0, len(prefix) - 1 : -1]


def dense_kl(student, teacher, prompts, completion, scale=3.0, temperature=0.99):
    """KL of one sequence from full logits in float64; `prompts` are those of student, teacher, and x^-."""
    z, cond, uncond = (own_logits(m, p, completion) for m, p in zip((student, teacher, teacher), prompts, strict=True))
    guided = cond if scale == 1 else guide_logits(cond, uncond, scale)
    return reverse_kl(z, guided, temperature).sum()


def check_loss(trainer, tokenizer, rows, rendered, scale):
    """The trainer's KL and its gradient against [`dense_kl`]; `rendered` are each row's three prompts."""
    trainer.model.train()
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions([row for row in rows for _ in range(4)])
    student = trainer.model
    trainer.compute_loss(student, batch).backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    student, teacher, kls = student.double(), make_model(tokenizer).double(), []
    for i, completion in enumerate(batch["completion_ids"]):
        ids = completion[batch["completion_mask"][i].bool()].tolist()
        kls.append(dense_kl(student, teacher, rendered[i // 4], ids, scale))
        assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == rendered[i // 4][0]
    kl = torch.stack(kls).mean()
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(kl.item(), rel=1e-4) and kl > 0.01
    kl.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name].double(), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_loss_and_gradient_equal_the_dense_reference(tmp_path, tokenizer, scale):
    """A longer and a shorter prompt than the student's, a row without one, a negative prompt beside it."""
    rows = [
        {"prompt": prompt, "teacher_prompt": taught, "negative_prompt": negative}
        for prompt, taught, negative in zip(PROMPTS[:2], TAUGHT, NEGATIVE, strict=True)
    ]
    data = Dataset.from_list(rows * 8)
    trainer = make_trainer(tmp_path, tokenizer, dataset=data, embedder=None, guidance_scale=scale)

    def ids(text):
        return tokenizer(text)["input_ids"]

    rendered = [
        (ids(row["prompt"]), ids(row["teacher_prompt"] or row["prompt"]), ids(row["negative_prompt"] or ""))
        for row in rows
    ]
    assert len({len(prompt) for prompts in rendered for prompt in prompts}) > 2
    check_loss(trainer, tokenizer, rows, rendered, scale)


def test_of_conversations_a_system_turn_that_only_the_teacher_has(tmp_path, chat_tokenizer):
    system = {"role": "system", "content": "slow slow"}
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[:2]]
    rows[0]["teacher_prompt"] = [system, *rows[0]["prompt"]]
    rows[1]["teacher_prompt"] = None
    data = Dataset.from_list(rows * 8)
    trainer = CFGDistillDiversityTrainer(
        make_model(chat_tokenizer), None, settings(tmp_path), data, processing_class=chat_tokenizer
    )

    def ids(text):
        return chat_tokenizer(text, add_special_tokens=False)["input_ids"]

    null = ids("<s> a  <audio>")
    rendered = [
        (ids(f"<s> a {PROMPTS[0]} <audio>"), ids(f"<s> harp slow slow a {PROMPTS[0]} <audio>"), null),
        (ids(f"<s> a {PROMPTS[1]} <audio>"), ids(f"<s> a {PROMPTS[1]} <audio>"), null),
    ]
    check_loss(trainer, chat_tokenizer, rows, rendered, 3.0)


def test_the_column_reaches_the_teacher_in_a_run(tmp_path, tokenizer, monkeypatch):
    """Of all rows of the data set, through TRL's own loading of batches."""
    data = Dataset.from_dict({"prompt": PROMPTS * 4, "teacher_prompt": ["drum drum"] * 16})
    trainer = make_trainer(tmp_path, tokenizer, dataset=data, embedder=None, max_steps=1)
    read, original = [], trainer.teacher.read
    monkeypatch.setattr(trainer.teacher, "read", lambda *args: read.append(args[-1]) or original(*args))
    trainer.train()
    assert [ids.unique(dim=0).tolist() for ids, _ in read] == [[tokenizer("drum drum")["input_ids"]]]


def test_rows_without_one_read_the_prompt_as_the_trainer_renders_it(tmp_path, chat_tokenizer):
    policy = CausalLMPolicy(chat_tokenizer)
    turns = [{"role": "user", "content": "harp"}]
    rows = [{"prompt": turns}, {"prompt": turns, "teacher_prompt": "drum"}, {"prompt": "a", "teacher_prompt": None}]
    own, other, text = teacher_prompt_ids(policy, rows)
    assert own == [1, 5, 11, 4] and other == [1, 5, 12, 4] and text == [1, 5, 4]


# ---------------------------------------------------------------- what is refused


def test_it_is_never_cut(tmp_path, tokenizer):
    data = Dataset.from_dict({"prompt": PROMPTS * 4, "teacher_prompt": ["harp " * 40] * 16})
    with pytest.raises(ValueError, match="a teacher's prompt of 42 tokens and `max_completion_length=5` do not fit"):
        make_trainer(tmp_path, tokenizer, make_model(tokenizer, max_position_embeddings=32), dataset=data)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            [[{"role": "user", "content": "a"}]] * 16,
            "in row 0 a `teacher_prompt` of turns and a `prompt` that is a text",
        ),
        ([1] * 16, "column `teacher_prompt` of `train_dataset` is of type int64"),
    ],
)
def test_other_columns_are_refused(tmp_path, tokenizer, column, message):
    data = Dataset.from_dict({"prompt": PROMPTS * 4, "teacher_prompt": column})
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, dataset=data)


def test_files_are_read_with_it(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "teacher_prompt": "b", "other": 1}\n{"prompt": "c"}\n')
    data = load_prompts("dataset", str(tmp_path / "p.jsonl"), "train")
    assert data["teacher_prompt"][:] == ["b", None] and data.column_names == ["prompt", "teacher_prompt"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "teacher_prompt": 7}\n')
    with pytest.raises(ValueError, match="line 1 has a `teacher_prompt` of type int"):
        load_prompts("dataset", str(tmp_path / "bad.jsonl"), "train")


# ---------------------------------------------------------------- evaluation


def test_guided_sampling_and_the_kl_read_it(tokenizer):
    base, student = make_model(tokenizer, 0).double(), make_model(tokenizer, 1).double()
    prompts, taught = ["a slow tune", "harp"], ["drum", None]
    given = {"teacher_prompts": taught, "samples_per_prompt": 3, "max_new_tokens": 5}
    samples = sample_prompts(student, tokenizer, prompts, **given)
    plain = sample_prompts(student, tokenizer, prompts, samples_per_prompt=3, max_new_tokens=5)
    assert samples.token_ids == plain.token_ids  # the student never reads it
    terms, null = teacher_terms(student, base, tokenizer, samples), tokenizer("")["input_ids"]
    for i, completion in enumerate(samples.token_ids):
        own = tokenizer(prompts[i // 3])["input_ids"]
        read = tokenizer(taught[i // 3] or prompts[i // 3])["input_ids"]
        with torch.no_grad():
            expected = dense_kl(student, base, (own, read, null), completion)
        assert terms.kl[i].item() == pytest.approx(expected.item(), rel=1e-4)
    guided = sample_prompts(base, tokenizer, prompts, guidance_scale=3.0, **given)
    instead = sample_prompts(
        base, tokenizer, ["drum", "harp"], samples_per_prompt=3, guidance_scale=3.0, max_new_tokens=5
    )
    assert guided.token_ids == instead.token_ids
    itself = teacher_terms(base, base, tokenizer, guided, model_guidance_scale=3.0)
    torch.testing.assert_close(itself.kl, torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("judged")
def test_an_evaluation_reads_the_column(tokenizer, tmp_path):
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"name": "base"}, {"name": "CFG", "guidance_scale": 3}]

    def run(taught, output):
        lines = [{"prompt": "a slow tune", "teacher_prompt": taught}, {"prompt": "harp"}]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        given = {"num_prompts": 2, "samples_per_prompt": 4, "max_new_tokens": 5, "output_dir": str(tmp_path / output)}
        return evaluate(EvaluateArguments(str(tmp_path / "base"), str(tmp_path / "p.jsonl"), rows, **given))

    plain, taught = run(None, "out"), run("drum drum drum", "out")
    for before, after in zip(plain, taught, strict=True):
        assert before.settings != after.settings  # measured again
        assert before.metrics["kl"]["mean"] != after.metrics["kl"]["mean"] or before.name.startswith("CFG")
    assert plain[0].metrics["diversity"] == taught[0].metrics["diversity"]  # the base's samples are the same
    assert plain[1].metrics["diversity"] != taught[1].metrics["diversity"]
    assert taught[1].metrics["kl"]["mean"] == pytest.approx(0, abs=1e-5)

"""The text recipe on a chat model of random weights, and its prompts."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import text_drcd
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.launch import training
from trl_drcd.policies import CausalLMPolicy
from trl_drcd.prompts import load_prompts
from trl_drcd.scripts import train_text

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "recipes" / "text" / "prompts"
CHAT = [[{"role": "user", "content": text}] for text in ("a slow tune", "fast drum", "harp for a flute", "tune")]

COMMON = {"a", "an", "and", "the", "of", "in", "on", "to", "for", "that", "who", "is", "with", "from", "about"} | {
    "write", "tell", "describe", "invent", "short", "story", "poem", "scene", "letter",
}  # fmt: skip


@pytest.fixture
def world(tmp_path, model, tokenizer):
    """A saved model with a chat template, and two files of prompts."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<audio>' }}{% endif %}"
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tokenizer.chat_template = None
    for name, prompts in {"chat": CHAT, "plain": ["a slow tune", "fast drum", "harp", "flute"]}.items():
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def arguments(world, **changed) -> list[str]:
    settings = {
        "model_name_or_path": world / "model", "dataset": world / "chat.jsonl", "output_dir": world / "out",
        "max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "max_completion_length": 4, "gradient_checkpointing": False, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "num_samples": 2,
    }  # fmt: skip
    return [word for name, value in (settings | changed).items() for word in (f"--{name}", str(value))]


def print_the_example(output: Path, monkeypatch) -> None:
    """The card's own Python, from beside the model's folder."""
    (example,) = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.S)
    monkeypatch.chdir(output.parent)
    exec(example, names := {})
    config = names["model"].generation_config
    assert config.do_sample and config.top_k == 0 and config.temperature == 0.99


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dataset": "plain.jsonl"},
        {"dataset": "plain.jsonl", "system_prompt": "a tune"},
        {"system_prompt": "a tune", "negative_prompt": "slow"},
        {"streaming": True},
        {"gradient_checkpointing": True},
    ],
    ids=lambda changed: "-".join(changed) or "default",
)
def test_one_step_and_what_it_leaves(world, changed, monkeypatch, capsys):
    if "dataset" in changed:
        changed = changed | {"dataset": world / changed["dataset"]}
    text_drcd.main(arguments(world, **changed))
    before, after = (AutoModelForCausalLM.from_pretrained(world / name) for name in ("model", "out"))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert after.generation_config.guidance_scale in (None, 1.0)
    rows = [json.loads(line) for line in (world / "out/samples/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(isinstance(row["completion"], str) for row in rows)
    capsys.readouterr()
    print_the_example(world / "out", monkeypatch)
    assert capsys.readouterr().out.strip()
    if "system_prompt" in changed:
        assert all([turn["role"] for turn in row["prompt"]] == ["system", "user"] for row in rows)


def test_no_samples_where_none_are_asked_for(world, capsys):
    for count in (1, 0):  # those of an earlier run are not this model's
        text_drcd.main(arguments(world, num_samples=count))
        assert (world / "out" / "samples").exists() == bool(count)
        assert (world / "out" / "README.md").is_file()
    assert "Model, model card and log are in" in capsys.readouterr().out


def test_the_final_samples_read_the_prompts_that_training_read(world, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = "{{ mood | default('fast') }} " + tokenizer.chat_template
    tokenizer.save_pretrained(world / "model")
    found = []
    monkeypatch.setattr(training, "write_samples", lambda samples, *args: found.append(samples))
    text_drcd.main(arguments(world, chat_template_kwargs='{"mood": "slow"}'))
    trained = AutoModelForCausalLM.from_pretrained(world / "out")

    def ids(**kwargs):
        return sample_prompts(trained, tokenizer, CHAT[:2], max_new_tokens=4, seed=42, **kwargs).token_ids

    assert found[0].prompts == CHAT[:2]
    assert found[0].token_ids == ids(chat_template_kwargs={"mood": "slow"}) != ids()


def test_rewards_and_an_embedder_of_ones_own_by_their_names(world, monkeypatch):
    (world / "ours.py").write_text(
        "import torch\n\ndef length(prompts, completions, answer, **kwargs):\n"
        "    assert answer == [7] * len(prompts)\n    return [float(len(c)) for c in completions]\n\n"
        "def embed(texts):\n    return torch.tensor([[len(t) + 1.0, t.count('a') + 1.0] for t in texts])\n"
    )
    rows = [json.dumps({"prompt": prompt, "answer": 7}) + "\n" for prompt in ("slow", "fast drum", "harp", "flute")]
    (world / "answers.jsonl").write_text("".join(rows))
    monkeypatch.chdir(world)
    ours = {"reward_funcs": "ours.length", "embedder": "ours.embed", "reward_weights": 0.5, "diversity_coef": 1}
    train_text.main(arguments(world, dataset=world / "answers.jsonl", diversity_warmup_steps=0, **ours))
    (entry,) = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines() if "loss/reward" in line]
    assert entry["rewards/length/mean"] > 0 and entry["diversity"] >= 0 and entry["diversity_coef"] == 1


def test_a_reloaded_adapter_gives_the_same_logits(world, monkeypatch):
    trained = []
    save = train_text.train_and_save
    monkeypatch.setattr(train_text, "train_and_save", lambda *args: (save(*args), trained.append(args[0].model)))
    lora = {"use_peft": True, "lora_dropout": 0, "lora_target_modules": "all-linear", "learning_rate": 0.01}
    text_drcd.main(arguments(world, max_steps=2, **lora))
    reloaded = AutoPeftModelForCausalLM.from_pretrained(world / "out")
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        logits, expected = reloaded(ids).logits, trained[0].eval()(ids).logits
        with trained[0].disable_adapter():
            assert (trained[0](ids).logits - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(world / "out").chat_template
    print_the_example(world / "out", monkeypatch)


@pytest.mark.slow
@pytest.mark.real
def test_three_steps_on_smollm2(smollm2, tmp_path, monkeypatch):
    """The recipe's own settings, but for batch size, length of completions, and bfloat16, which most CPUs emulate."""
    monkeypatch.chdir(ROOT)
    changed = {
        "model_name_or_path": smollm2 / "smollm2", "embedder": smollm2 / "minilm", "output_dir": tmp_path / "out",
        "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12,
        "diversity_coef": 20, "diversity_warmup_steps": 2, "logging_steps": 1, "num_samples": 1,
        "save_strategy": "no", "report_to": "none", "dtype": "float32",
    }  # fmt: skip
    words = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    text_drcd.main(["--config", "recipes/text/text_smollm2.yaml", *words])
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "kl" in entry]
    assert [entry["diversity_coef"] for entry in steps] == [0, 10, 20]
    # Base and guided base are about two nats a token apart; the entropy of random logits is near ln(49152) = 10.8
    assert all(0.5 < entry["kl_per_token"] < 8 and 0.5 < entry["entropy"] < 6 for entry in steps)
    assert all(0.2 < entry["diversity"] < 1.2 for entry in steps)
    assert steps[0]["grad_norm/diversity"] == 0 < steps[1]["grad_norm/diversity"]
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    moved = [p.abs().max().item() for name, p in adapter.named_parameters() if "lora_B" in name]
    assert len(moved) == 7 * 30 and min(moved) > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "none.jsonl"}, "`dataset=none.jsonl` is not a file"),
        ({"diversity_coef": 1}, "`diversity_coef=1.0` needs `embedder`"),
        ({"model_name_or_path": "./none"}, "`model_name_or_path=./none` is not a folder"),
        ({"model_name_or_path": "outputs/smollm2"}, "Run: python recipes/text/get_smollm2.py"),
        ({"eval_strategy": "steps"}, "`eval_strategy=steps` needs `eval_dataset`"),
    ],
)
def test_refusals_before_anything_is_loaded(world, monkeypatch, changed, message):
    monkeypatch.setattr("trl.trainer.rloo_trainer.create_model_from_path", None)
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit, match=message):
        text_drcd.main(arguments(world, **changed))


def texts(name: str) -> list[str]:
    rows = load_prompts("dataset", str(PROMPTS / f"{name}.jsonl"), "train")
    assert all([turn["role"] for turn in row["prompt"]] == ["user"] for row in rows)
    return [row["prompt"][0]["content"] for row in rows]


def test_the_shipped_prompts_are_many_and_held_out_ones_are_not_near_training_ones():
    train, validation, test = texts("train"), texts("validation"), texts("test")
    assert len(train) >= 300 and len(validation) == 16 and len(test) == 64
    assert len({*train, *validation, *test}) == len(train) + len(validation) + len(test)
    bags = {text: set(re.findall(r"[a-z']+", text.lower())) - COMMON for text in [*train, *validation, *test]}
    for held_out in test:
        for other in [*train, *validation]:
            shared = len(bags[held_out] & bags[other]) / len(bags[held_out] | bags[other])
            assert shared <= 0.5, (held_out, other)


# ---------------------------------------------------------------- negative prompts of conversations


SYSTEM = [{"role": "system", "content": "slow"}, {"role": "user", "content": "a tune"}]


@pytest.mark.parametrize(
    ("row", "default", "rendered"),
    [
        ({"prompt": SYSTEM}, None, "user <audio>"),  # an empty user's turn, without the row's system prompt
        ({"prompt": SYSTEM}, "harp", "user harp <audio>"),
        ({"prompt": SYSTEM, "negative_prompt": "drum"}, "harp", "user drum <audio>"),
        ({"prompt": SYSTEM, "negative_prompt": None}, "harp", "user harp <audio>"),
        ({"prompt": SYSTEM, "negative_prompt": SYSTEM[:1]}, "harp", "system slow <audio>"),
        ({"prompt": "a tune"}, None, ""),
        ({"prompt": "a tune"}, "harp", "harp"),
    ],
)
def test_negative_prompts(world, row, default, rendered):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    (ids,) = CausalLMPolicy(tokenizer).negative_prompt_ids([row], default)
    expected = tokenizer(rendered, add_special_tokens=isinstance(row["prompt"], str))["input_ids"]
    assert ids == expected


def test_the_null_prompt_of_a_tokenizer_that_adds_nothing_is_bos(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.backend_tokenizer.post_processor = None
    assert CausalLMPolicy(tokenizer).negative_prompt_ids([{"prompt": "a"}], None) == [[tokenizer.bos_token_id]]
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no unconditional input for guidance"):
        CausalLMPolicy(tokenizer).negative_prompt_ids([{"prompt": "a"}], None)

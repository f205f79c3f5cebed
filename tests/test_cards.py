"""What the card of a trained model says: of which weights, of which evaluation sets, and how to sample."""

import copy

from datasets import Dataset
from test_trainer import make_trainer, rows

from trl_drcd.cards import final_metrics, shared_system_prompt

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}tune{% endif %}"
)


def test_the_card_is_of_the_best_model_if_that_was_loaded(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_diversity_coef", greater_is_better=False,
        diversity_warmup_steps=3, eval_dataset=rows(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 3
    assert "| steps | 1 |" in card and "| last (step 1) |" in card and "step 3" not in card


def test_the_metrics_of_several_evaluation_sets_stand_apart(tmp_path, tokenizer):
    sets = {"short": rows().select(range(2)), "long": rows().select(range(2, 4))}
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=2, eval_strategy="steps", eval_steps=1, eval_on_start=True, embedder=None,
        diversity_coef=0.0, eval_dataset=sets,
    )  # fmt: skip
    trainer.train()
    found = final_metrics(trainer.state.log_history, held_out=True)
    assert list(found) == [f"{name}, {which}" for name in sets for which in ("first (step 0)", "last (step 2)")]
    logged = [entry for entry in trainer.state.log_history if "eval_long_loss" in entry]
    assert found["long, last (step 2)"]["kl"] == logged[-1]["eval_kl"] != found["short, last (step 2)"]["kl"]


def test_the_card_says_how_prompts_were_read(tmp_path, tokenizer, model):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    system, user = {"role": "system", "content": "slow drum"}, {"role": "user", "content": "a tune"}
    chats = Dataset.from_dict({"prompt": [[system, user]] * 8})
    for name, data, wanted in (("chat", chats, True), ("text", rows(), False)):
        trainer = make_trainer(
            tmp_path / name, tokenizer, model, data, embedder=None, diversity_coef=0.0,
            chat_template_kwargs={"enable_thinking": False},
        )  # fmt: skip
        trainer.save_model(str(tmp_path / name))
        card = (tmp_path / name / "README.md").read_text()
        assert ('[{"role": "system", "content": "slow drum"}, {"role": "user"' in card) == wanted
        assert ('return_tensors="pt", enable_thinking=False)' in card) == wanted
        assert ("| system_prompt | slow drum |" in card) == wanted and ("inputs = tokenizer(" in card) != wanted


def test_a_system_turn_of_parts_is_no_system_prompt_of_the_card():
    parts = {"role": "system", "content": [{"type": "text", "text": "slow"}]}
    text = {"role": "system", "content": "slow"}
    assert shared_system_prompt([[parts], [parts]]) is None
    assert shared_system_prompt([[text], [text]]) == "slow"
    assert shared_system_prompt([[text], [{"role": "user", "content": "slow"}]]) is None
    assert shared_system_prompt(["slow", "slow"]) is None and shared_system_prompt([]) is None


def test_one_evaluation_set_has_no_name(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, eval_strategy="steps", eval_steps=1, embedder=None, diversity_coef=0.0,
        eval_dataset=rows(),
    )  # fmt: skip
    trainer.train()
    assert list(trainer.final_metrics()) == ["first (step 1)", "last (step 1)"]

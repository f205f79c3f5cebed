"""Reward models and cross-encoders of tiny size with random weights, made by the libraries' own classes."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl import RLOOConfig, RLOOTrainer

from tests.conftest import make_model
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.checks import check_parts
from trl_drcd.evaluation.digests import content_digest
from trl_drcd.text.reward_models import RewardModel, cross_encoder, question_of

CHAT_TEMPLATE = "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("reward")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert(folder, tokenizer, num_labels: int):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_rewards_are_those_that_trl_would_train_on(reward_folder, tokenizer, tmp_path):
    judge = RewardModel.from_pretrained(reward_folder)
    judge.batch_size = 4
    words = tokenizer.convert_ids_to_tokens(range(6, 12))
    prompts, completions = [f"{w} " for w in words], [" ".join(words[: i + 1]) for i in range(6)]
    rewards = judge(prompts=prompts, completions=completions)
    make_model(tokenizer).save_pretrained(tmp_path / "policy")
    args = RLOOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = RLOOTrainer(
        str(tmp_path / "policy"), str(reward_folder), args, Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )  # fmt: skip
    rows = [{"prompt": prompt} for prompt in prompts]
    expected = trainer._calculate_rewards(rows, prompts, completions, [[0]] * 6)[:, 0]
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-5, rtol=0)


def test_conversations_go_through_the_chat_template(reward_folder, tokenizer):
    judge = RewardModel.from_pretrained(reward_folder)
    judge.tokenizer.chat_template = CHAT_TEMPLATE
    conversation = [{"role": "user", "content": "harp"}]
    assert judge.text_of(conversation, "flute") == "user harp assistant flute "
    assert judge.text_of(conversation, [{"role": "assistant", "content": "flute"}]) == "user harp assistant flute "
    assert judge([conversation], ["flute"]) == judge(["user harp "], ["assistant flute "])


def test_cross_encoder_scores_pairs(tokenizer, tmp_path):
    folder = bert(tmp_path, tokenizer, 1)
    words = tokenizer.convert_ids_to_tokens(range(6, 10))
    expected = CrossEncoder(folder).predict([(words[0], words[1]), (words[2], words[3])])
    score = cross_encoder(folder)
    got = score([words[0], [{"role": "user", "content": words[2]}]], [words[1], words[3]])
    torch.testing.assert_close(got, torch.from_numpy(expected).float())
    assert got[0] != got[1]


def test_classifiers_are_refused(tokenizer, tmp_path):
    folder = bert(tmp_path, tokenizer, 3)
    with pytest.raises(ValueError, match=r"`reward_model=.*` must have one output, got 3"):
        RewardModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"`cross_encoder=.*` must have one output, got 3"):
        cross_encoder(folder)


def test_judges_of_text_pass_the_checks_before_an_evaluation(reward_folder, tokenizer, tmp_path):
    """As their libraries save them; a cross-encoder has a modules.json of its own."""
    encoder = CrossEncoder(bert(tmp_path / "bert", tokenizer, 1))
    encoder.save_pretrained(str(tmp_path / "encoder"))
    assert (tmp_path / "encoder" / "modules.json").is_file()
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    judges = {"reward_model": str(reward_folder), "cross_encoder": str(tmp_path / "encoder")}
    check_parts(EvaluateArguments(str(tmp_path / "model"), "none", **judges), content_digest)
    assert cross_encoder(tmp_path / "encoder")(["a slow tune"], ["harp"]).shape == (1,)


def test_a_cross_encoder_that_names_code_is_refused(tokenizer, tmp_path):
    folder = bert(tmp_path, tokenizer, 1)
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "os.path.Module"}]')
    with pytest.raises(ValueError, match=r"names a module of type 'os\.path\.Module' in modules\.json"):
        cross_encoder(folder)


def test_the_question_of_a_conversation_is_its_last_user_turn():
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant")]
    assert question_of("text") == "text" and question_of(turns) == "USER"
    assert question_of(turns[:1]) == "SYSTEM"  # nobody has asked anything

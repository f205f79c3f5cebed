"""What the check before the first update refuses, and that a right model passes it unnoticed."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import make_model
from datasets import Dataset
from peft import AdaLoraConfig, LilyConfig, LoraConfig, PolyConfig, PveraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from test_trainer import make_trainer, rollout, rows
from torch._dynamo import OptimizedModule
from transformers import AutoModelForCausalLM, GPTNeoConfig

from trl_drcd.validation import self_check

sys.path.insert(0, str(Path(__file__).parent / "families"))

from tiny import REFUSED, make


def first_update(tmp_path, tokenizer, **kwargs):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, embedder=None, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)])
def test_a_right_model_passes_and_nothing_is_drawn(tmp_path, tokenizer, monkeypatch, peft_config):
    """The check is made once, sees distances of rounding, and leaves the random state as it was."""
    distances = []
    own = self_check._Check.distance
    monkeypatch.setattr(
        self_check._Check, "distance", staticmethod(lambda *a: (distances.append(own(*a)), distances[-1])[1])
    )
    checked = first_update(tmp_path, tokenizer, peft_config=peft_config)
    rounding = [distance for distance in distances if abs(distance) < 1e-5]
    assert len(rounding) == len(distances) == 2 or (len(rounding) == 4 and max(distances) > self_check.MOVED)
    monkeypatch.setattr("trl_drcd.trainer.check_scoring", lambda *args: True)
    unchecked = first_update(tmp_path / "unchecked", tokenizer, peft_config=peft_config)
    for ours, theirs in zip(checked.model.parameters(), unchecked.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_without_a_scored_token_are_left_out(tmp_path, tokenizer):
    """`mask_truncated_completions` masks all of a completion; where all are masked the next rollout is looked at."""
    trainer = make_trainer(tmp_path, tokenizer, embedder=None)
    batch = rollout(trainer)
    check = trainer.policy, trainer.teacher, trainer.model_wrapped
    mask = batch["completion_mask"]
    assert not self_check.check_scoring(*check, batch | {"completion_mask": torch.zeros_like(mask)}, True)
    one = torch.zeros_like(mask)
    one[3] = mask[3]
    assert self_check.check_scoring(*check, batch | {"completion_mask": one}, True)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3)
    with pytest.raises(ValueError, match=r"the frozen copy, is .* nats per token away"):
        self_check.check_scoring(*check, batch | {"completion_mask": one}, True)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_scored_wrong_are_refused(tmp_path, tokenizer, name):
    with pytest.raises(ValueError, match=f"`model`: the training scores are .*{REFUSED[name]}"):
        first_update(tmp_path, tokenizer, model=make(name))


@pytest.mark.parametrize("name", [name for name in REFUSED if "padding" in REFUSED[name]])
def test_padding_is_looked_at_with_prompts_of_one_length_too(tmp_path, tokenizer, name):
    """The null prompt beside them is padded."""
    data = rows().select([0]).repeat(8)
    with pytest.raises(ValueError, match="left padding changes its output"):
        first_update(tmp_path / "guided", tokenizer, model=make(name), dataset=data)
    if name == "bart":
        first_update(tmp_path, tokenizer, model=make(name), dataset=data, guidance_scale=1.0)


def test_a_family_whose_states_are_not_those_of_the_whole_sequence_is_refused(tmp_path, tokenizer):
    data = rows().select([0]).repeat(8)  # without padding it is scored as it should be
    with pytest.raises(ValueError, match=r"the sampler draws tokens at log-probabilities .* nats away"):
        first_update(tmp_path, tokenizer, model=make("rwkv"), dataset=data, guidance_scale=1.0)


def test_a_teacher_of_a_family_that_is_scored_wrong_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`teacher`: the loss reads it .* away from its own forward pass"):
        first_update(tmp_path / "bert", tokenizer, teacher=make("bert", vocab_size=len(tokenizer)))
    first_update(tmp_path, tokenizer, teacher=make_model(tokenizer, seed=1))


def test_what_differs_in_training_mode_is_refused(tmp_path, tokenizer):
    class Noise(torch.nn.Module):
        def forward(self, hidden):
            return hidden + torch.randn_like(hidden) if self.training else hidden

    model = make_model(tokenizer)
    model.model.norm = torch.nn.Sequential(model.model.norm, Noise())
    with pytest.raises(ValueError, match="its output differs between training and evaluation mode"):
        first_update(tmp_path, tokenizer, model=model)


def test_a_teacher_that_is_not_the_student_is_refused(tmp_path, tokenizer, monkeypatch):
    """Whatever the configuration of the adapter says."""
    monkeypatch.setattr("trl_drcd.validation.before_loading._check_adapter", lambda *args: None)
    for name, config in {"pissa": LoraConfig(r=2, init_lora_weights="pissa"), "trained": LoraConfig(r=2)}.items():
        model = get_peft_model(make_model(tokenizer), config)
        if name == "trained":
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(parameter, std=0.5)
        with pytest.raises(ValueError, match=r"the base with its adapter off, is .* nats per token away"):
            first_update(tmp_path / name, tokenizer, model=model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'`, which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights='pissa_niter_4'`"),
        ({"init_lora_weights": "olora"}, "`init_lora_weights='olora'`"),
        ({"init_lora_weights": False}, "`init_lora_weights=False`"),
        ({"bias": "all"}, "`bias='all'`, which trains biases of the base"),
        ({"bias": "lora_only"}, "`bias='lora_only'`"),
        ({"layer_replication": [(0, 2), (0, 2)]}, r"`layer_replication=.*makes another model of the base"),
        ({"trainable_token_indices": {"lm_head": [5]}}, "trains rows of the output head"),
    ],
)
def test_adapters_that_change_the_base_are_refused_by_name(tmp_path, tokenizer, config, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(r=2, **config))


def test_rows_of_a_tied_embedding_and_other_kinds_of_adapters_are_refused_by_name(tmp_path, tokenizer):
    tied = make_model(tokenizer, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="of a tied embedding too"):
        make_trainer(tmp_path, tokenizer, model=tied, peft_config=LoraConfig(r=2, trainable_token_indices=[5, 6]))
    with pytest.raises(ValueError, match="`peft_config` of type PolyConfig needs task ids"):
        make_trainer(tmp_path, tokenizer, peft_config=PolyConfig(r=2, target_modules=["q_proj"]))


IN_Q = {"r": 2, "target_modules": ["q_proj"]}
UNSEEN_AT_FIRST = {
    "alora_invocation_tokens": (
        LoraConfig(**IN_Q, task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
        "turns the adapter on at a token",
    ),
    "AdaLoraConfig": (AdaLoraConfig(target_modules=["q_proj"], total_step=9), "allocates its ranks in calls"),
    "PveraConfig": (PveraConfig(**IN_Q), "draws noise in training"),
    "LilyConfig": (LilyConfig(**IN_Q), "mixes positions and sequences"),
    "kasa_config": (LoraConfig(**IN_Q, kasa_config=KasaConfig()), "changes the base, and with it the teacher"),
    "monteclora_config": (LoraConfig(**IN_Q, monteclora_config=MontecloraConfig()), "draws noise in training"),
}


@pytest.mark.parametrize("name", UNSEEN_AT_FIRST)
def test_adapters_with_no_effect_at_first_that_are_scored_wrong_later_are_refused_by_name(tmp_path, tokenizer, name):
    config, reason = UNSEEN_AT_FIRST[name]
    with pytest.raises(ValueError, match=f"`peft_config` .*{name}.* {reason}"):
        make_trainer(tmp_path, tokenizer, peft_config=config)


@pytest.mark.parametrize("name", ["alora_invocation_tokens", "PveraConfig", "LilyConfig"])
def test_the_check_finds_what_an_adapter_does_once_it_is_trained(tmp_path, tokenizer, monkeypatch, name):
    """Whatever its kind, with other values than those it starts with; its weights get these back."""
    for names in ("OTHER_PEFT", "OTHER_LORA"):
        monkeypatch.setattr(f"trl_drcd.validation.before_loading.{names}", {})
    config, _ = UNSEEN_AT_FIRST[name]
    if name == "alora_invocation_tokens":
        config.alora_invocation_tokens = tokenizer(rows()["prompt"][0])["input_ids"][:1]  # of every prompt
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, embedder=None, peft_config=config)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`peft_config`: with other values .* nats per token away from the"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_noise_is_added_to_the_adapter_alone_and_not_where_it_is_sharded(tokenizer):
    class Sharded(torch.nn.Parameter):
        pass

    model = get_peft_model(make_model(tokenizer), LoraConfig(r=2, modules_to_save=["norm"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with self_check._other_adapter(model) as add_noise:
        add_noise(0.1)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "lora_" in name}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with self_check._other_adapter(make_model(tokenizer)) as add_noise:
        assert add_noise is None
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj.lora_A.default"))
    layer.weight = Sharded(layer.weight.detach())
    with self_check._other_adapter(model) as add_noise:
        assert add_noise is None


def test_a_teacher_that_moves_with_the_adapter_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(self_check, "use_adapter", lambda model, name: nullcontext())  # it stays on
    with pytest.raises(ValueError, match=r"the base with its adapter off, moves by .* with the adapter's"):
        first_update(tmp_path, tokenizer, peft_config=LoraConfig(r=2))


def test_a_base_that_would_be_trained_with_its_adapter_is_refused(tmp_path, tokenizer):
    model = get_peft_model(make_model(tokenizer), LoraConfig(r=2, modules_to_save=["norm"]))
    make_trainer(tmp_path, tokenizer, model=model)  # a copy is trained, and off with the adapter
    model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trainable weight of its base, base_model\.model\.lm_head\.weight"):
        make_trainer(tmp_path, tokenizer, model=model)


def test_reentrant_checkpointing_of_all_weights_is_refused(tmp_path, tokenizer):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="'use_reentrant': True}` does not work with the training of all weights"):
        make_trainer(tmp_path, tokenizer, **settings)
    first_update(tmp_path, tokenizer, peft_config=LoraConfig(r=2), **settings)


def test_a_compiled_model_learns_what_the_model_itself_does(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("trl_drcd.policies.causal_lm.shared_refusal", lambda model: "one forward in both: bit for bit")
    plain = first_update(tmp_path, tokenizer)
    compiled = first_update(tmp_path, tokenizer, torch_compile=True, torch_compile_backend="eager")
    assert isinstance(compiled.model_wrapped, OptimizedModule)
    compiled.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for ours, own in zip(saved.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, own)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_turns_that_are_no_text_are_refused(tmp_path, tokenizer, kind):
    turns = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "slow"}]}]
    with pytest.raises(ValueError, match=f"column `prompt` of `train_dataset` has a part of type '{kind}' in row 0"):
        make_trainer(tmp_path, tokenizer, dataset=Dataset.from_dict({"prompt": [turns] * 4}))


def test_images_and_router_losses_are_refused_by_name(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`train_dataset` has a column `image`"):
        make_trainer(tmp_path, tokenizer, dataset=rows(image=[None] * 16))
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef=0.1` has no effect"):
        make_trainer(tmp_path, tokenizer, model=make("mixtral"), router_aux_loss_coef=0.1)


def test_prompts_that_fill_the_positions_are_not_padded_beyond_them(tmp_path, tokenizer):
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_layers=2, num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=12, window_size=4, embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    data = rows().select([0]).repeat(8)
    length = len(tokenizer(data[0]["prompt"])["input_ids"])
    first_update(tmp_path, tokenizer, model=model, dataset=data, max_completion_length=12 - length)


def test_a_teacher_in_half_precision_is_not_held_to_the_rounding_of_float32(tmp_path, tokenizer):
    teacher = make_model(tokenizer, seed=1).to(torch.bfloat16)
    trainer = first_update(tmp_path, tokenizer, teacher=teacher)
    check = self_check._Check(trainer.policy, trainer.teacher, trainer.model)
    assert check.tolerance_of(trainer.teacher.copy) == self_check.HALF_TOLERANCE > check.tolerance


def test_a_sampler_that_draws_from_another_distribution_is_refused(tmp_path, tokenizer, monkeypatch):
    """Scores are right here, and only the sampler reads its cache one position off."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, embedder=None)
    own = trainer.policy.rollout

    def shifted(model, prompt_ids, *args, **kwargs):
        return own(model, [ids[:-1] + ids[-2:-1] for ids in prompt_ids], *args, **kwargs)

    monkeypatch.setattr(trainer.policy, "rollout", shifted)
    with pytest.raises(ValueError, match=r"`model`: the sampler draws tokens at log-probabilities .* nats away"):
        trainer.train()


def test_the_sampled_log_probabilities_are_those_at_the_temperature(tmp_path, tokenizer):
    """At temperature 0.5 they differ from the model's own, which alone is no error."""
    first_update(tmp_path, tokenizer, temperature=0.5)


def test_a_tokenizer_with_token_types_samples_what_is_scored(tmp_path, tokenizer):
    """TRL would pass them on to `generate`; the loss knows nothing of them."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['content'] }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": row["prompt"]}] for row in rows()]})
    trainer = first_update(tmp_path, tokenizer, dataset=data, model=make("gpt2", vocab_size=len(tokenizer)))
    assert trainer._scoring_checked and trainer._tokenize_prompts(list(data["prompt"]))[1:] == (None, {})


def test_a_rollout_in_parts_is_not_compared(tmp_path, tokenizer):
    """`trainer.sample` is public: what it gave last need not be the whole rollout."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, embedder=None)
    own = trainer.sample
    trainer.sample = lambda prompt_ids: [own([ids])[0] for ids in prompt_ids]
    trainer.train()
    assert trainer._scoring_checked and trainer._sampler.taken() is None

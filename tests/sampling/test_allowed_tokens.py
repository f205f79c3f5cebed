"""`allowed_token_ids`: sampling, loss, evaluation and the saved folder against the model's own logits in float64."""

import json

import pytest
import torch
from conftest import make_model
from families import OTHERS, make
from peft import LoraConfig
from test_grid import judged  # noqa: F401
from test_trainer import make_trainer, rollout, settings
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM, pipeline

from trl_drcd.evaluation.grid import EvaluateArguments, evaluate
from trl_drcd.evaluation.likelihood import log_likelihoods, teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.guidance import guide_logits, left_pad
from trl_drcd.losses import guided_logits
from trl_drcd.merging import interpolate_checkpoints
from trl_drcd.policies import CausalLMPolicy, policy_for
from trl_drcd.policies.allowed import resolve_token_ids
from trl_drcd.validation.token_ids import as_entries

ALLOWED = [2, 5, 6, 8, 9, 10]  # </s> and some words of 13 tokens
ENTRIES = ["</s>", "a..slow", "8..10"]  # the same


def own_logits(model, prefix, completion):
    """Of the whole vocabulary, by the model's own forward on one row without padding."""
    return model(torch.tensor([prefix + completion])).logits[0, len(prefix) - 1 : -1]


def over_allowed(logits, temperature):
    """log_softmax of the whole vocabulary in which all other tokens have -inf."""
    forbidden = torch.ones(logits.shape[-1], dtype=torch.bool)
    forbidden[ALLOWED] = False
    return (logits.masked_fill(forbidden, -torch.inf) / temperature).log_softmax(-1)


def unpadded(batch, i):
    prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
    return prompt, batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()


# ---------------------------------------------------------------- what is given


@pytest.mark.parametrize(
    ("given", "entries"),
    [
        (None, None),
        (range(32, 1056), ["32..1055"]),
        ([2, *range(5, 9), 11], ["2", "5..8", "11"]),
        (["5..8", 2, "</s>"], ["5..8", "2", "</s>"]),
        ("5..8", ["5..8"]),
        ([3, 2, 1], ["3", "2", "1"]),
    ],
)
def test_lists_ranges_and_names_become_entries(given, entries, tmp_path):
    assert as_entries(given) == entries
    assert settings(tmp_path, allowed_token_ids=given).allowed_token_ids == entries


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "must not be empty"),
        ([-1], ValueError, "at least 0, got -1"),
        ([1.5], TypeError, "must hold numbers or texts, got 1.5"),
        ([True], TypeError, "got True"),
        ({"a": 1}, TypeError, "must be a list"),
        (7.5, TypeError, "must be a list, got 7.5"),
    ],
)
def test_other_values_are_refused(given, error, message, tmp_path):
    with pytest.raises(error, match=message):
        settings(tmp_path, allowed_token_ids=given)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["5..99"], "vocabulary ends at 12"),
        (["nothing", "2"], "'nothing' is not a token"),
        (["9..5"], "swap its ends"),
        (["5..8"], r"none of the ids that end a completion, \[2\]"),
        (["2"], "at least two tokens"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(entries, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, allowed_token_ids=entries)


def test_names_and_numbers_are_the_same_tokens(tokenizer):
    for given in (ENTRIES, as_entries(ALLOWED)):
        assert resolve_token_ids(given, tokenizer, 13, [2]).tolist() == ALLOWED


@pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching"])
def test_samplers_that_do_not_know_them_are_refused(name, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}=True` samples in TRL"):
        make_trainer(tmp_path, tokenizer, allowed_token_ids=ENTRIES, **{name: True})


def test_nor_may_they_sample_a_model_that_suppresses_tokens_itself(tokenizer, tmp_path):
    model = make_model(tokenizer)
    model.generation_config.suppress_tokens = [3]
    with pytest.raises(ValueError, match="does not know the `suppress_tokens` of the model's generation config"):
        make_trainer(tmp_path, tokenizer, model, cache_implementation="dynamic")


# ---------------------------------------------------------------- sampling


def test_what_is_sampled_is_allowed_and_scored_so(tokenizer):
    model = make_model(tokenizer).double()
    policy = CausalLMPolicy(tokenizer, allowed_token_ids=torch.tensor(ALLOWED))
    for scale in (1.0, 3.0):
        prompts, nulls = [[1, 7, 4], [1, 8, 9, 4]] * 20, [[1, 4]] * 40
        out = policy.rollout(model, prompts, nulls, scale, 0.9, 6, [2])
        found = torch.isin(out.ids, torch.tensor(ALLOWED)) | ~out.drawn
        assert found.all() and len(out.ids[out.drawn].unique()) == len(ALLOWED)
        for row, prompt in enumerate(prompts[:6]):
            completion = out.ids[row, :, 0][out.drawn[row, :, 0]].tolist()
            z = own_logits(model, prompt, completion)
            z = guide_logits(z, own_logits(model, [1, 4], completion), scale)
            expected = over_allowed(z, 0.9).gather(1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(out.log_probs[row, :, 0][: len(completion)], expected)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gemma2, softcap and windows", "opt, no position_ids"])
def test_other_classes_sample_and_score_over_them(name):
    """ACE-Step's LM is a Qwen 3, YuE a Llama; a soft cap makes guidance need both heads."""
    if name == "qwen3":
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Qwen3Config(vocab_size=13, num_key_value_heads=2, head_dim=8, initializer_range=0.3, **sizes)
        model = Qwen3ForCausalLM(config).eval()
    else:
        model = make(name)
    prompts = [[1, 7, 4], [1, 8, 9, 4]] * 3
    policy = CausalLMPolicy(None, allowed_token_ids=torch.tensor(ALLOWED))
    out = policy.rollout(model, prompts, [[1, 4]] * 6, 3.0, 0.9, 5, [])
    completions = out.ids[..., 0]
    streams = [
        policy.hidden_states(model, *left_pad(given, 0), completions, torch.ones_like(completions))
        for given in (prompts, [[1, 4]] * 6)
    ]
    (head,) = policy.heads(model)
    ours = guided_logits(head, *(hidden.flatten(0, 1) for hidden in streams), 3.0)(slice(None)) / 0.9
    for row, completion in enumerate(completions.tolist()):
        z = guide_logits(own_logits(model, prompts[row], completion), own_logits(model, [1, 4], completion), 3.0)
        expected = over_allowed(z, 0.9)
        scored = ours.log_softmax(-1).unflatten(0, completions.shape)[row]
        torch.testing.assert_close(scored, expected[:, ALLOWED], rtol=0, atol=1e-4)
        sampled = expected.gather(1, completions[row][:, None])[:, 0]
        torch.testing.assert_close(out.log_probs[row, :, 0], sampled, rtol=0, atol=1e-4)


def test_sampling_through_generate_draws_allowed_tokens_alone():
    model = make(next(iter(OTHERS)))
    policy = CausalLMPolicy(None, allowed_token_ids=torch.tensor(ALLOWED))
    out = policy.rollout(model, [[1, 4]] * 30, max_new_tokens=4, eos_token_ids=[2])
    assert torch.isin(out.ids[out.drawn], torch.tensor(ALLOWED)).all()
    expected = over_allowed(model(torch.tensor([[1, 4]])).logits[0, -1:], 1.0)[0]
    torch.testing.assert_close(out.log_probs[:, 0, 0], expected[out.ids[:, 0, 0]], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the loss


def dense_terms(student, teacher, batch, tokenizer, scale=3.0, temperature=0.99):
    """KL, log p and entropy of each sequence over the allowed tokens, from logits of the whole vocabulary."""
    null, kls, log_ps, entropies = tokenizer("")["input_ids"], [], [], []
    for i in range(len(batch["prompt_ids"])):
        prompt, completion = unpadded(batch, i)
        with torch.no_grad():
            z = guide_logits(own_logits(teacher, prompt, completion), own_logits(teacher, null, completion), scale)
        log_q = over_allowed(z, temperature)[:, ALLOWED]
        log_p = over_allowed(own_logits(student, prompt, completion), temperature)[:, ALLOWED]
        kls.append((log_p.exp() * (log_p - log_q)).sum())
        entropies.append(-(log_p.exp() * log_p).sum())
        places = torch.tensor([ALLOWED.index(token) for token in completion])
        log_ps.append(log_p.gather(1, places[:, None]).sum())
    return torch.stack(kls), torch.stack(log_ps), torch.stack(entropies)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_equal_the_dense_reference(tmp_path, tokenizer, tied):
    model = make_model(tokenizer, tie_word_embeddings=tied)
    trainer = make_trainer(tmp_path, tokenizer, model, diversity_coef=7.0, allowed_token_ids=ENTRIES)
    student = trainer.model
    batch = rollout(trainer)  # with the check of the scores against the model's own forward
    assert torch.isin(batch["completion_ids"][batch["completion_mask"].bool()], torch.tensor(ALLOWED)).all()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trainer.compute_loss(student, batch).backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}
    metrics = trainer._metrics["train"]
    student.zero_grad()
    teacher = make_model(tokenizer, tie_word_embeddings=tied).double()
    kl, log_p, entropy = dense_terms(student.double(), teacher, batch, tokenizer)
    assert metrics["kl"][-1] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["entropy"][-1] == pytest.approx((entropy.sum() / batch["completion_mask"].sum()).item(), rel=1e-4)
    (kl.mean() - 7.0 * (batch["diversity_advantages"] * log_p).mean()).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name].double(), parameter.grad, rtol=1e-3, atol=1e-4)
    if not tied:
        others = [token for token in range(13) if token not in ALLOWED]
        assert not ours["lm_head.weight"][others].any() and ours["lm_head.weight"][ALLOWED].any()


def test_a_completion_with_another_token_is_refused(tokenizer):
    policy = CausalLMPolicy(tokenizer, allowed_token_ids=torch.tensor(ALLOWED))
    ids, mask = torch.tensor([[5, 2, 0]]), torch.tensor([[1, 1, 0]])
    assert policy.ids_and_mask(ids, mask)[0][0, :2, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"tokens \[7\], which `allowed_token_ids` does not"):
        policy.ids_and_mask(torch.tensor([[5, 7, 0]]), mask)


# ---------------------------------------------------------------- what is saved


def restricted(folder, model):
    """Probabilities of the first token that `generate` draws with the folder's generation config."""
    config = GenerationConfig.from_pretrained(folder)
    out = model.generate(
        torch.tensor([[1, 7, 4]]), generation_config=config, max_new_tokens=1, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.scores[0][0].softmax(-1)


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_folder_samples_over_them_by_itself(tmp_path, tokenizer, lora):
    base = make_model(tokenizer)
    base.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0) if lora else None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", tokenizer, model, allowed_token_ids=ENTRIES, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    others = [token for token in range(13) if token not in ALLOWED]
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == others
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    p = restricted(folder, reloaded)
    with torch.no_grad():
        expected = over_allowed(reloaded(torch.tensor([[1, 7, 4]])).logits[0, -1], 0.99).exp()
    torch.testing.assert_close(p, expected)
    # A run that goes on from the folder, and whoever builds a policy from it, keeps them
    in_memory = policy_for(trainer.model, tokenizer)
    assert in_memory.allowed.on("cpu").tolist() == ALLOWED
    if lora:
        return
    assert policy_for(reloaded, tokenizer).allowed.on("cpu").tolist() == ALLOWED
    again = make_trainer(tmp_path / "again", tokenizer, reloaded)
    assert again.policy.allowed.on("cpu").tolist() == ALLOWED
    sample = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    texts = {sample("a slow", max_new_tokens=5, return_full_text=False)[0]["generated_text"] for _ in range(5)}
    assert set(" ".join(texts).split()) <= {tokenizer.convert_ids_to_tokens(token) for token in ALLOWED}
    interpolate_checkpoints([folder, folder], [0.5, 0.5], tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").suppress_tokens == others


# ---------------------------------------------------------------- evaluation


def test_evaluation_terms_are_over_them(tokenizer):
    base, student = make_model(tokenizer, 0).double(), make_model(tokenizer, 1).double()
    allowed = torch.tensor(ALLOWED)
    samples = sample_prompts(
        student, tokenizer, ["a slow tune", "harp"], 3, max_new_tokens=6, allowed_token_ids=allowed
    )
    assert {token for ids in samples.token_ids for token in ids} <= set(ALLOWED)
    terms = teacher_terms(student, base, tokenizer, samples, 3.0, temperature=0.9)
    policy = samples.policy(student, tokenizer)
    batch = {"prompt_ids": [torch.tensor(ids) for ids in samples.prompt_ids(policy)], "completion_ids": []}
    batch["prompt_mask"] = [torch.ones_like(ids) for ids in batch["prompt_ids"]]
    batch["completion_ids"] = [torch.tensor(ids) for ids in samples.token_ids]
    batch["completion_mask"] = [torch.ones_like(ids) for ids in batch["completion_ids"]]
    with torch.no_grad():
        kl, _, entropy = dense_terms(student, base, batch, tokenizer, 3.0, 0.9)
        _, log_p, _ = dense_terms(student, base, batch, tokenizer, 3.0, 1.0)
    torch.testing.assert_close(terms.kl.double(), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    found = log_likelihoods(student, policy, samples, samples.prompt_ids(policy))
    torch.testing.assert_close(found.double(), log_p, rtol=1e-5, atol=1e-5)


@pytest.fixture
def evaluation(tokenizer, tmp_path):
    """Arguments of an evaluation of a base and a model of it that suppresses tokens."""
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    distilled = make_model(tokenizer, 1)
    distilled.generation_config.suppress_tokens = [token for token in range(13) if token not in ALLOWED]
    distilled.save_pretrained(tmp_path / "distilled")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a slow tune"}\n{"prompt": "harp"}\n')
    rows = [{"name": "base"}, {"name": "CFG", "guidance_scale": 3}]
    rows.append({"name": "distilled", "model": str(tmp_path / "distilled")})
    settings = {"num_prompts": 2, "samples_per_prompt": 4, "max_new_tokens": 5, "output_dir": str(tmp_path / "out")}
    return [str(tmp_path / "base"), str(tmp_path / "p.jsonl"), rows], settings


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("entries", [None, ENTRIES])
def test_all_rows_of_an_evaluation_sample_over_them(evaluation, tokenizer, tmp_path, entries):
    given, settings = evaluation
    results = evaluate(EvaluateArguments(*given, **settings, allowed_token_ids=entries))
    words = {tokenizer.convert_ids_to_tokens(token) for token in ALLOWED}
    texts = [file.read_text() for file in (tmp_path / "out" / "samples").rglob("*.txt")]
    assert len(texts) == 12 and set(" ".join(texts).split()) <= words
    assert results[1].metrics["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    everything = EvaluateArguments(*given, **settings, allowed_token_ids=["0..12"])
    kl = {row.name: row.metrics["kl"]["mean"] for row in evaluate(everything)}
    assert kl["distilled"] != pytest.approx(results[2].metrics["kl"]["mean"], rel=0.01)


def test_models_that_suppress_different_tokens_need_the_argument(evaluation, tmp_path):
    given, settings = evaluation
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "distilled")
    other.generation_config.suppress_tokens = [3]
    other.save_pretrained(tmp_path / "other")
    given[2].append({"name": "other", "model": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="suppress different tokens; give `allowed_token_ids`"):
        evaluate(EvaluateArguments(*given, **settings))

"""
What holds for every model family: subclass [`PolicyContract`] in a test file of the family, and pytest does the rest.

A subclass says how to make a small random model, whose logits should be spread, and a tokenizer; see
`test_contract.py`. The model is compared with its own forward on rows without padding, in float64.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer
from trl_drcd.compat.trl_private import use_adapter
from trl_drcd.evaluation.likelihood import log_likelihoods, right_pad, teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.guidance import EarlySteps, guide_logits, left_pad
from trl_drcd.heads import stack_logits
from trl_drcd.merging import hold_checkpoints, interpolate_checkpoints, set_interpolation_weight
from trl_drcd.policies import policy_for
from trl_drcd.sampling import static_cache
from trl_drcd.validation.model_folders import load_model

PROMPTS = ["a slow tune for flute", "harp"]
NEGATIVE = "fast drum"
TEMPERATURE = 0.9


class PolicyContract:
    """The suite; the attributes and the two functions are the family's."""

    steps = 8
    """S of the completions."""
    longest_delay = 0
    """Of the codebooks, steps."""
    lora_targets = ["q_proj", "v_proj"]
    """Linear layers that may have an adapter."""

    def make_tokenizer(self) -> Any:
        """Tokenizer of the prompts; knows the words of [`PROMPTS`] and [`NEGATIVE`]."""
        raise NotImplementedError

    def make_model(self, tokenizer: Any, seed: int) -> Any:
        """A small random model."""
        raise NotImplementedError

    # ------------------------------------------------------------ fixtures and helpers

    @pytest.fixture
    def tokenizer(self) -> Any:
        return self.make_tokenizer()

    @pytest.fixture
    def model(self, tokenizer: Any) -> Any:
        model = self.make_model(tokenizer, 0).double().eval()
        policy_for(model, tokenizer).prepare(model)
        return model

    @pytest.fixture
    def policy(self, model: Any, tokenizer: Any) -> Any:
        return policy_for(model, tokenizer)

    def prompts(self, policy: Any, count: int = 4) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompts of different lengths, and of their negative prompts."""
        rows = [{"prompt": PROMPTS[i % len(PROMPTS)]} for i in range(count)]
        own = [row | {"negative_prompt": row["prompt"]} for row in rows]
        return policy.negative_prompt_ids(own, None), policy.negative_prompt_ids(rows, NEGATIVE)

    def drawn(self, policy: Any, model: Any, scale: float = 1.0, early: EarlySteps | None = None) -> Any:
        torch.manual_seed(1)
        prompts = self.prompts(policy)
        return policy.rollout(model, *prompts, scale, TEMPERATURE, self.steps, early=early)

    def test_a_static_cache_draws_the_same(self, policy: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        graphs: list[Any] = []
        traced = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        monkeypatch.setattr(torch, "compile", traced)
        torch.compiler.reset()
        plain, counts = self.drawn(policy, model, 3.0), []
        with static_cache(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for _ in range(3):
                static = self.drawn(policy, model, 3.0)
                assert torch.equal(plain.ids, static.ids)
                torch.testing.assert_close(static.log_probs, plain.log_probs, rtol=0, atol=1e-5)
                counts.append(len(graphs))
        assert counts[0] == counts[-1] <= 1  # one graph, which is not compiled again

    def own(self, policy: Any, model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
        """Logits `(S, K, V)` of the model's own forward."""
        with torch.no_grad():
            return policy.own_logits(model, torch.tensor([prompt]), torch.tensor([completion])).double()

    def scored(self, policy: Any, model: Any, completions: list[list[int]], left: int = 0, right: int = 0) -> Any:
        """Log-probabilities `(N, V)` of the scored codes of all rows, as the loss computes them, and the mask."""
        ids, mask = left_pad(self.prompts(policy)[0], 0)
        ids, mask = (torch.nn.functional.pad(t, (left, 0)) for t in (ids, mask))
        completion = [torch.nn.functional.pad(t, (0, right * policy.num_codebooks)) for t in right_pad(completions)]
        with torch.no_grad():
            hidden = policy.hidden_states(model, ids, mask, *completion)
        _, scored = policy.ids_and_mask(*completion)
        hidden = hidden[:, :, None].expand(-1, -1, policy.num_codebooks, -1) if hidden.ndim == 3 else hidden
        heads = policy.heads(model)
        logits = stack_logits([head.logits(hidden[:, :, k].flatten(0, 1)) for k, head in enumerate(heads)])
        return logits.unflatten(0, scored.shape[:2])[scored].detach().log_softmax(-1), scored

    def own_scored(self, policy: Any, model: Any, completions: list[list[int]]) -> torch.Tensor:
        """The same from [`own`], each row without padding."""
        parts = []
        for prompt, completion in zip(self.prompts(policy)[0], completions, strict=True):
            _, mask = policy.ids_and_mask(*right_pad([completion]))
            parts.append(self.own(policy, model, prompt, completion)[mask[0]])
        return torch.cat(parts).log_softmax(-1)

    def log_likelihoods(self, policy: Any, model: Any, completions: list[list[int]]) -> torch.Tensor:
        """Of each completion, by its own prompt, in the float64 of the model."""
        terms, start = self.own_scored(policy, model, completions), 0
        sums = []
        for completion in completions:
            ids, mask = policy.ids_and_mask(*right_pad([completion]))
            count = int(mask.sum())
            sums.append(terms[start : start + count].gather(1, ids[mask][:, None]).sum())
            start += count
        return torch.stack(sums)

    # ------------------------------------------------------------ the suite

    def test_scores_are_those_of_the_models_own_forward(self, policy, model):
        """Prompts of different lengths in one batch, in training mode as in evaluation mode."""
        completions = self.drawn(policy, model).completions()
        expected = self.own_scored(policy, model, completions)
        assert expected[expected.isfinite()].std() > 0.05, "logits that are all alike would test nothing"
        for training in (False, True):
            model.train(training)
            found, _ = self.scored(policy, model, completions)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)

    def test_hidden_states_know_the_past_alone(self, policy, model):
        """From a step on with other codes, those before stay, and with them the first codebook's of that step."""
        rows = sorted(map(torch.tensor, self.drawn(policy, model).completions()), key=len, reverse=True)
        step, one = 1, rows[0]
        start = step * policy.num_codebooks
        other = next(row for row in rows[1:] if not torch.equal(row[start:][:1], one[start:][:1]))
        end = min(len(one), len(other)) // policy.num_codebooks * policy.num_codebooks
        assert end > start + policy.num_codebooks
        changed = torch.cat([one[:start], other[start:end]])
        prompt = torch.tensor([self.prompts(policy)[0][0]])
        hidden = [
            policy.hidden_states(model, prompt, torch.ones_like(prompt), ids[None, :end], torch.ones(1, end).long())
            for ids in (one, changed)
        ]
        first = [states if states.ndim == 3 else states[:, :, 0] for states in hidden]
        torch.testing.assert_close(first[0][:, : step + 1], first[1][:, : step + 1], rtol=0, atol=1e-8)
        torch.testing.assert_close(hidden[0][:, :step], hidden[1][:, :step], rtol=0, atol=1e-8)
        assert not torch.allclose(first[0][:, step + 1 :], first[1][:, step + 1 :], atol=1e-4)

    def test_the_first_whole_frame(self, policy):
        assert policy.first_frame_steps == 1 + self.longest_delay

    def test_padding_changes_nothing(self, policy, model):
        completions = self.drawn(policy, model).completions()
        plain, mask = self.scored(policy, model, completions)
        padded, wider = self.scored(policy, model, completions, left=3, right=2)
        torch.testing.assert_close(padded, plain, rtol=0, atol=1e-8)
        assert wider.shape[1] == mask.shape[1] + 2 and wider.sum() == mask.sum() == len(plain)

    @pytest.mark.parametrize(
        ("scale", "early"), [(1.0, None), (3.0, None), (3.0, EarlySteps(3)), (3.0, EarlySteps(2, 0.5))]
    )
    def test_what_is_sampled_is_what_is_scored(self, policy, model, scale, early):
        """Log-probabilities of a rollout against Eq. (1) on the model's own logits; guided, late, and not."""
        out = self.drawn(policy, model, scale, early)
        assert out.finite.all() and out.ids.shape[2] == policy.num_codebooks
        prompts, negatives = self.prompts(policy)
        for row, completion in enumerate(out.completions()):
            cond, uncond = (self.own(policy, model, given[row], completion) for given in (prompts, negatives))
            logits = guide_logits(cond, uncond, scale)
            if early is not None:
                logits[: early.count] = guide_logits(cond, uncond, early.guidance_scale)[: early.count]
            ids, mask = policy.ids_and_mask(*right_pad([completion]))
            assert torch.equal(mask[0], out.drawn[row, : mask.shape[1]])
            log_p = (logits / TEMPERATURE).log_softmax(-1)[mask[0]].gather(1, ids[mask][:, None])[:, 0]
            found = out.log_probs[row, : mask.shape[1]][mask[0]]
            torch.testing.assert_close(found.double(), log_p, rtol=0, atol=1e-5)

    def test_sampling_repeats_with_a_seed_and_does_not_change_the_model(self, policy, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        first, second = (self.drawn(policy, model, 3.0) for _ in range(2))
        assert torch.equal(first.ids, second.ids) and len(first.ids[first.drawn].unique()) > 2
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_evaluation_scores_it_too(self, policy, model, tokenizer):
        """KL to itself with the same guidance is 0, to another it is not, and log-likelihoods are the model's own."""
        given = {"samples_per_prompt": 2, "max_new_tokens": self.steps, "negative_prompt": NEGATIVE}
        late = sample_prompts(model, tokenizer, PROMPTS, guidance_scale=3.0, early=EarlySteps(self.steps), **given)
        plain = sample_prompts(model, tokenizer, PROMPTS, **given)
        assert late.token_ids == plain.token_ids, "guidance that never starts is no guidance"
        samples = sample_prompts(model, tokenizer, PROMPTS, guidance_scale=3.0, **given)
        itself = {"model_guidance_scale": 3.0, "negative_prompt": NEGATIVE, "model_negative_prompt": NEGATIVE}
        terms = teacher_terms(model, model, tokenizer, samples, 3.0, **itself)
        torch.testing.assert_close(terms.kl, torch.zeros(4), rtol=0, atol=1e-4)
        other = teacher_terms(model, model, tokenizer, samples, 1.0, **itself)
        assert (other.kl > 0.01).all() and (other.entropy > 0).all()
        early = [None, EarlySteps(3), EarlySteps(self.steps)]
        kl = [teacher_terms(model, model, tokenizer, samples, 3.0, **itself, model_early=e).kl for e in early]
        assert 1e-4 < kl[1].sum() < kl[2].sum() - 1e-4 and (kl[1] <= kl[2] + 1e-4).all(), "only steps before it differ"
        kept = copy.copy(samples)
        kept.samples_per_prompt, kept.prompts = 1, [PROMPTS[i % 2] for i in range(4)]
        found = log_likelihoods(model, policy, kept, self.prompts(policy)[0])
        torch.testing.assert_close(
            found.double(), self.log_likelihoods(policy, model, kept.token_ids), rtol=1e-5, atol=1e-4
        )

    def test_a_saved_folder_has_all_that_is_needed(self, policy, model, tokenizer, tmp_path):
        completions = self.drawn(policy, model).completions()
        model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
        policy.save_extras(model, tmp_path)
        again = load_model(tmp_path).double().eval()
        assert type(policy_for(again, tokenizer)) is type(policy)
        torch.testing.assert_close(
            self.scored(policy, again, completions)[0],
            self.scored(policy, model, completions)[0],
            rtol=0,
            atol=1e-5,  # a few classes keep buffers in float32
        )

    def test_with_its_adapter_off_it_is_the_base(self, policy, model):
        completions = self.drawn(policy, model).completions()
        base, _ = self.scored(policy, model, completions)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=self.lora_targets, lora_dropout=0))
        policy.prepare(peft)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        assert not torch.allclose(self.scored(policy, peft, completions)[0], base, atol=1e-3)
        torch.testing.assert_close(
            self.scored(policy, peft, completions)[0],
            self.own_scored(policy, peft, completions),
            rtol=0,
            atol=1e-8,
        )
        with use_adapter(peft, None):
            torch.testing.assert_close(self.scored(policy, peft, completions)[0], base, rtol=0, atol=1e-10)

    @pytest.fixture
    def ends(self, tokenizer, tmp_path):
        """Two saved models, and their average in float64."""
        models = [self.make_model(tokenizer, seed) for seed in (0, 1)]
        models[1].load_state_dict(
            {
                name: tensor if name.startswith("audio_encoder") else models[0].state_dict()[name].lerp(tensor, 0.3)
                for name, tensor in models[1].state_dict().items()
                if tensor.is_floating_point()
            },
            strict=False,
        )
        if hasattr(models[0], "audio_encoder"):
            models[1].audio_encoder.load_state_dict(models[0].audio_encoder.state_dict())
        for number, model in enumerate(models):
            policy_for(model, tokenizer).save_extras(model, tmp_path / str(number))
            model.generation_config.guidance_scale = None
            model.save_pretrained(tmp_path / str(number)), tokenizer.save_pretrained(tmp_path / str(number))
        mean = copy.deepcopy(models[0]).double().eval()
        mean.load_state_dict(
            {
                name: tensor.double().lerp(models[1].state_dict()[name].double(), 0.25)
                for name, tensor in models[0].state_dict().items()
                if tensor.is_floating_point()
            },
            strict=False,
        )
        return [str(tmp_path / str(number)) for number in (0, 1)], mean

    def test_merges_are_the_average_of_the_weights(self, policy, ends, tmp_path):
        folders, mean = ends
        completions = self.drawn(policy, mean).completions()
        expected, _ = self.scored(policy, mean, completions)
        model = load_model(folders[0]).double().eval()
        hold_checkpoints(model, folders)
        set_interpolation_weight(model, 0.25)
        torch.testing.assert_close(self.scored(policy, model, completions)[0], expected, rtol=0, atol=1e-5)
        interpolate_checkpoints(folders, [0.75, 0.25], tmp_path / "merged")
        merged = load_model(tmp_path / "merged").double().eval()
        torch.testing.assert_close(self.scored(policy, merged, completions)[0], expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("lora", [False, True])
    def test_it_trains(self, tokenizer, tmp_path, lora):
        """Two updates with guidance and a reward; the trainer's own check of its scores runs on the first rollout."""

        def embed(completions: list[Any]) -> torch.Tensor:
            numbers = [[1.0, float(len(str(c))), float(hash(str(c)) % 97)] for c in completions]
            return torch.tensor(numbers)

        args = CFGDistillDiversityConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=1,
            max_completion_length=self.steps, logging_steps=1, report_to="none", save_strategy="no", bf16=False,
            use_cpu=True, diversity_coef=1.0, diversity_credit="sequence", diversity_warmup_steps=0,
            negative_prompt=NEGATIVE, gradient_checkpointing=False, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = CFGDistillDiversityTrainer(
            self.make_model(tokenizer, 0),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
            processing_class=tokenizer,
            embedder=embed,
            peft_config=LoraConfig(r=2, target_modules=self.lora_targets, lora_dropout=0) if lora else None,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "kl" in entry]
        assert len(logged) == 2 and all(entry["kl"] > 0.01 for entry in logged)
        after = dict(trainer.model.named_parameters())
        assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
        trainer.save_model()
        assert (tmp_path / "README.md").is_file()

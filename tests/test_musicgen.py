"""MusicGen: its policy against transformers' own `generate`, and the trainer on a tiny random model."""

import copy
import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from test_trainer import rows, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    EncodecConfig,
    EncodecFeatureExtractor,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    pipeline,
)
from trl import RLOOTrainer

from trl_drcd import CFGDistillDiversityTrainer
from trl_drcd.audio.codecs import CodebookCodec, delay, is_coded, undelay
from trl_drcd.diversity import diversity_advantages
from trl_drcd.evaluation.likelihood import teacher_terms
from trl_drcd.evaluation.sampling import sample_prompts
from trl_drcd.guidance import guide_logits, left_pad
from trl_drcd.losses import reverse_kl
from trl_drcd.policies import MusicgenPolicy, policy_class, policy_for
from trl_drcd.policies.musicgen import LORA_TARGETS
from trl_drcd.reliability.batches import BadBatchError
from trl_drcd.sampling import draw

BOOKS, SIZE, STEPS = 3, 8, 9
PROMPTS = ["a slow tune for flute", "fast drum", "harp", "a fast tune for harp"]
WORDS = ["a", "slow", "fast", "tune", "for", "flute", "harp", "drum"]


def make_t5_tokenizer():
    """`words </s>`, padded on the right, as T5's; it has more tokens than a codebook."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def t5_tokenizer():
    return make_t5_tokenizer()


def config_of(channels=1, width=32, rate=80):
    encodec = EncodecConfig(
        sampling_rate=rate, hidden_size=8, num_filters=2, upsampling_ratios=[2, 4], codebook_size=SIZE,
        num_lstm_layers=1, target_bandwidths=[0.0015 * rate],
    )  # fmt: skip
    text = T5Config(vocab_size=11, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1)
    decoder = MusicgenDecoderConfig(
        vocab_size=SIZE, hidden_size=width, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, dropout=0.1,
        num_codebooks=BOOKS * channels, audio_channels=channels, pad_token_id=SIZE, bos_token_id=SIZE,
        max_position_embeddings=64,
    )  # fmt: skip
    return MusicgenConfig(text_encoder=text, audio_encoder=encodec, decoder=decoder)


def make_musicgen(seed=0, **kwargs):
    """A random MusicGen whose logits are spread, with the generation settings of the published checkpoints."""
    torch.manual_seed(seed)
    model = MusicgenForConditionalGeneration(config_of(**kwargs)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("audio_encoder"):
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * (3 if "lm_heads" in name else 1))
    for layer in model.audio_encoder.quantizer.layers:
        torch.nn.init.normal_(layer.codebook.embed)
    model.generation_config = GenerationConfig(
        do_sample=True, guidance_scale=3.0, max_length=1500, pad_token_id=SIZE, bos_token_id=SIZE,
        decoder_start_token_id=SIZE,
    )  # fmt: skip
    return model


@pytest.fixture
def musicgen():
    return make_musicgen()


@contextmanager
def recorded_codes(model):
    """The codes that `generate` gives to the codec, `(1, B, K, T)` in a list."""
    seen, own = [], model.audio_encoder.decode

    def decode(codes, *args, **kwargs):
        seen.append(codes)
        return own(codes, *args, **kwargs)

    with mock.patch.object(model.audio_encoder, "decode", decode):
        yield seen


def drawn_as_ours(probabilities, num_samples):
    """Stands in for `torch.multinomial`, by the inverse of the distribution function."""
    uniform = torch.rand(len(probabilities), dtype=torch.float64)
    return draw(probabilities.log(), uniform).tokens[:, None]


def prompt_tensors(tokenizer, prompts):
    return left_pad([tokenizer(p)["input_ids"] for p in prompts], 0)


# ------------------------------------------------------------------------------------------------ the delayed layout


def test_delayed_layout_is_that_of_generate(musicgen):
    codes = torch.randint(SIZE, (2, STEPS - BOOKS + 1, BOOKS))
    delayed = delay(codes, SIZE)
    assert delayed.shape == (2, STEPS, BOOKS)
    assert torch.equal(undelay(delayed), codes)
    assert torch.equal(delayed != SIZE, is_coded(STEPS, BOOKS).expand(2, -1, -1))
    # transformers' pattern has one begin token more, and -1 where codes are to be filled in
    begin = torch.full((2 * BOOKS, 1), SIZE)
    _, pattern = musicgen.decoder.build_delay_pattern_mask(begin, SIZE, max_length=STEPS + 1)
    theirs = pattern.view(2, BOOKS, -1)[..., 1:].transpose(1, 2)
    assert torch.equal(theirs == -1, delayed != SIZE)


def test_scored_are_the_codes_alone(t5_tokenizer, musicgen):
    policy = policy_for(musicgen, t5_tokenizer)
    completion = delay(torch.randint(SIZE, (2, STEPS - BOOKS + 1, BOOKS)), SIZE).flatten(1)
    padded = torch.nn.functional.pad(completion, (0, 2))  # as TRL may pad, with an id that is a code
    mask = torch.nn.functional.pad(torch.ones_like(completion), (0, 2))
    ids, scored = policy.ids_and_mask(padded, mask)
    assert ids.shape == scored.shape == (2, STEPS, BOOKS)
    assert torch.equal(scored, is_coded(STEPS, BOOKS).expand(2, -1, -1))
    assert ids[scored].max() < SIZE
    mask[0, BOOKS * 4 :] = 0
    assert policy.ids_and_mask(padded, mask)[1][0, 4:].sum() == 0


def test_codec_decodes_as_generate_does(t5_tokenizer, musicgen):
    codec = policy_for(musicgen, t5_tokenizer).codec(musicgen)
    with recorded_codes(musicgen) as codes:
        inputs = t5_tokenizer(PROMPTS, padding=True, return_tensors="pt")
        audio = musicgen.generate(**inputs, max_new_tokens=STEPS)
    delayed = delay(codes[0][0].transpose(1, 2), SIZE).flatten(1).tolist()
    for mine, theirs in zip(CodebookCodec(codec.audio_encoder, BOOKS, SIZE, 3).decode(delayed), audio, strict=True):
        assert mine[1] == 80
        torch.testing.assert_close(mine[0], theirs[0])
    with pytest.raises(ValueError, match="mask id 8 is at the position of a code"):
        codec.decode([delayed[0] + [SIZE] * BOOKS])
    with pytest.raises(ValueError, match="S \\* 3"):
        codec.decode([delayed[0][:-1]])


# ------------------------------------------------------------------------------------------------ against generate


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("width", [32, 16])  # with and without a projection between encoder and decoder
def test_samples_equal_those_of_generate(t5_tokenizer, guidance_scale, width):
    """The same random state draws the same codes, from prompts of unequal length; theirs are padded on the right."""
    musicgen = make_musicgen(width=width)
    policy = policy_for(musicgen, t5_tokenizer)
    with recorded_codes(musicgen) as codes, mock.patch("torch.multinomial", drawn_as_ours):
        inputs = t5_tokenizer(PROMPTS, padding=True, return_tensors="pt")
        torch.manual_seed(5)
        musicgen.generate(
            **inputs, guidance_scale=guidance_scale, temperature=0.9, top_k=0, max_new_tokens=STEPS
        )  # fmt: skip
    torch.manual_seed(5)
    ids = [t5_tokenizer(p)["input_ids"] for p in PROMPTS]
    null = policy.negative_prompt_ids([{"prompt": p} for p in PROMPTS], None)
    mine = policy.rollout(musicgen, ids, null, guidance_scale, 0.9, STEPS).completions()
    assert torch.equal(torch.tensor(mine), delay(codes[0][0].transpose(1, 2), SIZE).flatten(1))


def test_sampling_is_the_same_in_training_mode_with_checkpointing(t5_tokenizer, musicgen):
    """There transformers turns the cache off, without which each step would see itself alone."""
    policy, samples = policy_for(musicgen, t5_tokenizer), []
    musicgen.gradient_checkpointing_enable({"use_reentrant": False})
    for training in (False, True):
        torch.manual_seed(0)
        samples.append(policy.rollout(musicgen.train(training), [[4, 7, 1]] * 2, max_new_tokens=STEPS).completions())
        assert musicgen.training is training
    assert samples[0] == samples[1]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_log_probs_equal_those_of_generates_steps(t5_tokenizer, musicgen, guidance_scale):
    """Teacher-forced, every code of every codebook: `uncond + g * (cond - uncond)` of the same logits."""
    policy = policy_for(musicgen, t5_tokenizer)
    with recorded_codes(musicgen) as codes:
        inputs = t5_tokenizer(PROMPTS, padding=True, return_tensors="pt")
        output = musicgen.generate(
            **inputs, guidance_scale=guidance_scale, temperature=0.9, top_k=0, max_new_tokens=STEPS,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    theirs = torch.stack(output.scores, 1).unflatten(0, (len(PROMPTS), BOOKS)).transpose(1, 2).log_softmax(-1)
    completion = delay(codes[0][0].transpose(1, 2), SIZE).flatten(1)
    completion = completion, torch.ones_like(completion)

    def logits(prompt_ids, prompt_mask):
        hidden = policy.hidden_states(musicgen, prompt_ids, prompt_mask, *completion)
        return torch.stack([head.logits(hidden) for head in policy.heads(musicgen)], 2)

    null = left_pad(policy.negative_prompt_ids([{"prompt": p} for p in PROMPTS], None), 0)
    assert null[0].shape == (len(PROMPTS), 0)
    cond, uncond = logits(*prompt_tensors(t5_tokenizer, PROMPTS)), logits(*null)
    mine = ((uncond + guidance_scale * (cond - uncond)) / 0.9).log_softmax(-1)
    ids, scored = policy.ids_and_mask(*completion)
    assert scored.sum() == len(PROMPTS) * BOOKS * (STEPS - BOOKS + 1)
    for k in range(BOOKS):
        valid = scored[..., k]
        torch.testing.assert_close(mine[:, :, k][valid], theirs[:, :, k][valid], rtol=1e-4, atol=1e-4)
        assert ids[..., k][valid].max() < SIZE
    assert (cond - uncond).abs().max() > 0.5, "a null condition that changes nothing would test nothing"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_what_is_sampled_is_what_is_scored(t5_tokenizer, musicgen, guidance_scale, packed, monkeypatch):
    """Prompts that come more than once are encoded once; null conditions beside negative prompts."""
    monkeypatch.setattr("trl_drcd.sampling.packed.LASTING", 0 if packed else STEPS)
    monkeypatch.setattr("trl_drcd.sampling.packed.LEAST_ROWS", 1)
    policy = policy_for(musicgen, t5_tokenizer)
    texts = [PROMPTS[0]] * 3 + [PROMPTS[1]] + [PROMPTS[0]]
    rows = [{"prompt": text, "negative_prompt": "slow drum" if n % 2 else None} for n, text in enumerate(texts)]
    prompts, negatives = [t5_tokenizer(text)["input_ids"] for text in texts], policy.negative_prompt_ids(rows, None)
    encoded = []
    hook = musicgen.text_encoder.register_forward_hook(lambda *args: encoded.append(len(args[2][0])))
    torch.manual_seed(0)
    rollout = policy.rollout(musicgen, prompts, negatives, guidance_scale, 0.9, STEPS)
    hook.remove()
    assert encoded == [2 if guidance_scale == 1 else 4]
    completion = torch.tensor(rollout.completions())
    ids, mask = policy.ids_and_mask(completion, torch.ones_like(completion))
    assert torch.equal(mask, rollout.drawn) and torch.equal(ids, rollout.ids)
    with torch.no_grad():
        streams = [
            policy.hidden_states(musicgen, *left_pad(side, 0), completion, torch.ones_like(completion))
            for side in (prompts, negatives)
        ]
    for k, head in enumerate(policy.heads(musicgen)):
        cond, uncond = (head.logits(hidden.flatten(0, 1)) for hidden in streams)
        log_p = (guide_logits(cond, uncond, guidance_scale) / 0.9).log_softmax(-1).view(len(texts), STEPS, -1)
        for row, step in mask[..., k].nonzero().tolist():
            scored = log_p[row, step, ids[row, step, k]].item()
            assert rollout.log_probs[row, step, k].item() == pytest.approx(scored, abs=1e-5)


def test_null_condition_is_zeroed_encoder_states(t5_tokenizer, musicgen):
    """As `get_unconditional_inputs`; padding beside it, and what stands under the padding, does not matter."""
    policy = policy_for(musicgen, t5_tokenizer)
    completion = delay(torch.randint(SIZE, (1, 4, BOOKS)), SIZE).flatten(1)
    completion = completion, torch.ones_like(completion)
    empty = torch.zeros(1, 0, dtype=torch.long)
    hidden = policy.hidden_states(musicgen, empty, empty, *completion)
    padded = policy.hidden_states(
        musicgen, torch.tensor([[0, 4, 7]]), torch.zeros(1, 3, dtype=torch.long), *completion
    )
    torch.testing.assert_close(hidden, padded)
    null = musicgen.get_unconditional_inputs(1)
    begin = torch.full((BOOKS, 1), SIZE)
    inputs = torch.cat([begin, completion[0].view(-1, BOOKS).T[:, :-1]], 1)
    theirs = musicgen(
        encoder_outputs=null.encoder_outputs, attention_mask=null.attention_mask, decoder_input_ids=inputs
    ).logits
    mine = torch.cat([head.logits(hidden) for head in policy.heads(musicgen)])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert hidden.isfinite().all()


def test_negative_prompts_are_read_as_prompts(t5_tokenizer, musicgen):
    policy = policy_for(musicgen, t5_tokenizer)
    rows = [{"prompt": "harp"}, {"prompt": "harp", "negative_prompt": "fast drum"}]
    assert policy.negative_prompt_ids(rows, None) == [[], [5, 10, 1]]
    assert policy.negative_prompt_ids(rows, "slow") == [[4, 1], [5, 10, 1]]
    assert policy.negative_prompt_ids(rows, "") == [[1], [5, 10, 1]]
    with pytest.raises(ValueError, match="must be `str`"):
        policy.negative_prompt_ids([{"prompt": [{"role": "user", "content": "harp"}]}], None)


def test_what_is_refused(t5_tokenizer, musicgen, tmp_path):
    config = config_of()
    melody = MusicgenMelodyConfig(
        text_encoder=config.text_encoder, audio_encoder=config.audio_encoder, decoder={"num_codebooks": BOOKS}
    )
    melody.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="melody"):
        policy_class(str(tmp_path))
    policy = policy_for(musicgen, t5_tokenizer)
    with pytest.raises(ValueError, match="too few for the delays of 3 codebooks; give at least 4"):
        policy.rollout(musicgen, [[1]], max_new_tokens=3)
    with pytest.raises(ValueError, match="one entry per prompt"):
        policy.rollout(musicgen, [[1]], None, 3.0, max_new_tokens=STEPS)
    for name, value in {"max_completion_length": 3, "mask_truncated_completions": True, "beta": 0.1}.items():
        with pytest.raises(ValueError, match=name):
            make_trainer(tmp_path, t5_tokenizer, **{name: value})
    with pytest.raises(ValueError, match="tokens and the model 11"):
        bigger = copy.deepcopy(t5_tokenizer)
        bigger.add_tokens(["<more>"])
        make_trainer(tmp_path, bigger)


# ------------------------------------------------------------------------------------------------ the trainer


def loudness(audio):
    """A fixed random projection of the waveform, less its level, which is the same for all of a random codec."""
    waves = torch.stack([waveform - waveform.mean() for waveform, _ in audio])
    return waves @ torch.randn(waves.shape[1], 6, generator=torch.Generator().manual_seed(0)) + 1e-3


def make_trainer(tmp_path, tokenizer, model=None, **kwargs):
    own = {"max_completion_length": STEPS, **kwargs}
    names = ("peft_config", "embedder", "processing_class", "eval_dataset")
    trainer_kwargs = {k: own.pop(k) for k in names if k in own}
    arguments = {"processing_class": tokenizer, "embedder": loudness} | trainer_kwargs
    return CFGDistillDiversityTrainer(
        model=make_musicgen() if model is None else model,
        args=settings(tmp_path, **own),
        train_dataset=rows(),
        **arguments,
    )


def rollout(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS[:2] for _ in range(4)])


def test_trl_alone_fails_on_musicgen(t5_tokenizer, tmp_path):
    """Why there is a policy; if this changes, `MusicgenPolicy.inside_trl` can go."""
    with pytest.raises(ValueError, match="ambiguous"):
        RLOOTrainer(
            make_musicgen(), lambda **kwargs: [0.0], settings(tmp_path), Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=t5_tokenizer,
        )  # fmt: skip


def test_special_tokens_dropout_and_frozen_parts(t5_tokenizer, tmp_path):
    processor = MusicgenProcessor(EncodecFeatureExtractor(), t5_tokenizer)
    trainer = make_trainer(tmp_path, t5_tokenizer, processing_class=processor, max_steps=1)
    assert trainer.processing_class is t5_tokenizer
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    model = trainer.model
    config = model.generation_config
    special = (config.pad_token_id, config.bos_token_id, config.decoder_start_token_id, config.eos_token_id)
    assert special == (SIZE, SIZE, SIZE, None)
    assert (config.guidance_scale, config.top_k, config.do_sample) == (1.0, 0, True)
    assert (model.config.decoder.pad_token_id, model.config.decoder.bos_token_id) == (SIZE, SIZE)
    assert model.config.decoder.eos_token_id is None
    with pytest.raises(ValueError, match="ambiguous"):
        model.config.get_text_config()  # nothing of the patch is left
    trained = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert trained == {name for name in before if name.startswith("decoder.")}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    # One text encoder and one codec for student and teacher, two decoders
    shared = {id(p) for p in model.parameters()} & {id(p) for p in trainer.teacher.copy.parameters()}
    assert shared == {id(p) for name, p in model.named_parameters() if not name.startswith("decoder.")}
    policy, batch = trainer.policy, rollout(trainer)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    modes = [policy.hidden_states(model.train(mode), *(batch[name] for name in names)) for mode in (True, False)]
    assert config_of().decoder.dropout == 0.1, "a model without dropout would test nothing"
    torch.testing.assert_close(*modes)


def test_rollouts_are_without_guidance_and_score_as_sampled(t5_tokenizer, tmp_path):
    """The checkpoint's own `guidance_scale=3` must not reach them; the ratio to the sampling policy is 1."""
    trainer = make_trainer(tmp_path, t5_tokenizer, steps_per_generation=2)
    torch.manual_seed(3)
    batch = rollout(trainer)
    ids = [t5_tokenizer(p)["input_ids"] for p in PROMPTS[:2] for _ in range(4)]
    torch.manual_seed(3)
    alone = trainer.policy.rollout(trainer.model, ids, temperature=0.99, max_new_tokens=STEPS).completions()
    assert batch["completion_ids"].tolist() == alone
    torch.manual_seed(3)
    null = [[]] * len(ids)
    assert alone != trainer.policy.rollout(trainer.model, ids, null, 3.0, 0.99, STEPS).completions()
    terms = trainer.joint_objective.terms(trainer.model, trainer.model, batch)
    assert terms.tokens.tolist() == [BOOKS * (STEPS - BOOKS + 1)] * 8
    torch.testing.assert_close(batch["old_log_probs"], terms.log_probs.detach(), rtol=1e-4, atol=1e-4)


def test_loss_and_gradient_equal_the_dense_reference(t5_tokenizer, tmp_path, monkeypatch):
    """From the whole model's own logits, one sequence at a time, in float64."""
    trainer = make_trainer(tmp_path, t5_tokenizer, diversity_coef=7.0)
    student, policy = trainer.model, trainer.policy
    monkeypatch.setattr("trl_drcd.trainer.check_scoring", lambda *_: None)  # else refused: the student has learned
    with torch.no_grad():
        for parameter in student.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = rollout(trainer)
    trainer.compute_loss(student, batch).backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    metrics = trainer._metrics["train"]
    student.zero_grad()
    teacher, student = make_musicgen().double(), student.double()
    kls, log_ps = [], []
    for row, prompt in enumerate([p for p in PROMPTS[:2] for _ in range(4)]):
        delayed = batch["completion_ids"][row].view(STEPS, BOOKS)
        inputs = torch.cat([torch.full((BOOKS, 1), SIZE), delayed.T[:, :-1]], 1)

        def logits(model, inputs=inputs, **condition):
            return model(decoder_input_ids=inputs, **condition).logits

        text = dict(t5_tokenizer(prompt, return_tensors="pt"))
        null = teacher.get_unconditional_inputs(1)
        null = {"encoder_outputs": null.encoder_outputs, "attention_mask": null.attention_mask}
        guided = guide_logits(logits(teacher, **text), logits(teacher, **null), 3.0)
        z = logits(student, **text)
        valid = is_coded(STEPS, BOOKS).T
        kls.append(reverse_kl(z, guided, 0.99)[valid].sum())
        log_p = (z / 0.99).log_softmax(-1)[valid]
        log_ps.append(log_p.gather(1, delayed.T[valid][:, None]).sum())
    kl, log_p = torch.stack(kls), torch.stack(log_ps)
    advantages = diversity_advantages(loudness(trainer.codec.decode(batch["completion_ids"].tolist())), 4)
    torch.testing.assert_close(batch["diversity_advantages"], advantages)
    assert advantages.abs().max() > 0
    loss = kl.mean() - (7.0 * advantages.double() * log_p).mean()
    loss.backward()
    assert metrics["loss/distillation"][-1] == pytest.approx(kl.mean().item(), rel=1e-4)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name].double(), parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
    assert set(ours) == {name for name, p in student.named_parameters() if p.requires_grad}
    assert policy.num_codebooks == BOOKS


def test_an_update_is_the_same_whether_its_terms_are_logged(t5_tokenizer, tmp_path):
    """All codebooks count alike in the gradient that is taken along with the terms."""
    states = []
    for logging_steps in (1, 10):
        trainer = make_trainer(
            tmp_path / str(logging_steps), t5_tokenizer, max_steps=1, logging_steps=logging_steps, diversity_coef=7.0,
            optim="sgd", learning_rate=1e-3, max_grad_norm=0.0,
        )  # fmt: skip
        start = [p.detach().clone() for p in trainer.model.decoder.parameters()]
        trainer.train()
        after = trainer.model.decoder.parameters()
        states.append([p.detach() - before for p, before in zip(after, start, strict=True)])
    for logged, unlogged in zip(*states, strict=True):
        torch.testing.assert_close(unlogged, logged, rtol=1e-3, atol=1e-6)


def test_embeddings_hear_the_models_own_codec(t5_tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, t5_tokenizer)
    batch = rollout(trainer)
    audio = trainer.codec.decode(batch["completion_ids"].tolist())
    assert trainer.codec.audio_encoder is trainer.model.audio_encoder
    assert audio[0][0].shape == (8 * (STEPS - BOOKS + 1),)
    torch.testing.assert_close(batch["diversity_advantages"], diversity_advantages(loudness(audio), 4))


def test_learns_and_reloads_for_inference(t5_tokenizer, tmp_path):
    """KL to the guided teacher falls; the saved folder samples in a pipeline, without guidance."""
    trainer = make_trainer(
        tmp_path, t5_tokenizer, max_steps=40, learning_rate=3e-3, per_device_train_batch_size=32, guidance_scale=2.0,
        gradient_checkpointing=True, sample_steps=40,
    )  # fmt: skip
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert sum(kl[-5:]) < 0.5 * sum(kl[:5])
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], parameter), name
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "saved"), MusicgenProcessor)
    player = pipeline("text-to-audio", model=str(tmp_path / "saved"))
    with recorded_codes(player.model) as codes, mock.patch("torch.multinomial", drawn_as_ours):
        torch.manual_seed(0)
        sound = player("fast drum", generate_kwargs={"max_new_tokens": STEPS})
    assert sound["sampling_rate"] == 80
    assert sound["audio"].size == 8 * (STEPS - BOOKS + 1)
    torch.manual_seed(0)
    mine = (
        policy_for(reloaded, t5_tokenizer)
        .rollout(reloaded, [t5_tokenizer("fast drum")["input_ids"]], temperature=0.99, max_new_tokens=STEPS)
        .completions()
    )
    assert torch.equal(torch.tensor(mine), delay(codes[0][0].transpose(1, 2), SIZE).flatten(1))


def test_diversity_rises_when_it_is_all_that_counts(t5_tokenizer, tmp_path):
    """Of 512 samples before and after; over four seeds the factor was 1.5 to 2.8, their own spread is 5 %."""
    trainer = make_trainer(
        tmp_path, t5_tokenizer, max_steps=30, learning_rate=1e-3, per_device_train_batch_size=64, guidance_scale=1.0,
        diversity_coef=500.0, max_completion_length=4, per_device_eval_batch_size=256, eval_dataset=rows(32),
    )  # fmt: skip
    before = trainer.evaluate()["eval_diversity"]
    trainer.train()
    assert trainer.evaluate()["eval_diversity"] > 1.2 * before


# ------------------------------------------------------------------------------------------------ adapters


def test_lora_trains_the_decoder_and_its_teacher_has_none(t5_tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules=LORA_TARGETS)
    trainer = make_trainer(tmp_path, t5_tokenizer, peft_config=lora, max_steps=3, learning_rate=1e-2)
    assert trainer.teacher.copy is None
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all(".decoder.model.decoder.layers." in name and "lora_" in name for name in names)
    assert len(names) == 2 * 2 * (4 + 4 + 2)  # A and B; layers; self- and cross-attention, fully connected
    base = make_musicgen()
    trainer.train()
    batch = rollout(trainer)
    policy = trainer.policy
    ids = left_pad(policy.negative_prompt_ids([{"prompt": p} for p in PROMPTS[:2] for _ in range(4)], None), 0)
    completion = batch["completion_ids"], batch["completion_mask"]
    hidden = [policy.hidden_states(base, *prompt, *completion) for prompt in (
        (batch["prompt_ids"], batch["prompt_mask"]), ids)]  # fmt: skip
    _, scored = policy.ids_and_mask(*completion)
    teacher = trainer.teacher.logits(trainer.teacher.heads(trainer.model), batch, scored)
    for k, head in enumerate(policy.heads(base)):
        dense = guide_logits(*(head.logits(h[scored[..., k]]) for h in hidden), 3.0)
        torch.testing.assert_close(teacher(k)(slice(None)), dense, rtol=1e-4, atol=1e-4)
    trained = policy.hidden_states(trainer.model, batch["prompt_ids"], batch["prompt_mask"], *completion)
    assert (trained - hidden[0]).abs().max() > 1e-3
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(make_musicgen(), tmp_path / "adapter").eval()
    again = policy.hidden_states(reloaded, batch["prompt_ids"], batch["prompt_mask"], *completion)
    torch.testing.assert_close(trained, again, rtol=1e-4, atol=1e-4)
    merged = reloaded.merge_and_unload()
    prompt = t5_tokenizer(["harp"], return_tensors="pt")
    sound = merged.generate(**prompt, max_new_tokens=STEPS, guidance_scale=1.0)
    assert sound.shape == (1, 1, 8 * (STEPS - BOOKS + 1))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "q"], ["q_proj", "lm_heads.0"]])
def test_adapters_on_frozen_parts_and_heads_are_refused(t5_tokenizer, tmp_path, targets):
    with pytest.raises(ValueError, match="`target_modules` of the adapter reaches"):
        make_trainer(tmp_path, t5_tokenizer, peft_config=LoraConfig(r=2, target_modules=targets))


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_takes_musicgen(t5_tokenizer, musicgen):
    samples = sample_prompts(musicgen, t5_tokenizer, PROMPTS[:2], 3, 3.0, max_new_tokens=STEPS)
    assert [len(ids) for ids in samples.token_ids] == [STEPS * BOOKS] * 6
    other = make_musicgen(1)
    own = teacher_terms(musicgen, musicgen, t5_tokenizer, samples, 3.0, model_guidance_scale=3.0)
    assert own.kl.abs().max() < 1e-3
    assert own.tokens.tolist() == [BOOKS * (STEPS - BOOKS + 1)] * 6
    assert (own.entropy < own.tokens * math.log(SIZE)).all()
    apart = teacher_terms(other, musicgen, t5_tokenizer, samples, 3.0)
    assert (apart.kl > 1).all()
    assert isinstance(policy_for(musicgen, t5_tokenizer), MusicgenPolicy)


@pytest.mark.parametrize("samples", [True, False])
def test_a_student_that_is_not_finite_is_named(tmp_path, t5_tokenizer, samples):
    """Its second update; NaN in one row of the decoder, as it samples or in the loss."""
    trainer = make_trainer(tmp_path, t5_tokenizer, max_steps=3)

    def poison(module, args, output):
        if trainer.state.global_step == 1 and torch.is_grad_enabled() != samples:
            output.last_hidden_state[-1] = torch.nan
        return output

    trainer.model.decoder.model.register_forward_hook(poison)
    what = "the student's logits are not finite" + " while it samples" * samples
    with pytest.raises(BadBatchError, match=f"After 1 updates: {what} for the prompt '({'|'.join(PROMPTS)})'"):
        trainer.train()

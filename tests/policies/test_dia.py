"""Dia: its policy against transformers' own `generate` and processor, and the trainer on a tiny random model."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig
from test_musicgen import drawn_as_ours
from test_trainer import settings
from tiny_dia import HOP, PROMPTS, PUBLISHED, TINY, Shape, make_dia, make_processor, make_tokenizer
from transformers import AutoProcessor, DiaForConditionalGeneration, DiaProcessor, pipeline
from transformers.generation import logits_process
from trl import RLOOTrainer

from trl_drcd import CFGDistillDiversityTrainer
from trl_drcd.compat.dia import keep_processor
from trl_drcd.diversity import diversity_advantages
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.grid import evaluate
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.guidance import guide_logits, left_pad
from trl_drcd.losses import reverse_kl
from trl_drcd.merging.loading import load_adapter_model
from trl_drcd.policies import DiaPolicy, policy_class, policy_for
from trl_drcd.policies.dia import LORA_TARGETS

SHAPES = pytest.mark.parametrize("shape", [TINY, PUBLISHED], ids=["tiny", "published"])
SCALES = pytest.mark.parametrize("guidance_scale", [1.0, 3.0])


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def generated(model, processor, shape, guidance_scale, **kwargs):
    """What `generate` draws for [`PROMPTS`] with its other filters off; its scale is gamma - 1."""
    inputs = processor(text=PROMPTS, **shape.processor_kwargs)
    given = {"guidance_scale": 1.0 if guidance_scale == 1 else guidance_scale - 1, "temperature": 1.1, "top_p": 1.0}
    given["top_k"] = 0 if guidance_scale == 1 else None
    return model.generate(**inputs, **given, max_new_tokens=shape.steps, **kwargs)


def prompts_of(policy):
    rows = [{"prompt": text} for text in PROMPTS]
    return policy.negative_prompt_ids([row | {"negative_prompt": row["prompt"]} for row in rows], None), rows


def drawn(policy, model, shape, guidance_scale=1.0, temperature=1.1):
    prompts, rows = prompts_of(policy)
    null = policy.negative_prompt_ids(rows, None)
    return policy.rollout(model, prompts, null, guidance_scale, temperature, shape.steps)


def read(policy, completions, steps):
    """What the decoder reads of completions, with the first bos: `generate` returns it. `(B, steps, K)`."""
    flat = torch.full((len(completions), steps * policy.num_codebooks), policy.layout.pad_id)
    for row, ids in zip(flat, completions, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return policy.layout.inputs(flat)


# ------------------------------------------------------------------------------------------------ against generate


@SHAPES
@SCALES
@pytest.mark.parametrize("eos", ["never", "certain"])
def test_codes_equal_those_of_generate(shape, guidance_scale, eos):
    """The same random state draws the same codes where an eos is certain or impossible: there its rule is a draw."""
    model, processor = make_dia(6, shape, eos), make_processor(shape)
    policy = policy_for(model, keep_processor(processor))
    with mock.patch("torch.multinomial", drawn_as_ours):
        torch.manual_seed(5)
        theirs = generated(model, processor, shape, guidance_scale)
    torch.manual_seed(5)
    rollout = drawn(policy, model, shape, guidance_scale)
    assert torch.equal(read(policy, rollout.completions(), theirs.shape[1]), theirs)
    ended = (rollout.ids[..., 0] == shape.eos).any(1)
    if eos == "never":
        assert not ended.any() and theirs.shape[1] == shape.steps + 1
        assert rollout.drawn.sum() == len(PROMPTS) * shape.books * shape.frames
    else:
        lengths = (rollout.ids[..., 0] < shape.eos).sum(1)
        assert ended.any() and len(lengths.unique()) > 1, "without an eos its layout is not tested"


@contextmanager
def eos_is_drawn():
    """
    In place of the rule for the eos, a draw: what is sampled in training.

    `generate` looks at the arg max of the scores to see an eos, so the draw leaves one score that is not -inf.
    """

    def call(self, input_ids, scores):
        scores = scores.view(-1, self.num_channels, scores.shape[-1]).clone()
        scores[:, 1:, self.eos_id :] = -torch.inf
        scores[:, 0, self.eos_id + 1 :] = -torch.inf
        tokens = drawn_as_ours(scores.flatten(0, 1).softmax(-1), 1)
        return torch.full_like(scores.flatten(0, 1), -torch.inf).scatter(1, tokens, 0.0)

    with (
        mock.patch.object(logits_process.DiaEOSChannelFilterLogitsProcessor, "__call__", call),
        mock.patch("torch.multinomial", lambda probabilities, num_samples: probabilities.argmax(-1, keepdim=True)),
    ):
        yield


@SCALES
@pytest.mark.parametrize("shape", [TINY, Shape([0, 8, 9], 8, 18), Shape([0, 0, 1], 8, 9)], ids=str)
def test_codes_equal_those_of_generate_with_a_drawn_eos(shape, guidance_scale):
    """Sequences of many lengths, with gaps between codebooks, and with a codebook that has no delay."""
    lengths = set()
    for seed in range(4):
        model, processor = make_dia(seed, shape), make_processor(shape)
        policy = policy_for(model, keep_processor(processor))
        with eos_is_drawn():
            torch.manual_seed(seed)
            theirs = generated(model, processor, shape, guidance_scale)
        torch.manual_seed(seed)
        rollout = drawn(policy, model, shape, guidance_scale)
        assert torch.equal(read(policy, rollout.completions(), theirs.shape[1]), theirs)
        lengths |= set((rollout.ids[..., 0] < shape.eos).sum(1).tolist())
    assert len(lengths) > 3, lengths


@SHAPES
@SCALES
def test_logits_equal_those_of_generates_steps(shape, guidance_scale):
    """Of both streams, the unconditional one on zeros, at every position that is scored."""
    model, processor = make_dia(6, shape, "certain"), make_processor(shape)
    policy = policy_for(model, keep_processor(processor))
    torch.manual_seed(0)
    output = generated(model, processor, shape, guidance_scale, output_logits=True, return_dict_in_generate=True)
    streams = 1 if guidance_scale == 1 else 2
    theirs = torch.stack(output.logits, 1).unflatten(0, (streams, len(PROMPTS), shape.books)).transpose(2, 3)
    steps = output.sequences[:, 1:]
    past = torch.arange(steps.shape[1])[:, None] - torch.tensor(shape.delays)
    frames = (steps[..., 0] < shape.eos).sum(1)[:, None, None]
    ended = (frames < shape.frames) & (past == frames) & (torch.arange(shape.books) == 0)
    mine = steps.where((past >= 0) & (past < frames) | ended, shape.pad).flatten(1)
    ids, scored = policy.ids_and_mask(mine, torch.ones_like(mine))
    assert torch.equal(scored.sum((1, 2)), frames.flatten() * shape.books + (frames.flatten() < shape.frames))
    prompts, rows = prompts_of(policy)
    for stream, given in enumerate([prompts, policy.negative_prompt_ids(rows, None)][:streams]):
        with torch.no_grad():
            hidden = policy.hidden_states(model, *left_pad(given, 0), mine, torch.ones_like(mine))
            for k, head in enumerate(policy.heads(model)):
                allowed = theirs[stream][:, :, k][scored[..., k]][:, : shape.size + (k == 0)]
                torch.testing.assert_close(head.logits(hidden[scored[..., k]]), allowed, rtol=1e-4, atol=2e-3)
    assert (ids[scored] == shape.eos).sum() == (frames < shape.frames).sum()


@SHAPES
def test_sounds_equal_those_of_the_processor(shape):
    """Of unequal lengths; transformers cannot decode one without a frame, which is a hop of silence here."""
    for seed in range(3):
        model, processor = make_dia(seed, shape), make_processor(shape)
        policy = policy_for(model, keep_processor(processor))
        torch.manual_seed(seed)
        completions = [ids for ids in drawn(policy, model, shape).completions() if ids[0] < shape.eos]
        theirs = processor.batch_decode(read(policy, completions, shape.steps + 1), **shape.processor_kwargs)
        for (waveform, rate), their in zip(policy.codec(model).decode(completions), theirs, strict=True):
            assert rate == 80 and waveform.dtype == torch.float32
            torch.testing.assert_close(waveform, their)


def test_beginnings_of_a_completion_are_decoded_too(tokenizer):
    codec = policy_for(make_dia(), tokenizer).codec(make_dia())
    codes = torch.randint(TINY.size, (5, 3))
    steps = torch.full((8, 3), TINY.pad)
    for k, late in enumerate(TINY.delays):
        steps[late : late + 5, k] = codes[:, k]
    assert torch.equal(codec.to_codes(steps.flatten().tolist()), codes)
    for length in range(8):
        assert torch.equal(codec.to_codes(steps[:length].flatten().tolist()), codes[: max(0, length - 3)])
    silence = [TINY.eos, TINY.pad, TINY.pad]
    ((waveform, _),) = codec.decode([silence])
    assert torch.equal(waveform, torch.zeros(HOP))
    with pytest.raises(ValueError, match="S \\* 3 ids, got 23"):
        codec.to_codes([0] * 23)
    steps[3, 2] = TINY.pad
    with pytest.raises(ValueError, match="the id 9 is at the position of a code, below 8"):
        codec.to_codes(steps.flatten().tolist())


# ------------------------------------------------------------------------------------------------ what is scored


def test_scored_are_the_codes_and_a_drawn_eos(tokenizer):
    """By hand: two frames and an eos; padded as TRL does, with an id that is a code."""
    policy = policy_for(make_dia(), tokenizer)
    e, p, b = TINY.eos, TINY.pad, TINY.bos
    steps = torch.tensor([[1, p, p], [2, p, p], [e, 3, p], [p, 4, 5], [p, p, 6]])
    flat = torch.nn.functional.pad(steps.flatten()[None], (0, 6))
    mask = (torch.arange(21) < 15).long()[None]
    ids, scored = policy.ids_and_mask(flat, mask)
    assert torch.equal(scored[0, :5], steps != p) and not scored[0, 5:].any() and torch.equal(ids[0, :5], steps)
    inputs = [[b, b, b], [1, b, b], [2, b, b], [e, 3, b], [p, 4, 5], [p, e, 6], [p, p, e]]
    assert policy.layout.inputs(flat).tolist() == [inputs]
    forced = steps.clone()
    forced[2, 0] = p  # the end by length is not drawn, and read all the same
    assert policy.layout.inputs(forced.flatten()[None]).tolist() == [inputs[:5]]
    assert policy.ids_and_mask(forced.flatten()[None], torch.ones(1, 15))[1].sum() == 6
    assert [len(head.weight) for head in policy.heads(make_dia())] == [9, 8, 8]


def test_null_prompts_are_zeros_of_the_prompts_length(tokenizer):
    policy = policy_for(make_dia(), tokenizer)
    rows = [{"prompt": "[S1] é"}, {"prompt": "a", "negative_prompt": "[S2]"}, {"prompt": "a", "teacher_prompt": "abc"}]
    assert policy.negative_prompt_ids(rows, None) == [[0] * 4, [2], [0] * 3]
    assert policy.negative_prompt_ids(rows, "b") == [[98], [2], [98]]
    samples = Samples(["a"], [[0]], 1, 1.0, teacher_prompts=["abc"])
    assert samples.negative_prompt_ids(policy, None) == [[0] * 3]
    assert samples.prompt_ids(policy, guided=True) == [[97, 98, 99]]


def test_what_is_refused(tokenizer, tmp_path):
    model = make_dia()
    policy = policy_for(model, tokenizer)
    for row in (
        {"prompt": [{"role": "user", "content": "a"}]},
        {"prompt": ""},
        {"prompt": "a", "negative_prompt": ""},
    ):
        with pytest.raises(ValueError, match="must be `str` and not empty"):
            policy.negative_prompt_ids([row], None)
    for steps in (4, 65):
        with pytest.raises(
            ValueError, match=f"={steps}` counts decoder steps: give 5 .* to 64 .*, 4 more than frames"
        ):
            policy.rollout(model, [[1]], max_new_tokens=steps)
    with pytest.raises(ValueError, match="one entry per prompt"):
        policy.rollout(model, [[1]], None, 3.0, max_new_tokens=TINY.steps)
    with pytest.raises(ValueError, match="must start with 0"):
        policy_for(make_dia(shape=Shape([1, 2, 3])), tokenizer)
    with pytest.raises(ValueError, match="the codec of `processing_class` has 3 codebooks of 4 codes"):
        policy_for(model, make_tokenizer(Shape(size=4))).codec(model)
    for name, value in {
        "max_completion_length": 4, "mask_truncated_completions": True, "allowed_token_ids": ["0..7"]
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            make_trainer(tmp_path, tokenizer, **{name: value})
    for adapter in (LoraConfig, LoHaConfig):
        with pytest.raises(ValueError, match="reaches logits_dense"):
            make_trainer(tmp_path, tokenizer, peft_config=adapter(r=2, target_modules="all-linear"))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("column", ["audio", "audio_prompt"])
def test_a_voice_to_clone_is_refused_with_and_without_guidance(tokenizer, tmp_path, guidance_scale, column):
    texts = Dataset.from_dict({"prompt": PROMPTS})
    voices = Dataset.from_dict({"prompt": PROMPTS, column: PROMPTS})
    for train, evals, name in (
        (voices, None, "train_dataset"),
        (texts, voices, "eval_dataset"),
        (texts, {"held_out": voices.to_iterable_dataset()}, "held_out"),
    ):
        args = settings(tmp_path, max_completion_length=TINY.steps, guidance_scale=guidance_scale)
        with pytest.raises(ValueError, match=f"`{name}` has a column `{column}`: cloning a voice"):
            CFGDistillDiversityTrainer(make_dia(), None, args, train, evals, tokenizer)


@pytest.mark.parametrize("column", ["audio", "audio_prompt"])
def test_an_evaluation_refuses_a_voice_to_clone_before_it_samples(tokenizer, tmp_path, column):
    make_dia().save_pretrained(tmp_path / "dia")
    tokenizer.save_pretrained(tmp_path / "dia")
    file = tmp_path / "voices.jsonl"
    Dataset.from_dict({"prompt": PROMPTS, column: PROMPTS}).to_json(file)
    given = EvaluateArguments(str(tmp_path / "dia"), str(file), num_prompts=2, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=f"`dataset={file}` has a column `{column}`: cloning a voice"):
        evaluate(given)
    assert not (tmp_path / "out").exists()


def test_prompts_longer_than_the_encoders_positions_are_refused(tokenizer, tmp_path):
    """When the run is set up, also those whose characters have several bytes; and wherever they are sampled from."""
    model = make_dia()
    model.config.encoder_config.max_position_embeddings = 20
    fits, long = "a" * 20, "é" * 11  # of 20 and 22 bytes
    for column, what in {
        "prompt": "a prompt", "negative_prompt": "a negative prompt", "teacher_prompt": "a teacher's prompt"
    }.items():  # fmt: skip
        data = Dataset.from_dict({"prompt": [fits] * 16} | {column: [fits] * 15 + [long]})
        for scale in (1.0, 3.0):
            if column != "negative_prompt" or scale != 1:
                with pytest.raises(ValueError, match=f"`train_dataset`: {what} of 22 tokens .* 20 positions"):
                    make_trainer(tmp_path, tokenizer, model, data, guidance_scale=scale)
    trainer = make_trainer(tmp_path, tokenizer, model, Dataset.from_dict({"prompt": [fits] * 16}))
    assert rollout(trainer, [fits])["prompt_ids"].shape == (4, 20)
    with pytest.raises(ValueError, match="a prompt of 22 tokens"):
        rollout(trainer, [fits, long])
    policy = policy_for(model, tokenizer)
    for prompts, negative in (([[5] * 22], [[0] * 20]), ([[5] * 20], [[0] * 22])):
        with pytest.raises(ValueError, match=r"of 22 tokens .* 20 positions"):
            policy.rollout(model, prompts, negative, 3.0, max_new_tokens=TINY.steps)


# ------------------------------------------------------------------------------------------------ the trainer


def loudness(audio):
    """A fixed random projection of the waveforms, which are of unequal length."""
    waves = torch.stack([torch.nn.functional.pad(wave, (0, 64 - len(wave))) for wave, _ in audio])
    return waves @ torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) + 1e-3


def make_trainer(
    tmp_path, tokenizer, model=None, dataset=None, peft_config=None, embedder=loudness, codec=None, **kwargs
):
    return CFGDistillDiversityTrainer(
        model=make_dia() if model is None else model,
        args=settings(tmp_path, **({"max_completion_length": TINY.steps} | kwargs)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}) if dataset is None else dataset,
        processing_class=tokenizer,
        embedder=embedder,
        peft_config=peft_config,
        codec=codec,
    )


def rollout(trainer, prompts=PROMPTS[:2]):
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(4)])


def ids_of(config):
    return config.pad_token_id, config.bos_token_id, config.eos_token_id


def test_trl_alone_changes_the_decoders_ids(tokenizer, tmp_path):
    """Why there is [`DiaInTRL`]."""
    model = make_dia()
    RLOOTrainer(
        model, lambda **kwargs: [0.0], settings(tmp_path), Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )  # fmt: skip
    assert ids_of(model.config.decoder_config) == (0, TINY.bos, TINY.eos)


@pytest.mark.parametrize("given", ["tokenizer", "processor"])
def test_special_tokens_and_trained_parts(tmp_path, given):
    processor = make_processor()
    trainer = make_trainer(tmp_path, keep_processor(processor) if given == "tokenizer" else processor, max_steps=1)
    assert trainer.processing_class is processor.tokenizer
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    model = trainer.model
    config = model.generation_config
    assert ids_of(config) == ids_of(model.config.decoder_config) == (TINY.pad, TINY.bos, TINY.eos)
    assert ids_of(model.config) == (None, None, None) and config.decoder_start_token_id == TINY.bos
    assert (config.guidance_scale, config.top_k, config.top_p, config.do_sample) == (1.0, 0, 1.0, True)
    assert model.config.get_text_config() is model.config.decoder_config, "something of the patch is left"
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not same, "encoder, decoder and heads are trained"
    assert trainer.codec.audio_tokenizer is processor.audio_tokenizer


def test_rollouts_are_without_guidance_and_score_as_sampled(tokenizer, tmp_path):
    """The checkpoint's guidance, top-k and top-p must not reach them; the ratio to the sampling policy is 1."""
    trainer = make_trainer(tmp_path, tokenizer, steps_per_generation=2)
    torch.manual_seed(3)
    batch = rollout(trainer)
    ids = [tokenizer(p)["input_ids"] for p in PROMPTS[:2] for _ in range(4)]
    torch.manual_seed(3)
    alone = trainer.policy.rollout(trainer.model, ids, temperature=0.99, max_new_tokens=TINY.steps)
    longest = batch["completion_ids"].shape[1]
    assert [row[: len(ids)] for row, ids in zip(batch["completion_ids"].tolist(), alone.completions(), strict=True)] \
        == alone.completions()  # fmt: skip
    assert len({len(ids) for ids in alone.completions()}) > 1 and batch["completion_mask"].shape[1] == longest
    terms = trainer.joint_objective.terms(trainer.model, trainer.model, batch)
    assert terms.tokens.tolist() == alone.drawn.sum((1, 2)).tolist()
    torch.testing.assert_close(batch["old_log_probs"], terms.log_probs.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.log_probs, terms.log_probs.detach(), rtol=1e-4, atol=1e-4)


def test_the_log_tells_how_completions_end(tokenizer, tmp_path):
    """By the eos of codebook 0; TRL looks at the last id, a code of another codebook."""
    trainer = make_trainer(tmp_path, tokenizer)
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        batch = rollout(trainer)
        lengths = batch["completion_mask"].sum(1).tolist()
        rows = [row[:length] for row, length in zip(batch["completion_ids"].tolist(), lengths, strict=True)]
        ended = [TINY.eos in row[:: TINY.books] for row in rows]
        whole = [length for length, end in zip(lengths, ended, strict=True) if end] or [0]
        log = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        assert log["completions/clipped_ratio"] == pytest.approx(1 - sum(ended) / 8)
        assert log["completions/mean_terminated_length"] == pytest.approx(sum(whole) / len(whole))
        assert log["completions/min_terminated_length"] == min(whole)
        assert log["completions/max_terminated_length"] == max(whole)
        assert log["completions/max_length"] == max(lengths)
        seen.add(sum(ended))
    assert seen - {0, 8}


def dense_reference(trainer, student, teacher, batch, guidance_scale=3.0, temperature=0.99):
    """
    KL and log p of each sequence from the whole models' own float64 logits, one at a time; nats, `(B,)`.

    The inputs and what counts are spelt out from the frames of each completion, as the processor lays them out.
    """
    tokenizer, delays = trainer.processing_class, TINY.delays
    kls, log_ps = [], []
    completions = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    for (ids, mask), prompt in zip(completions, [p for p in PROMPTS[:2] for _ in range(4)], strict=True):
        rows = ids[mask.bool()].view(-1, TINY.books).tolist()
        frames = next((n for n, row in enumerate(rows) if row[0] >= TINY.eos), len(rows))
        drawn_eos = any(row[0] == TINY.eos for row in rows)
        laid = torch.full((TINY.steps + 1, TINY.books), TINY.pad)
        for k, late in enumerate(delays):
            laid[: late + 1, k] = TINY.bos
            for frame in range(frames):
                laid[late + 1 + frame, k] = rows[frame + late][k]
            laid[late + 1 + frames, k] = TINY.eos
        text = torch.tensor([tokenizer(prompt)["input_ids"]])

        def logits(model, text, laid=laid):
            out = model(input_ids=text, attention_mask=torch.ones_like(text), decoder_input_ids=laid[None, :-1])
            return out.logits

        z, cond, uncond = logits(student, text), logits(teacher, text), logits(teacher, torch.zeros_like(text))
        guided = guide_logits(cond, uncond, guidance_scale)
        kl = log_p = torch.zeros((), dtype=torch.float64)
        for k, late in enumerate(delays):
            size = TINY.size + (k == 0)
            for step in range(late, late + frames + (k == 0 and drawn_eos)):
                own, their = z[k, step, :size], guided[k, step, :size]
                kl = kl + reverse_kl(own[None], their[None], temperature).sum()
                log_p = log_p + (own / temperature).log_softmax(-1)[laid[step + 1, k]]
        kls.append(kl)
        log_ps.append(log_p)
    return torch.stack(kls), torch.stack(log_ps)


def test_loss_and_gradient_equal_the_dense_reference(tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, diversity_coef=7.0)
    student = trainer.model
    monkeypatch.setattr("trl_drcd.trainer.check_scoring", lambda *_: None)  # else refused: the student has learned
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = rollout(trainer)
    assert (batch["completion_ids"] == TINY.eos).any(), "without an eos half is not tested"
    trainer.compute_loss(student, batch).backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    student = student.double()
    kl, log_p = dense_reference(trainer, student, make_dia().double(), batch)
    completions = [
        row[mask.bool()].tolist() for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    advantages = diversity_advantages(loudness(trainer.codec.decode(completions)), 4)
    torch.testing.assert_close(batch["diversity_advantages"], advantages)
    assert advantages.abs().max() > 0
    (kl.mean() - (7.0 * advantages.double() * log_p).mean()).backward()
    assert trainer._metrics["train"]["loss/distillation"][-1] == pytest.approx(kl.mean().item(), rel=1e-4)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name].double(), parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_lora_adapter_is_taught_by_the_base(tokenizer, tmp_path):
    lora = LoraConfig(r=4, target_modules=LORA_TARGETS, lora_dropout=0)
    trainer = make_trainer(tmp_path, tokenizer, peft_config=lora, max_steps=3, learning_rate=1e-2)
    assert trainer.teacher.copy is None
    trainer.train()
    batch = rollout(trainer)
    student = trainer.accelerator.unwrap_model(trainer.model)
    terms = trainer.joint_objective.terms(trainer.model, trainer.model, batch)
    merged = student.merge_and_unload().double()
    kl, log_p = dense_reference(trainer, merged, make_dia().double(), batch)
    torch.testing.assert_close(terms.kl.double(), kl, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(terms.log_probs.sum((1, 2)).double(), log_p, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_a_trained_folder_plays_without_guidance(tmp_path, lora):
    """In `AutoProcessor` and, whole, in a pipeline: the codes are those of the policy, where no eos is drawn."""
    shape = PUBLISHED
    make_dia(3, shape, "never").save_pretrained(tmp_path / "base")
    make_processor(shape, tmp_path / "dac").save_pretrained(tmp_path / "base")
    trainer = CFGDistillDiversityTrainer(
        model=str(tmp_path / "base"),
        args=settings(
            tmp_path / "out", max_completion_length=shape.steps, max_steps=2, temperature=1.0, diversity_coef=5.0,
            diversity_credit="critic", diversity_prefixes=5, learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        embedder=loudness,
        peft_config=LoraConfig(r=2, target_modules=LORA_TARGETS, lora_dropout=0) if lora else None,
    )  # fmt: skip
    trainer.train()
    assert all(entry["kl"] > 1 for entry in trainer.state.log_history if "kl" in entry)
    trainer.save_model(str(tmp_path / "saved"))
    saved = str(tmp_path / "saved")
    model = load_adapter_model(saved) if lora else DiaForConditionalGeneration.from_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved)
    assert isinstance(processor, DiaProcessor)
    prompt = [processor.tokenizer("[S1] harp")["input_ids"]]
    torch.manual_seed(0)
    mine = policy_for(model, processor.tokenizer).rollout(model, prompt, max_new_tokens=shape.steps).completions()
    (expected,) = processor.batch_decode(read(policy_for(model, processor.tokenizer), mine, shape.steps + 1))
    with mock.patch("torch.multinomial", drawn_as_ours):
        torch.manual_seed(0)
        codes = model.generate(**processor(text=["[S1] harp"]), max_new_tokens=shape.steps)
        torch.testing.assert_close(processor.batch_decode(codes)[0], expected)
        if not lora:
            player = pipeline("text-to-audio", model=saved)
            torch.manual_seed(0)
            sound = player("[S1] harp", generate_kwargs={"max_new_tokens": shape.steps})
            assert sound["sampling_rate"] == 80
            torch.testing.assert_close(torch.from_numpy(sound["audio"]), expected)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "text-to-speech" in card and ("load_adapter_model" if lora else "pipeline") in card


def test_it_is_found_by_its_type(tmp_path):
    make_dia().save_pretrained(tmp_path)
    assert policy_class(str(tmp_path)) is policy_class(make_dia()) is DiaPolicy


def test_the_codec_is_never_read_from_a_pickle(tmp_path):
    processor, model = make_processor(folder=tmp_path / "dac"), make_dia()
    model.save_pretrained(tmp_path / "dia")
    processor.save_pretrained(tmp_path / "dia")
    model = DiaForConditionalGeneration.from_pretrained(tmp_path / "dia")
    codec = policy_for(model, make_processor().tokenizer).codec(model)
    torch.testing.assert_close(codec.audio_tokenizer.state_dict(), processor.audio_tokenizer.state_dict())
    torch.save(processor.audio_tokenizer.state_dict(), tmp_path / "dac" / "pytorch_model.bin")
    (tmp_path / "dac" / "model.safetensors").unlink()
    with mock.patch("torch.load", side_effect=AssertionError), pytest.raises(ValueError, match="from safetensors"):
        policy_for(model, make_processor().tokenizer).codec(model)


def test_without_a_processor_there_is_no_codec(tmp_path):
    tokenizer = make_processor().tokenizer
    model = make_dia()
    with pytest.raises(ValueError, match="loaded from no folder, which has none; pass the model's `DiaProcessor`"):
        policy_for(model, tokenizer).codec(model)
    with pytest.raises(ValueError, match="`processing_class` is a tokenizer alone"):
        make_trainer(tmp_path / "out", tokenizer)
    codec = policy_for(model, make_tokenizer()).codec(model)
    trainer = make_trainer(tmp_path / "out", tokenizer, codec=codec)
    assert trainer.codec is codec
    policy_for(model, tokenizer).save_extras(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()

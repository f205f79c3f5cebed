"""The trainer on text models: adapters without a second copy, precision, lengths, memory, other ways of sampling."""

import gc
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from conftest import make_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from test_trainer import PROMPTS, make_trainer, rollout
from torch.utils._python_dispatch import TorchDispatchMode
from trl import ModelConfig, get_quantization_config

LORA = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0)


def bytes_alive() -> int:
    """Bytes of all distinct tensor storages that Python can reach; what `torch.compile` traces with has no data."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def size(parameters) -> tuple[int, int]:
    """Number and bytes of parameters."""
    parameters = list(parameters)
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


@pytest.mark.parametrize("adapter", [True, False])
def test_an_adapter_needs_no_second_copy_of_the_weights(tmp_path, tokenizer, adapter):
    model = make_model(tokenizer, hidden_size=128, intermediate_size=512)
    number, weights = size(model.parameters())
    before = bytes_alive()
    trainer = make_trainer(tmp_path, tokenizer, model=model, peft_config=LORA if adapter else None)
    grown = bytes_alive() - before
    if adapter:
        new = [p for p in trainer.model.parameters() if p.requires_grad]
        assert trainer.teacher.copy is None
        assert size(trainer.model.parameters())[0] == number + size(new)[0]
        assert size(new)[1] < 0.2 * weights
        assert size(new)[1] <= grown < size(new)[1] + 0.1 * weights
    else:
        assert size(trainer.teacher.copy.parameters()) == (number, weights)
        assert weights <= grown < 1.1 * weights


def test_a_quantised_model_is_loaded_and_its_adapter_trained(tmp_path, tokenizer, monkeypatch):
    """bitsandbytes quantises on GPUs, so a small model stands in for the quantised one."""
    given = {}

    def load(name, **kwargs):
        given.update(kwargs)
        model = make_model(tokenizer)
        model.is_loaded_in_4bit = True
        return model

    monkeypatch.setattr("trl.trainer.rloo_trainer.create_model_from_path", load)
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=str(tmp_path / "model"),
        peft_config=LORA,
        quantization_config=quantization,
        bf16=True,
    )
    assert given["quantization_config"].load_in_4bit and given["quantization_config"].bnb_4bit_use_double_quant
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}  # as QLoRA's authors do
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name], p) for name, p in trained.items())


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_without_bitsandbytes_says_what_is_missing(tmp_path, tokenizer):
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    quantization = get_quantization_config(ModelConfig(load_in_4bit=True))
    with pytest.raises((ImportError, RuntimeError), match="bitsandbytes"):
        make_trainer(tmp_path, tokenizer, model=str(tmp_path / "model"), quantization_config=quantization)


def loss_and_gradient(trainer, batch):
    """Loss of the batch and gradients of all that is trained."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return loss.detach(), gradients


def test_gradient_checkpointing_changes_no_gradient(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LORA, diversity_coef=1.0)
    batch = rollout(trainer)
    loss, gradients = loss_and_gradient(trainer, batch)
    trainer.model.enable_input_require_grads()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = loss_and_gradient(trainer, batch)
    torch.testing.assert_close(again, loss)
    assert gradients and gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_bfloat16_weights_with_a_float32_adapter_stay_near_float32(tmp_path, tokenizer):
    model = make_model(tokenizer, initializer_range=0.2).to(torch.bfloat16)
    rough = make_trainer(tmp_path, tokenizer, model=model, peft_config=LORA, bf16=True)
    fine = make_trainer(
        tmp_path, tokenizer, model=make_model(tokenizer, initializer_range=0.2).to(torch.bfloat16).float(),
        peft_config=LORA,
    )  # fmt: skip
    assert {p.dtype for p in rough.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in rough.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    batch = rollout(fine)
    expected, gradients = loss_and_gradient(fine, batch)
    loss, rough_gradients = loss_and_gradient(rough, batch)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    one, other = (torch.cat([g[n].flatten() for n in gradients]) for g in (gradients, rough_gradients))
    assert torch.cosine_similarity(one, other, dim=0) > 0.98
    rough.train()
    assert all(torch.isfinite(p).all() for p in rough.model.parameters())


# ---------------------------------------------------------------- prompts


def test_long_prompts_reach_student_and_teacher_whole(tmp_path, tokenizer):
    long, negative = " ".join(["slow", "harp"] * 100), " ".join(["fast"] * 150)
    dataset = Dataset.from_dict({"prompt": [long, "drum"] * 4, "negative_prompt": [negative, None] * 4})
    trainer = make_trainer(tmp_path, tokenizer, dataset=dataset)
    trainer.model.train()
    with mock.patch.object(trainer.teacher, "read", wraps=trainer.teacher.read) as read:
        batch = trainer._generate_and_score_completions([dataset[0]] * 4 + [dataset[1]] * 4)
    negative_ids, negative_mask = read.call_args.args[2]
    for ids, mask, text in (
        (batch["prompt_ids"], batch["prompt_mask"], long),
        (negative_ids, negative_mask, negative),
    ):
        assert ids[0][mask[0].bool()].tolist() == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "prompt",
            r"a prompt of 42 tokens and `max_completion_length=5` do not fit .* has 44 positions",
        ),
        ("negative_prompt", r"a negative prompt of 42 tokens and `max_completion_length=5` do not fit"),
    ],
)
def test_what_the_model_cannot_read_is_refused_not_cut(tmp_path, tokenizer, column, message):
    columns = {"prompt": ["drum"] * 8, "negative_prompt": ["slow"] * 8} | {column: [" ".join(["slow"] * 40)] * 8}
    model = make_model(tokenizer, max_position_embeddings=44)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, model=model, dataset=Dataset.from_dict(columns))
    stream = Dataset.from_dict(columns).to_iterable_dataset()  # whose rows are seen as they come
    trainer = make_trainer(tmp_path, tokenizer, model=model, dataset=stream, max_steps=1)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_prompts_may_come_as_a_stream(tmp_path, tokenizer):
    def generate():
        while True:
            yield from ({"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS)

    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} <audio>"
    try:
        trainer = make_trainer(tmp_path, tokenizer, dataset=IterableDataset.from_generator(generate))
        trainer.train()
    finally:
        tokenizer.chat_template = None
    assert trainer.state.global_step == 2


# ---------------------------------------------------------------- memory of the logits


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:  # a packed weight is no array
                self.entries = max(self.entries, tensor.numel())
        return output


@pytest.mark.parametrize("diversity_coef", [0.0, 1.0])  # at 1, the step that takes the terms apart
def test_the_logits_of_a_large_vocabulary_never_exist_in_whole(tmp_path, tokenizer, diversity_coef):
    vocabulary, batch, steps = 49_152, 16, 40
    model = make_model(tokenizer, vocab_size=vocabulary, hidden_size=8, initializer_range=0.02, eos_token_id=None)
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, per_device_train_batch_size=batch, max_completion_length=steps,
        diversity_coef=diversity_coef, max_steps=1, embedder=lambda texts: torch.rand(len(texts), 4),
    )  # fmt: skip
    with Largest() as largest:
        trainer.train()
    scored = trainer.state.log_history[0]["completions/mean_length"] * batch
    assert scored > 0.9 * batch * steps  # random tokens: hardly an eos among 49,152
    assert 2**23 < largest.entries <= 2**24 < scored * vocabulary


# ---------------------------------------------------------------- other ways of sampling


class FakeVLLM:
    """In the place of TRL's `VLLMGeneration`: keeps what it is made with, samples one fixed completion."""

    made: dict = {}

    def __init__(self, **kwargs):
        FakeVLLM.made, self.synced = kwargs, 0

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        return prompts, [[5 + i % 3, 6, 2] for i in range(len(prompts))], None, None


@pytest.mark.parametrize(
    "mode",
    [
        {"vllm_mode": "server", "vllm_server_host": "elsewhere", "vllm_server_port": 8123},
        {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4, "vllm_tensor_parallel_size": 1},
    ],
    ids=["server", "colocate"],
)
def test_vllm_settings_pass_through_and_its_samples_are_trained_on(tmp_path, tokenizer, monkeypatch, mode):
    monkeypatch.setattr("trl.trainer.rloo_trainer.VLLMGeneration", FakeVLLM)
    trainer = make_trainer(tmp_path, tokenizer, use_vllm=True, diversity_coef=1.0, **mode)
    made = FakeVLLM.made
    for name, value in mode.items():
        assert made[name.removeprefix("vllm_")] == value
    # The distribution that is scored is the one that vLLM is asked for
    assert (made["temperature"], made["top_p"], made["top_k"]) == (0.99, 1.0, 0)
    assert made["min_p"] in (None, 0.0) and made["repetition_penalty"] == 1.0
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.vllm_generation.synced == 2  # once for each update
    assert trainer.state.log_history[0]["completions/mean_length"] == 3
    assert not torch.equal(before, trainer.model.lm_head.weight)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_named(tmp_path, tokenizer):
    with pytest.raises(ImportError, match="vLLM is not available"):
        make_trainer(tmp_path, tokenizer, use_vllm=True)


@pytest.mark.slow
def test_continuous_batching_samples_from_the_models_own_distribution(tmp_path, tokenizer):
    """
    One token for each of many equal prompts, against the softmax of one forward; then a step of training.

    How the prompts are batched, and with it the draws, depends on the load of the machine, hence five standard errors.
    """
    count = 600
    trainer = make_trainer(
        tmp_path, tokenizer, use_transformers_continuous_batching=True, max_completion_length=1, temperature=0.7,
        embedder=None, max_steps=1,
    )  # fmt: skip
    trainer.model.train()
    prompt = tokenizer("slow harp")["input_ids"]
    sampled = torch.tensor(trainer._generate_single_turn([prompt] * count, None, {})).flatten()
    with torch.no_grad():
        expected = (trainer.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    frequencies = torch.bincount(sampled, minlength=len(expected)) / count
    assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 2e-3).all()
    trainer.train()
    assert trainer.state.global_step == 1

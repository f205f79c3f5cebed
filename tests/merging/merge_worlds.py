"""Models to merge: trained tiny-music models, small random ones, and adapters whose every tensor is random."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EncodecConfig,
    EncodecFeatureExtractor,
    GenerationConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)

ROOT = Path(__file__).parents[2]
WORLD = ROOT / "recipes" / "tiny_music" / "models"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_lerp(folder: Path, parents: list[Path], weights: list[float], tolerance: float = 1e-7) -> None:
    """Every tensor is the weighted sum, in float64, up to the rounding of float32."""
    merged, sources = tensors_of(folder), [tensors_of(parent) for parent in parents]
    assert all(merged.keys() == source.keys() for source in sources)
    for name, tensor in merged.items():
        expected = sum(w * source[name].double() for w, source in zip(weights, sources, strict=True))
        scale = max(source[name].double().abs().max() for source in sources)
        assert (tensor.double() - expected).abs().max() <= 2 * tolerance * scale, name


def trained_music_model(folder: Path, seed: int) -> Path:
    """The shipped model after three steps on random tokens, saved as the music recipe saves."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(WORLD / "musiclm", dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for _ in range(3):
        ids = torch.randint(model.config.vocab_size, (4, 32))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.guidance_scale = 1.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(WORLD / "musiclm").save_pretrained(folder)
    shutil.copytree(WORLD / "codec", folder / "codec")
    card = "---\nbase_model: musiclm\npipeline_tag: text-to-audio\ntags: [trl, music]\nlicense: apache-2.0\n---\n# x\n"
    (folder / "README.md").write_text(card)
    return folder


def small_musicgen(folder: Path, seed: int, tokenizer=None) -> Path:
    """A random MusicGen with an EnCodec, whose generation config has guidance on, as the published ones have."""
    torch.manual_seed(seed)
    text = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    audio = EncodecConfig(
        target_bandwidths=[8.0], sampling_rate=16000, num_filters=4, upsampling_ratios=[4, 4], codebook_size=16,
        codebook_dim=8, hidden_size=8, num_lstm_layers=1, num_residual_layers=1,
    )  # fmt: skip
    decoder = MusicgenDecoderConfig(
        vocab_size=16, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2, hidden_size=16, num_codebooks=2,
        pad_token_id=16, bos_token_id=16, max_position_embeddings=64,
    )  # fmt: skip
    parts = {"text_encoder": text.to_dict(), "audio_encoder": audio.to_dict(), "decoder": decoder.to_dict()}
    model = MusicgenForConditionalGeneration(MusicgenConfig(**parts))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=16, pad_token_id=16, bos_token_id=16, guidance_scale=3.0, do_sample=True, max_length=20
    )
    model.save_pretrained(folder)
    EncodecFeatureExtractor(feature_size=1, sampling_rate=16000, padding_side="left").save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def random_adapter(folder: Path, base: Path, seed: int, model_class=AutoModelForCausalLM, **settings) -> Path:
    """A LoRA adapter of the base, every tensor of its file random."""
    model = model_class.from_pretrained(base)
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4} | settings))
    get_peft_model(model, config).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: torch.randn(t.shape, generator=generator).mul(0.1).to(t.dtype) for name, t in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def effective_weights(model) -> dict[str, torch.Tensor]:
    """What a `PeftModel` multiplies with, in float64: the base's weights with the active adapter's changes in them."""
    weights, wrapped = {}, []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            weights[name] = base.weight.double() + module.get_delta_weight("default").double()
            bias = getattr(base, "bias", None)
            own = module.lora_B["default"].bias if "default" in module.lora_B else None
            if bias is not None:
                weights[name + ".bias"] = bias.double()
            if own is not None:
                shift = own.double() * module.scaling["default"]
                weights[name + ".bias"] = weights.get(name + ".bias", torch.zeros_like(shift)) + shift
            wrapped.append(name)
        elif isinstance(module, ModulesToSaveWrapper):
            weights[name] = module.modules_to_save["default"].weight.double()
            wrapped.append(name)
        elif isinstance(module, TrainableTokensWrapper):
            weights[name] = module.token_adapter.get_merged_weights(["default"]).double()
            wrapped.append(name)
    for name, tensor in model.named_parameters():
        if not any(name.startswith(part + ".") for part in wrapped):
            weights[name] = tensor.double()
    return {name: tensor.detach() for name, tensor in weights.items()}


def one_shard(folder):
    """Give the weights of a folder the name of the only shard of an index."""
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    with safe_open(shard, "pt") as tensors:
        weight_map = dict.fromkeys(tensors.keys(), shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

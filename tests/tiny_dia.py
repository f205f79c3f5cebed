"""A tiny random Dia with its processor and codec, and what the tests of it share."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DacConfig,
    DacModel,
    DiaConfig,
    DiaDecoderConfig,
    DiaEncoderConfig,
    DiaFeatureExtractor,
    DiaForConditionalGeneration,
    DiaProcessor,
    DiaTokenizer,
    GenerationConfig,
)

from trl_drcd.compat.dia import keep_processor

HOP = 4  # samples of a frame
PROMPTS = ["[S1] a slow tune", "[S2] hé", "[S1] harp", "[S1] a fast tune"]


@dataclass
class Shape:
    """The delays and ids of a Dia, and steps of a completion that hold a few frames."""

    delays: list[int] = field(default_factory=lambda: [0, 2, 3])
    size: int = 8
    steps: int = 9

    def __post_init__(self):
        self.books, self.eos, self.pad, self.bos = len(self.delays), self.size, self.size + 1, self.size + 2
        self.frames = self.steps - max(self.delays) - 1  # of a completion that ends by its length
        self.processor_kwargs: dict[str, Any] = {
            "delay_pattern": self.delays, "eos_token_id": self.eos, "pad_token_id": self.pad, "bos_token_id": self.bos
        }  # fmt: skip


TINY = Shape()
PUBLISHED = Shape([0, 8, 9, 10, 11, 12, 13, 14, 15], 1024, 22)


def make_dia(seed=0, shape=TINY, eos="drawn"):
    """
    A random Dia whose logits are spread, with the generation settings that transformers' conversion script writes.

    Args:
        seed (`int`): Of the weights.
        shape (`Shape`): Of the codebooks.
        eos (`str`): `"drawn"` as likely as other ids; `"certain"` with a probability of almost 0 or 1, as the prefix
            may be; `"never"`.
    """
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = DiaEncoderConfig(num_key_value_heads=2, head_dim=8, **sizes)
    decoder = DiaDecoderConfig(
        num_key_value_heads=1, head_dim=8, cross_num_attention_heads=2, cross_head_dim=8,
        cross_num_key_value_heads=2, cross_hidden_size=16, vocab_size=shape.size + 4, num_channels=shape.books,
        pad_token_id=shape.pad, eos_token_id=shape.eos, bos_token_id=shape.bos, max_position_embeddings=64, **sizes,
    )  # fmt: skip
    config = DiaConfig(encoder_config=encoder, decoder_config=decoder, delay_pattern=shape.delays)
    model = DiaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    with torch.no_grad():
        head = model.logits_dense.weight
        if eos == "certain":
            head[shape.eos] *= 300
        elif eos == "never":  # by a feature that is positive in all states: no layer but the embedding writes it
            model.model.decoder.embeddings.embed.weight[:, 0] = 3.0
            for layer in model.model.decoder.layers:
                for last in (layer.self_attention.o_proj, layer.cross_attention.o_proj, layer.mlp.down_proj):
                    last.weight[0] = 0.0
            head[:, 0], head[shape.eos, 0] = 0.0, -1e4
    model.generation_config = GenerationConfig(
        do_sample=True, guidance_scale=3.0, top_k=45, top_p=0.95, temperature=1.2, max_length=48,
        pad_token_id=shape.pad, bos_token_id=shape.bos, eos_token_id=shape.eos,
    )  # fmt: skip
    return model


def make_dac(shape=TINY):
    torch.manual_seed(0)
    config = DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 2], decoder_hidden_size=8, upsampling_ratios=[2, 2],
        n_codebooks=shape.books, codebook_size=shape.size, codebook_dim=4, sampling_rate=80, hop_length=HOP,
    )  # fmt: skip
    return DacModel(config).eval()


def make_processor(shape=TINY, folder=None):
    """With the codec in a folder if one is given: a saved processor has the codec's name alone."""
    dac = make_dac(shape)
    if folder is not None:
        dac.save_pretrained(folder)
        dac = DacModel.from_pretrained(folder).eval()
    return DiaProcessor(DiaFeatureExtractor(sampling_rate=80, hop_length=HOP), DiaTokenizer(), dac)


def make_tokenizer(shape=TINY, folder=None):
    """The tokenizer that keeps its processor."""
    return keep_processor(make_processor(shape, folder))

"""The tokenizer of the tiny MusicLM: caption words and audio tokens in one vocabulary."""

from __future__ import annotations

from captions import vocabulary
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<audio>"]
FIRST_AUDIO_TOKEN = len(SPECIALS)


def build_tokenizer(num_codebooks: int, codebook_size: int) -> PreTrainedTokenizerFast:
    """
    Word-level tokenizer: specials, then the audio tokens `<a0_0> ... `, then the words of `captions.vocabulary`.

    A text becomes `<s> words <audio>`, in lower case and without punctuation; the empty text, `<s> <audio>`, is the
    null prompt. Audio tokens in a text (`<a0_17>`) are read as such.
    """
    audio = [f"<a{k}_{code}>" for k in range(num_codebooks) for code in range(codebook_size)]
    tokens = {token: i for i, token in enumerate([*SPECIALS, *audio, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9#<>_/ ]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"<[^<> ]+>"), "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <audio>", special_tokens=[("<s>", tokens["<s>"]), ("<audio>", tokens["<audio>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<audio>"], padding_side="left", model_max_length=256,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_t5_tokenizer() -> PreTrainedTokenizerFast:
    """
    The words of `captions.vocabulary` in the form T5 reads: `words </s>`, lower case, without punctuation.

    It pads on the right, as T5's own tokenizer does.
    """
    specials = ["<pad>", "</s>", "<unk>"]
    tokens = {token: i for i, token in enumerate([*specials, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9# ]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokens["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=256,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip

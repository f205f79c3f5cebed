"""Bad models, tokenizers and adapters, given to the trainer."""

from collections.abc import Sequence
from typing import Any

from bad_world import Bad
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.utils import NoMatchingPeftModuleError
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from trl_drcd.audio import MusicEmbedder
from trl_drcd.policies import policy_class


def folder(name: str, change: Any, error: type[BaseException], value: str, remedy: str) -> Bad:
    """A folder, changed by `change(world, tmp)`, named as the model; the tokenizer comes from it too."""
    return Bad(
        name,
        lambda w, tmp: w.trainer(tmp, model=change(w, tmp), processing_class=None),
        error,
        "`model",
        value,
        remedy,
    )


def given(
    name: str, value: str, remedy: str, argument: str, make: Any, error: type[BaseException] = ValueError
) -> Bad:
    """Arguments `make(world)` of the trainer."""
    return Bad(name, lambda w, tmp: w.trainer(tmp, **make(w)), error, argument, value, remedy)


def without_end(world: Any) -> Any:
    """The tokenizer without pad and eos tokens."""
    import copy

    bare = copy.deepcopy(world.tokenizer)
    bare.pad_token = bare.eos_token = None
    return bare


def trained(world: Any) -> Any:
    return get_peft_model(world.model(), LoraConfig(r=2, init_lora_weights=False))


def injected(world: Any) -> Any:
    """A model into which transformers has put an adapter."""
    model = world.model()
    model.add_adapter(LoraConfig(r=2))
    return model


def two_adapters(world: Any, active: Sequence[str] = ("default", "other")) -> Any:
    model = get_peft_model(world.model(), LoraConfig(r=2))
    model.add_adapter("other", LoraConfig(r=2))
    model.base_model.set_adapter(list(active))
    return model


def t5(world: Any) -> Any:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(world.tokenizer), **sizes))


def bert(world: Any) -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertModel(BertConfig(vocab_size=len(world.tokenizer), **sizes))


ROWS = [
    folder("no such folder", lambda w, tmp: tmp / "none", FileNotFoundError, "none", "give the folder of a saved"),
    folder(
        "folder without a configuration", lambda w, tmp: w.with_file("model", tmp, "config.json", None),
        FileNotFoundError, "config.json", "give the folder of a saved model",
    ),
    folder(
        "configuration torn", lambda w, tmp: w.with_file("model", tmp, "config.json", '{"model_type": '), ValueError,
        "config.json", "copy or save it again",
    ),
    folder(
        "configuration that is a list", lambda w, tmp: w.with_file("model", tmp, "config.json", "[]"), ValueError,
        "got list", "copy or save it again",
    ),
    folder(
        "architecture that does not exist", lambda w, tmp: w.edited("model", tmp, architectures=["NoSuchModel"]),
        ValueError, "NoSuchModel", "transformers has no such model",
    ),
    folder(
        "architecture that is no model", lambda w, tmp: w.edited("model", tmp, architectures=["pipeline"]), ValueError,
        "pipeline", "transformers has no such model",
    ),
    folder(
        "unknown kind of model", lambda w, tmp: w.edited("model", tmp, model_type="nothing", architectures=...),
        ValueError, "nothing", "transformers",
    ),
    folder("weights torn", lambda w, tmp: w.torn("model", tmp), ValueError, "model.safetensors", "copy or save it"),
    folder(
        "weights that are none", lambda w, tmp: w.with_file("model", tmp, "model.safetensors", b"not weights at all"),
        ValueError, "model.safetensors", "copy or save it again",
    ),
    folder(
        "weights with NaN", lambda w, tmp: w.poisoned("model", tmp), ValueError, "lm_head.weight",
        "load weights that are finite",
    ),
    folder(
        "no weights", lambda w, tmp: w.with_file("model", tmp, "model.safetensors", None), FileNotFoundError,
        "model.safetensors", "give a folder of `save_pretrained`",
    ),
    folder(
        "weights pickled", lambda w, tmp: w.pickled("model", tmp), FileNotFoundError, "pytorch_model.bin",
        "save the model as safetensors",
    ),
    folder(
        "shards outside the folder",
        lambda w, tmp: w.with_file(
            "model", tmp, "model.safetensors.index.json", '{"weight_map": {"a": "../../model.safetensors"}}'
        ),
        ValueError, "../../model.safetensors", "must lie in the folder",
    ),
    folder(
        "code of its own", lambda w, tmp: w.with_code("model", tmp), ValueError, "auto_map", "`trust_remote_code`",
    ),
    folder(
        "an adapter for a model", lambda w, tmp: w / "adapter", ValueError, "adapter", "merge it into its base first",
    ),
    given("a model that reads both ways", "BertModel", "a causal LM", "`model`", lambda w: {"model": bert(w)}),
    given("a number for a model", "int", "a name, a folder or", "`model`", lambda w: {"model": 3}, TypeError),
    Bad(
        "MusicGen with a melody",
        lambda w, tmp: policy_class(str(w.edited("model", tmp, model_type="musicgen_melody"))), ValueError,
        "`model`", "melody", "use a text-only one",
    ),
    given(
        "tokenizer without end and padding", "`eos_token`", "set `tokenizer.eos_token`", "`processing_class`",
        lambda w: {"processing_class": without_end(w)},
    ),
    given(
        "tokenizer of another vocabulary", "13 tokens and the model 10", "the model's own tokenizer",
        "`processing_class`", lambda w: {"model": w.model(vocab_size=10)},
    ),
    given(
        "no tokenizer at all", "dict", "a tokenizer", "`processing_class`", lambda w: {"processing_class": {}},
        TypeError,
    ),
    given(
        "model that reads less than it writes", "4 positions", "shorten it", "`max_completion_length=4`",
        lambda w: {"model": w.model(max_position_embeddings=4)},
    ),
    given(
        "advantages normalised, of no function", "True", "set `normalize_advantages=False`", "`normalize_advantages",
        lambda w: {"normalize_advantages": True},
    ),
    given(
        "advantages normalised beside diversity", "True", "scaled by `diversity_coef`", "`normalize_advantages",
        lambda w: {"normalize_advantages": True, "diversity_coef": 1.0, "embedder": len, "reward_funcs": [len]},
    ),
    given(
        "rewards clipped, of no function", "(-1.0, 1.0)", "set `reward_clip_range=None`", "`reward_clip_range",
        lambda w: {"reward_clip_range": (-1.0, 1.0)},
    ),
    given(
        "an embedder of sounds without a codec", "MusicEmbedder", "pass a `codec`", "`embedder`",
        lambda w: {"embedder": MusicEmbedder.from_pretrained(w / "embedder")},
    ),
    given(
        "nothing of that name on the Hub", "nobody/nothing", "correct the name", "`model",
        lambda w: {"model": "nobody/nothing"}, FileNotFoundError,
    ),
    given(
        "an adapter that was trained", "already trained", "merge_and_unload", "`model`",
        lambda w: {"model": trained(w)},
    ),
    given(
        "an adapter in the model and one beside", "carries an adapter already", "merge_and_unload", "`model`",
        lambda w: {"model": injected(w), "peft_config": LoraConfig(r=2)},
    ),
    given(
        "an adapter of another name", "'mine'", "must be called `default`", "`model`",
        lambda w: {"model": get_peft_model(w.model(), LoraConfig(r=2), adapter_name="mine")},
    ),
    given(
        "two active adapters", "'other'", "exactly one is trained", "`model`", lambda w: {"model": two_adapters(w)},
    ),
    given(
        "another active adapter", "'other'", "must be called `default`", "`model`",
        lambda w: {"model": two_adapters(w, ["other"])},
    ),
    given(
        "nothing to train", "no trainable weight", "give a `peft_config`", "`model`",
        lambda w: {"model": w.model().requires_grad_(False)},
    ),
    given(
        "an encoder-decoder", "T5ForConditionalGeneration", "give a causal LM", "`model`",
        lambda w: {"model": t5(w)},
    ),
    given(
        "virtual tokens", "PromptTuningConfig", "use LoRA", "`peft_config`",
        lambda w: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
    ),
    given(
        "another kind of adapter", "without LoRA weights", "pass the base model and a `peft_config`", "`model`",
        lambda w: {"model": get_peft_model(w.model(), IA3Config(task_type="CAUSAL_LM"))},
    ),
    given(
        "an adapter of nothing", "none_proj", "check the target modules", "Target modules",
        lambda w: {"peft_config": LoraConfig(target_modules=["none_proj"])}, NoMatchingPeftModuleError,
    ),
    given(
        "an adapter as a dictionary", "dict", "a `LoraConfig`", "`peft_config`",
        lambda w: {"peft_config": {"r": 2}}, TypeError,
    ),
]  # fmt: skip

"""Bad merges: weights, models, adapters, folders."""

import json
from pathlib import Path
from typing import Any

import torch
from bad_world import Bad
from safetensors.torch import load_file, save_file

from trl_drcd.merging import hold_checkpoints, interpolate_adapters, interpolate_checkpoints, set_interpolation_weight

HALF = [0.5, 0.5]


def merge(
    name: str, error: type[BaseException], argument: str, value: str, remedy: str, models: Any = None,
    weights: Any = HALF, **more: Any,
) -> Bad:  # fmt: skip
    """A merge of two checkpoints, or of what `models(world, tmp)` gives."""

    def act(world: Any, tmp: Path) -> None:
        chosen = models(world, tmp) if models else [world / "model", world / "other"]
        interpolate_checkpoints(chosen, weights, **({"output_dir": tmp / "out"} | more))

    return Bad(name, act, error, argument, value, remedy)


def beside(change: str, *args: Any, **changes: Any) -> Any:
    """The model, and a changed copy of it."""
    return lambda w, tmp: [w / "model", getattr(w, change)("model", tmp, *args, **changes)]


def adapters(
    name: str, error: type[BaseException], argument: str, value: str, remedy: str, change: Any = None, **more: Any
) -> Bad:
    """A merge of an adapter and a changed copy of it."""

    def act(world: Any, tmp: Path) -> None:
        other = change(world, tmp) if change else world / "adapter"
        settings: dict[str, Any] = {"weights": HALF, "output_dir": tmp / "out"} | more
        interpolate_adapters([world / "adapter", other], **settings)

    return Bad(name, act, error, argument, value, remedy)


def tensors(change: Any) -> Any:
    """A copy of the adapter whose tensors went through `change`."""

    def make(world: Any, tmp: Path) -> Path:
        folder = world.copy("adapter", tmp)
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)
        return folder

    return make


def without_a_half(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found.items() if name != sorted(n for n in found if "lora_B" in n)[0]}


def twice_as_wide(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in found.items()}


def with_codec(world: Any, tmp: Path) -> list[Path]:
    """Two models with different codecs."""
    pair = [world.copy("model", tmp), world.copy("other", tmp)]
    for number, folder in enumerate(pair):
        (folder / "codec").mkdir()
        (folder / "codec" / "config.json").write_text(json.dumps({"floor": number}))
    return pair


def full(world: Any, tmp: Path) -> None:
    (tmp / "out").mkdir()
    (tmp / "out" / "x").touch()
    interpolate_checkpoints([world / "model", world / "other"], HALF, tmp / "out")


def a_file(world: Any, tmp: Path) -> None:
    (tmp / "out").touch()
    interpolate_checkpoints([world / "model", world / "other"], HALF, tmp / "out", overwrite=True)


def into_a_parent(world: Any, tmp: Path) -> None:
    model = world.copy("model", tmp)
    interpolate_checkpoints([model, world / "other"], HALF, model, overwrite=True)


def other_words(world: Any, tmp: Path) -> list[Path]:
    folder = world.copy("other", tmp)
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["harp"], words["drum"] = words["drum"], words["harp"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return [world / "model", folder]


def in_memory(weight: Any, ends: int = 2) -> Any:
    def act(world: Any, tmp: Path) -> None:
        model = world.model()
        if ends:
            hold_checkpoints(model, [world / "model"] * ends)
        set_interpolation_weight(model, weight)

    return act


ROWS = [
    merge("weights that sum to more", ValueError, "`weights`", "[0.5, 0.6]", "sum to 1", weights=[0.5, 0.6]),
    merge("weights NaN", ValueError, "`weights`", "nan", "finite and sum to 1", weights=[float("nan"), 0.5]),
    merge("one weight for two models", ValueError, "`weights`", "[1.0]", "one value for each of 2", weights=[1.0]),
    merge("weights in words", TypeError, "`weights`", "['half', 'half']", "numbers", weights=["half", "half"]),
    merge("one number for the weights", TypeError, "`weights`", "0.5", "a list of numbers", weights=0.5),
    merge("no models", ValueError, "`weights`", "[]", "at least one", lambda w, tmp: [], []),
    merge("one text for the models", TypeError, "`models`", "'ab'", "a list of folders", lambda w, tmp: "ab"),
    merge("unknown data type", ValueError, "`dtype=", "float7", "expected one of", dtype="float7"),
    merge("data type of something else", ValueError, "`dtype=", "nn", "expected one of", dtype="nn"),
    merge("a model that is not there", FileNotFoundError, "`models", "none", "give the folder of a saved model",
          lambda w, tmp: [w / "model", tmp / "none"]),
    merge("a model with code of its own", ValueError, "`models", "auto_map", "is not run", beside("with_code")),
    merge("a model torn", ValueError, "`models", "model.safetensors", "copy or save it again", beside("torn")),
    merge("a model with NaN", ValueError, "lm_head.weight", "NaN or infinite", "whose weights are finite",
          beside("poisoned")),
    merge("weights too large for the data type", ValueError, "lm_head.weight", "torch.float16", "weights are finite",
          lambda w, tmp: [w.large(tmp)] * 2, dtype="float16"),
    merge("a model pickled", FileNotFoundError, "`models", "pytorch_model.bin", "as safetensors", beside("pickled")),
    merge("a shard outside", ValueError, "`models", "../x.safetensors", "must lie in the folder",
          beside("with_file", "model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}')),
    merge("shards without a list", ValueError, "`models", "index.json", "copy or save it again",
          beside("with_file", "model.safetensors.index.json", "{}")),
    merge("an adapter among models", ValueError, "`models", "adapter", "merge it into its base first",
          lambda w, tmp: [w / "model", w / "adapter"]),
    merge("another architecture", ValueError, "`num_attention_heads`", "is 2", "models of the same architecture",
          beside("edited", num_attention_heads=4)),
    merge("another vocabulary", ValueError, "vocabularies", "'drum'", "the same tokenizer", other_words),
    merge("another codec", ValueError, "codec/config.json", "differ", "the same codec", with_codec),
    merge("a model card torn", ValueError, "README.md", "not plain YAML", "fix the card, or remove it",
          beside("with_file", "README.md", "---\nbase_model: [a\n---\n")),
    merge("a model card with code", ValueError, "README.md", "python/object", "fix the card, or remove it",
          beside("with_file", "README.md", "---\ntags: !!python/object/apply:os.system [touch ran]\n---\n")),
    Bad("output that is full", full, FileExistsError, "`output_dir=", "out", "set `overwrite`"),
    Bad("output that is a file", a_file, FileExistsError, "`output_dir=", "out", "is a file; give a folder"),
    Bad("output that is a parent", into_a_parent, ValueError, "`output_dir=", "model", "give another folder"),
    Bad("lambda beyond 1", in_memory(1.5), ValueError, "`interpolation_weight`", "1.5", "between 0 and 1"),
    Bad("lambda NaN", in_memory(float("nan")), ValueError, "`interpolation_weight`", "nan", "between 0 and 1"),
    Bad("lambda in words", in_memory("half"), TypeError, "`weight", "'half'", "a number"),
    Bad("lambda for three", in_memory(0.5, 3), ValueError, "`weight=", "0.5", "give 3 weights"),
    Bad("nothing to mix", in_memory(0.5, 0), ValueError, "`model`", "nothing", "call `hold_checkpoints` first"),
    adapters("adapter torn", ValueError, "`adapters", "adapter_model.safetensors", "copy or save it again",
             lambda w, tmp: w.torn("adapter", tmp, "adapter_model.safetensors")),
    adapters("adapter with NaN", ValueError, "`adapters[1]`", "NaN or infinite", "give a finite adapter",
             lambda w, tmp: w.poisoned("adapter", tmp, "adapter_model.safetensors")),
    adapters("adapter pickled", FileNotFoundError, "`adapters", "adapter_model.bin", "as safetensors",
             lambda w, tmp: w.pickled("adapter", tmp, "adapter_model.safetensors", "adapter_model.bin")),
    adapters("adapter without a configuration", FileNotFoundError, "`adapters", "adapter_config.json", "LoRA adapter",
             lambda w, tmp: w.with_file("adapter", tmp, "adapter_config.json", None)),
    adapters("adapter's configuration torn", ValueError, "`adapters", "adapter_config.json", "copy or save it again",
             lambda w, tmp: w.with_file("adapter", tmp, "adapter_config.json", "{")),
    adapters("adapter of an unknown kind", ValueError, "`adapters", "NEW", "only LoRA is supported",
             lambda w, tmp: w.edited("adapter", tmp, "adapter_config.json", peft_type="NEW")),
    adapters("half an adapter", ValueError, "`adapters", "lora_B", "copy or save it again", tensors(without_a_half)),
    adapters("adapter of another base", ValueError, "different sizes", "[(16, 16), (32, 16)]", "of one base",
             tensors(twice_as_wide)),
    adapters("adapter of another rank than it says", ValueError, "rank", "says 7", "copy or save it again",
             lambda w, tmp: w.edited("adapter", tmp, "adapter_config.json", r=7)),
    adapters("DoRA", ValueError, "`use_dora=True`", "not linear", "merge each adapter into the base first",
             lambda w, tmp: w.edited("adapter", tmp, "adapter_config.json", use_dora=True)),
    adapters("compression to rank 0", ValueError, "`svd_rank`", "0", "at least 1", svd_rank=0),
    adapters("compression to half a rank", TypeError, "`svd_rank`", "1.5", "an integer", svd_rank=1.5),
    adapters("base that is not there", FileNotFoundError, "`base_model", "none", "give the folder of a saved model",
             base_model="/none"),
    Bad("base of another vocabulary", lambda w, tmp: interpolate_adapters(
            [tensors(twice_as_wide)(w, tmp)], [1.0], tmp / "out", base_model=w / "model"
        ), ValueError, "`base_model", "shape", "the base that the adapter was trained on"),
]  # fmt: skip

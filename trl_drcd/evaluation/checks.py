"""Validate an evaluation: arguments before anything is loaded, shapes of models before anything is sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.compat.extras import require
from trl_drcd.evaluation.arguments import EvaluateArguments
from trl_drcd.evaluation.frechet import Reference
from trl_drcd.evaluation.judging import import_function, is_function
from trl_drcd.evaluation.metrics import METRICS
from trl_drcd.evaluation.strategies import Row, is_adapter
from trl_drcd.merging.adapters import BASE
from trl_drcd.merging.architecture import check_same_architecture, flat
from trl_drcd.merging.folders import find_folder, load_config, warn_of_other_base
from trl_drcd.validation.encoders import check_encoder
from trl_drcd.validation.messages import prefix_errors
from trl_drcd.validation.model_folders import check_model, check_on_hub, is_hub_name
from trl_drcd.validation.saved_files import open_safetensors, read_json, weight_files

EMBED_SOUND = {"MusicEmbedder", "MusicDescriptors"}
HEAR = EMBED_SOUND | {"TextAudioJudge"}
FURTHER = {
    "clap": ("audio", "a CLAP checkpoint"),
    "preference": ("audio", "a PreferenceModel"),
    "cross_encoder": ("text", "a cross-encoder with one output"),
    "reward_model": ("text", "a reward model with one output"),
}
"""Of each judge beside embedders and `judge`: what it takes, and what its folder holds."""


def check_parts(args: EvaluateArguments, digest: Callable[[str], str]) -> None:
    """
    Check that the folders and functions of the arguments exist and have the right kind.

    Args:
        args ([`EvaluateArguments`]): Settings of the evaluation.
        digest (`Callable`): [`~trl_drcd.evaluation.digests.content_digest`], to compare the reference's judge.

    Raises:
        FileExistsError: If `output_dir` is a file.
        FileNotFoundError: If a folder does not exist.
        ImportError: If a package that the report needs is not installed.
        ValueError: If a file is broken, a model is of the wrong kind, or a function cannot be imported.
    """
    if Path(args.output_dir).is_file():
        raise FileExistsError(f"`output_dir={args.output_dir}` is a file; give a folder")
    check_model("model", args.model)
    if args.codec is not None:
        with prefix_errors("codec"):
            SpectralCodec.from_pretrained(args.codec)
    kind = str(_config("model", args.model).get("model_type"))
    audio = args.codec is not None or kind.startswith(("musicgen", "dia"))
    for name in ("embedder", "second_embedder", "judge"):
        if folder := getattr(args, name):
            _check_judge(name, folder, audio)
    for name in FURTHER:
        if folder := getattr(args, name):
            _check_further(name, folder, audio)
    if args.embedder or args.second_embedder:
        require("matplotlib", "plot")  # of the report, which comes last
    if audio and args.listen:
        require("soundfile", "audio")
    names = [name.rpartition(".")[2] for name in args.metrics]
    for name in args.metrics:
        import_function("metrics", name)
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"`metrics` has two functions called `{repeated}`, the name of the metric; rename one")
    check_metric_names(names)
    if args.reference:
        if not (args.judge and audio):
            raise ValueError(f"`reference={args.reference}` needs a `judge` of audio, got {args.judge}")
        Reference.load(args.reference, digest(args.judge))


def check_metric_names(names: Iterable[str]) -> None:
    """
    Refuse a metric of the caller's that would replace one of this package.

    Raises:
        ValueError: If there is one.
    """
    if own := next((name for name in names if name in {metric.key for metric in METRICS}), None):
        raise ValueError(f"`metrics` has a function called `{own}`, which is a metric of this package; rename it")


def _check_judge(argument: str, folder: str, audio: bool) -> None:
    """Check that a folder holds an embedder or a judge, and for the kind of the samples, audio or text."""
    where = f"`{argument}={folder}`"
    if argument != "judge" and is_function(folder):
        import_function(argument, folder)
        return
    if not Path(folder).is_dir() and (Path(folder).exists() or not is_hub_name(folder)):
        raise FileNotFoundError(
            f"{where} is not a folder; give the folder of an embedder, a Hub name, or the dotted path of a function"
        )
    fields = _encoder_config(argument, folder)
    kind = fields.get("model_class")
    if "codec_type" in fields:
        raise ValueError(f"{where} is a codec; give an embedder")
    if kind is not None and not audio:
        raise ValueError(
            f"{where} is a {kind}, which takes audio, but the completions are text; give a sentence encoder"
        )
    if kind is None and audio:
        raise ValueError(f"{where} takes text, but the completions are audio; give one of {sorted(HEAR)}")
    if argument == "judge" and kind in EMBED_SOUND:
        raise ValueError(f"{where} is a {kind}, not a judge; give a TextAudioJudge")
    if kind is None:
        check_encoder(argument, folder)
    else:
        _check_weights(argument, Path(folder))


def _check_further(argument: str, name: str, audio: bool) -> None:
    """Check that CLAP, a preference model, a cross-encoder or a reward model is one, and for the kind of samples."""
    takes, what = FURTHER[argument]
    where, found = f"`{argument}={name}`", "audio" if audio else "text"
    if takes != found:
        raise ValueError(f"{where} judges {takes}, but the completions are {found}; leave it out")
    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or not is_hub_name(name)):
        raise FileNotFoundError(f"{where} is not a folder; give the folder of {what}, or a Hub name")
    fields = _config(argument, name)
    if argument in ("clap", "preference"):
        kind = fields.get("model_class", fields.get("model_type"))
        if kind != {"clap": "clap", "preference": "PreferenceModel"}[argument]:
            raise ValueError(f"{where} holds a {kind}; give the folder of {what}, or a Hub name")
    elif (outputs := _outputs(fields)) != 1:
        raise ValueError(f"{where} must have one output, got {outputs}; give {what}")
    if argument == "cross_encoder":
        check_encoder(argument, name, what)
    elif argument == "preference":
        _check_weights(argument, folder)
    else:
        check_model(argument, name)


def _check_weights(argument: str, folder: Path) -> None:
    """Check the file of weights of one of this package's models, unless it is on the Hub."""
    if folder.is_dir():
        with prefix_errors(argument):
            open_safetensors(folder / "model.safetensors")


def _config(argument: str, name: str) -> dict[str, Any]:
    """The config.json of a folder, or of a model on the Hub."""
    if not Path(name).is_dir():
        return check_on_hub(f"`{argument}={name}`", name)
    with prefix_errors(argument):
        return read_json(Path(name) / "config.json")


def _encoder_config(argument: str, name: str) -> dict[str, Any]:
    """The config.json of an embedder; empty for a sentence encoder that has none."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return {}
    try:
        return _config(argument, name)
    except FileNotFoundError:
        check_on_hub(f"`{argument}={name}`", name, file="config_sentence_transformers.json")
        return {}


def _outputs(fields: dict[str, Any]) -> Any:
    """Number of outputs of a sequence classifier, by its configuration; 2 is the default of transformers."""
    labels = fields.get("id2label")
    return len(labels) if isinstance(labels, dict) else fields.get("num_labels", 2)


def check_ends(base: Any, rows: Sequence[Row], base_name: str) -> None:
    """
    Compare the shapes of the rows' models with the base's, and the architectures of models that are mixed, without
    reading weights; models on the Hub must exist. Warn of an adapter that records another base.

    Raises:
        FileNotFoundError: If a name is neither a folder nor found on the Hub.
        ValueError: If a tensor has another shape than the base's, or models that are mixed compute otherwise.
    """
    for strategy, models in dict.fromkeys((row.strategy, row.models) for row in rows if len(row.models) > 1):
        if not any(is_adapter(model) for model in models if model != BASE):
            with prefix_errors(f"models` of `{strategy}"):
                _check_mixed([base_name if model == BASE else model for model in models])
    shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    mixed = {model for row in rows if len(row.models) > 1 for model in row.models}
    for strategy, model in dict.fromkeys((row.strategy, model) for row in rows for model in row.models):
        folder = Path(model)
        if model == BASE:
            continue
        if is_adapter(model):
            adapter = find_folder(model, "model")
            warn_of_other_base(adapter, base_name)
            found = _adapter_shapes(adapter)
            if model in mixed and (whole := _replaced(adapter, base)):
                raise ValueError(
                    f"`strategies` ({strategy}): {model} replaces a tensor of the base, {whole[0]}, of which PEFT "
                    "keeps one for all adapters, so it cannot be mixed in memory; merge with `trl-drcd merge` first"
                )
        elif folder.is_dir():
            found = _shapes([folder / file for file in weight_files(folder)])
        else:
            check_on_hub(f"`strategies` ({strategy})", model)
            continue
        for name, shape in found.items():
            if shapes.get(name, shape) != shape:
                raise ValueError(
                    f"`strategies` ({strategy}): {name} of {model} has shape {shape}, the base's has {shapes[name]}; "
                    "give models with the same base and vocabulary"
                )


def _check_mixed(models: Sequence[str]) -> None:
    """Check that full models have the same architecture."""
    configs = {model: flat(load_config(find_folder(model)).to_dict()) for model in models}
    for model in models[1:]:
        check_same_architecture(models[0], configs[models[0]], model, configs[model])


def _shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of some safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with open_safetensors(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _replaced(folder: Path, base: Any) -> list[str]:
    """Names of the tensors in an adapter that are no factors of it, and others than the base's."""
    own, found = base.state_dict(), []
    with open_safetensors(folder / "adapter_model.safetensors") as tensors:
        for name in sorted(name for name in tensors.keys() if ".lora_" not in name):  # noqa: SIM118
            of_base = own.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
            tensor = tensors.get_tensor(name)
            if of_base is None or of_base.shape != tensor.shape or not tensor.to(of_base).equal(of_base):
                found.append(name)
    return found


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the base's weights that a LoRA adapter changes or replaces."""
    own = _shapes([folder / "adapter_model.safetensors"])
    own = {name.removeprefix("base_model.model."): shape for name, shape in own.items()}
    shapes = {name: shape for name, shape in own.items() if ".lora_" not in name}
    for name, shape in own.items():
        if name.endswith(".lora_A.weight") and (other := own.get(name.replace("lora_A", "lora_B"))):
            shapes[name.replace(".lora_A.weight", ".weight")] = other[0], shape[1]
    return shapes

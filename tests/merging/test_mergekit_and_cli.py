"""The recipes through the real `mergekit-yaml`, what it leaves out, and the command line."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from merge_worlds import ROOT, WORLD, assert_equal_bits, assert_lerp, random_adapter, small_musicgen, tensors_of
from merge_worlds import trained_music_model as trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig, pipeline

import trl_drcd
from trl_drcd import cli
from trl_drcd.compat.threads import own_cores
from trl_drcd.merging import interpolate_checkpoints, merge_with_mergekit, mergekit
from trl_drcd.merging.cards import merge_recipe

RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of what the recipes find in the root of the repository: the shipped base, and trained models."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "recipes").symlink_to(RECIPES)
    for seed, name in enumerate(("quality", "diversity", "coef5", "coef10", "coef15")):
        trained(folder / "outputs" / f"musiclm_{name}", seed)
    return folder


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("lerp.yaml", ["quality", "diversity"]),
        pytest.param("lerp_base.yaml", ["quality", None], marks=pytest.mark.slow),
        pytest.param("lerp_uniform.yaml", ["quality", "coef5", "coef10", "coef15"], marks=pytest.mark.slow),
    ],
)
def test_the_recipes_run_as_they_stand(workplace, tmp_path, recipe, names):
    command = [mergekit.find_mergekit(), f"recipes/{recipe}", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=workplace, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    parents = [workplace / "outputs" / f"musiclm_{name}" if name else WORLD / "musiclm" for name in names]
    weights = [1 / len(parents)] * len(parents)
    assert_lerp(tmp_path / "out", parents, weights, tolerance=2.4e-7)
    ours = interpolate_checkpoints(parents, weights, tmp_path / "ours", dtype="float32")
    assert_lerp(tmp_path / "out", [ours], [1.0], tolerance=2.4e-7)


def test_the_command_line_merges_trained_music_models(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    ends = ["--quality", "outputs/musiclm_quality", "--diversity", "outputs/musiclm_diversity"]
    out = tmp_path / "merged"
    cli.main(["merge", *ends, "--interpolation_weight", "0.3", "--out", str(out)])
    parents = [workplace / "outputs" / f"musiclm_{name}" for name in ("quality", "diversity")]
    assert_lerp(out, parents, [0.7, 0.3], tolerance=2.4e-7)
    assert f"Merged: {out}" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "codec", "config.json", "generation_config.json", "merge.yaml", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["musiclm_quality", "musiclm_diversity"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert (card.data.pipeline_tag, card.data.library_name, card.data.license) == (
        "text-to-audio", "transformers", "apache-2.0",
    )  # fmt: skip
    assert card.data.tags == ["merge", "trl-drcd", "trl", "music"]
    assert "papers/2410.06084" in card.text and str(tmp_path) not in card.text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card.text, re.S)
    assert recipe == merge_recipe(["musiclm_quality", "musiclm_diversity"], [0.7, 0.3])
    assert pipeline("text-generation", model=str(out))("a slow reel", max_new_tokens=3)
    with pytest.raises(SystemExit, match=r"trl-drcd merge: error: `output_dir=.*` is not empty"):
        cli.main(["merge", *ends, "--out", str(out)])


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "name"), [([1.0, 0.0], "quality"), ([0, 1], "diversity")])
def test_the_ends_come_back_bit_for_bit(workplace, tmp_path, weights, name):
    parents = [workplace / "outputs" / f"musiclm_{parent}" for parent in ("quality", "diversity")]
    merge_with_mergekit(parents, weights, tmp_path / "m")
    assert_equal_bits(tensors_of(tmp_path / "m"), tensors_of(workplace / "outputs" / f"musiclm_{name}"))


@pytest.mark.slow
def test_musicgen_keeps_its_processor_and_gets_guidance_off(tmp_path, tokenizer):
    parents = [small_musicgen(tmp_path / name, seed, tokenizer) for seed, name in enumerate("ab")]
    merged = merge_with_mergekit(parents, [0.7, 0.3], tmp_path / "m", verify=True)
    assert_lerp(merged, parents, [0.7, 0.3], tolerance=2.4e-7)
    assert GenerationConfig.from_pretrained(merged).guidance_scale == 1.0
    assert GenerationConfig.from_pretrained(merged).decoder_start_token_id == 16
    assert {path.name for path in merged.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "merge.yaml", "model.safetensors"),
        *("preprocessor_config.json",),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert AutoProcessor.from_pretrained(merged).feature_extractor.sampling_rate == 16000
    audio = pipeline("text-to-audio", model=str(merged))("a slow tune", generate_kwargs={"max_new_tokens": 8})
    assert audio["sampling_rate"] == 16000 and audio["audio"].size > 0


def test_mergekit_refuses_a_codec_class_of_ones_own(tmp_path, tokenizer):
    """Why the tiny MusicGen has an EnCodec inside and not the spectral codec."""
    parents = [small_musicgen(tmp_path / name, seed, tokenizer) for seed, name in enumerate("ab")]
    for parent in parents:
        config = json.loads((parent / "config.json").read_text())
        config["audio_encoder"]["model_type"] = "spectral_codec"
        (parent / "config.json").write_text(json.dumps(config))
    (tmp_path / "lerp.yaml").write_text(merge_recipe([str(parent) for parent in parents], [0.5, 0.5], None))
    command = [mergekit.find_mergekit(), str(tmp_path / "lerp.yaml"), str(tmp_path / "m")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode and "model type" in run.stderr


def test_adapters_on_the_command_line(tmp_path, tokenizer, model, capsys):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        random_adapter(tmp_path / name, tmp_path / "base", seed)
    ends = ["--quality", str(tmp_path / "a"), "--diversity", str(tmp_path / "b")]
    cli.main(["merge", *ends, "--out", str(tmp_path / "m"), "--svd_rank", "3"])
    (error,) = re.findall(r"Relative error of the compression: (\S+)", capsys.readouterr().out)
    assert 0 < float(error) < 1
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.base_model == "base" and card.data.library_name == "peft"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert "Not loaded" not in capsys.readouterr().out
    cli.main(["merge", *ends, "--out", str(tmp_path / "n"), "--base_model", str(tmp_path / "base")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "n")
    (tmp_path / "base").rename(tmp_path / "moved")
    towards = ["--quality", str(tmp_path / "a"), "--diversity", "base", "--interpolation_weight", "0.2"]
    cli.main(["merge", *towards, "--out", str(tmp_path / "o")])
    assert f"Not loaded: the base model {tmp_path / 'base'} is not here" in capsys.readouterr().out
    (tmp_path / "moved").rename(tmp_path / "base")
    for words, message in (
        (["--quality", str(tmp_path / "a"), "--diversity", str(tmp_path / "base")], "mixes checkpoints and adapters"),
        ([*ends, "--dtype", "float32"], "`dtype=float32` is for full checkpoints"),
        (
            ["--quality", "x"],
            "give `quality` and `diversity`, with `interpolation_weight`; or `models`, with `weights`",
        ),
        ([*ends, "--models", "x", "--weights", "1"], "give `models`, with or without `weights`, or"),
        (["--models", "x", "y", "--weights", "1", "1"], "sum to 1, got"),
        (["--models", "x", "y", "z", "--interpolation_weight", "0.1"], "`interpolation_weight=0.1` is lambda of two"),
        (
            ["--models", "x", "y", "--weights", "0", "1", "--interpolation_weight", "0.1"],
            "lambda of two models without `weights`; give `weights`, one for each of the 2 models, or leave it out",
        ),
        ([*ends, "--interpolation_weight", "2"], "`interpolation_weight` must lie between 0 and 1, got 2.0"),
    ):
        with pytest.raises(SystemExit, match=f"trl-drcd merge: error: .*{message}"):
            cli.main(["merge", *words, "--out", str(tmp_path / "p")])


def test_lambda_is_of_two_models_however_they_are_named():
    models = {"models": ["a", "b"]}
    two = {"quality": "a", "diversity": "b"}
    for given in (models, two):
        assert cli.ends(cli.MergeArguments("out", **given)) == (["a", "b"], [0.5, 0.5])
        assert cli.ends(cli.MergeArguments("out", **given, interpolation_weight=0.25)) == (["a", "b"], [0.75, 0.25])
        assert cli.ends(cli.MergeArguments("out", **given, interpolation_weight=0)) == (["a", "b"], [1.0, 0.0])


def test_several_models_with_weights_and_a_yaml_file(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("trl_drcd.merging.merge_with_mergekit", lambda *a, **k: seen.update(args=a, **k))
    models = [str(tmp_path / name) for name in "abc"]
    for name in models:
        Path(name).mkdir()
    words = ["--models", *models, "--weights", "0.5", "0.25", "0.25", "--dtype", "float32", "--overwrite"]
    cli.main(["merge", *words, "--out", "m"])
    assert seen == {"args": (models, [0.5, 0.25, 0.25], "m", "float32", True), "verify": True}
    cli.main(["merge", "--models", *models, "--out", "m"])
    assert seen["args"] == (models, [1 / 3] * 3, "m", None, False)
    (tmp_path / "x.yaml").write_text(f"quality: {models[0]}\ndiversity: {models[1]}\ninterpolation_weight: 0.25\n")
    cli.main(["merge", "--config", str(tmp_path / "x.yaml"), "--out", "m"])
    assert seen["args"] == (models[:2], [0.75, 0.25], "m", None, False)
    cli.main(["merge", "--config", str(tmp_path / "x.yaml"), "--out", "m", "--interpolation_weight", "1"])
    assert seen["args"][1] == [0, 1]


def test_help_version_and_unknown_commands(capsys):
    for words, code in (([], 2), (["nonsense"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == code and "commands: train, merge" in capsys.readouterr().out
    cli.main(["--version"])
    assert capsys.readouterr().out == f"trl-drcd {trl_drcd.__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["merge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(word in text for word in ("--interpolation_weight", "--svd_rank", "LoRA", "--config FILE.yaml"))
    with pytest.raises(SystemExit, match="unknown argument '--interpolation'; did you mean `--interpolation_weight`"):
        cli.main(["merge", "--out", "x", "--interpolation", "1"])


def test_train_launches_the_packages_script(monkeypatch, capsys):
    seen, statuses = [], [0, 3]
    monkeypatch.setattr(
        "trl_drcd.launch.processes.run_job", lambda command: (seen.append(command), statuses.pop(0))[1]
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli.main(["train", "music", "--config", "x.yaml", "--max_steps", "1"])
    words = ["launch", "--quiet", str(cli.SCRIPTS / "train_music.py"), "--config", "x.yaml", "--max_steps", "1"]
    assert seen[0][-7:] == words and seen[0][1:3] == ["-c", cli.ACCELERATE]
    monkeypatch.delenv("OMP_NUM_THREADS")  # then a thread per core, where accelerate alone would set 1
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "text"])
    words = ["launch", "--quiet", "--num_cpu_threads_per_process", str(own_cores())]
    assert seen[1][-5:] == [*words, str(cli.SCRIPTS / "train_text.py")] and end.value.code == 3
    assert all((cli.SCRIPTS / f"{script}.py").is_file() for script in cli.TRAINERS.values())
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "usage: trl-drcd train {music,text}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["music", "text"])
def test_the_help_of_train_names_what_there_is_and_no_file_of_the_repository(capsys, name):
    with pytest.raises(SystemExit):
        cli.main(["train", name, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: trl-drcd train {name} ") and "--diversity_coef" in text and "recipes/" not in text


def test_the_help_of_evaluate_says_how_strategies_are_written(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert "--config FILE.yaml" in text and "interpolation_weight: [0, 0.5, 1]}" in text and "recipes/" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_with_one_line(monkeypatch, capsys, number):
    monkeypatch.setitem(cli.COMMANDS, "merge", lambda words: signal.raise_signal(number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge"])
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"trl-drcd merge: ended by {number.name}: nothing is written; call this again\n"


def test_the_console_script_is_this_command_line():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"trl-drcd": f"{cli.__name__}:{cli.main.__name__}"}


def test_mergekit_is_not_asked_to_merge_what_does_not_fit(tmp_path, tokenizer, model, monkeypatch):
    model.save_pretrained(tmp_path / "a")
    model.bfloat16().save_pretrained(tmp_path / "b")
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ValueError, match=r"different data types of .*torch.float32 and torch.bfloat16; set `dtype`"):
        merge_with_mergekit([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "m")


def test_a_failure_of_mergekit_is_shown_and_leaves_nothing(tmp_path, tokenizer, model, monkeypatch):
    for name in "ab":
        model.save_pretrained(tmp_path / name)
    script = tmp_path / "mergekit-yaml"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such luck')\n")
    script.chmod(0o755)
    monkeypatch.setattr(mergekit, "find_mergekit", lambda: str(script))
    with pytest.raises(RuntimeError, match=r"mergekit-yaml failed:\nno such luck"):
        merge_with_mergekit([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mergekit-yaml"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(ImportError, match=r'pip install "trl-drcd\[merge\]"'):
        merge_with_mergekit([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "m")


def test_a_recipe():
    assert merge_recipe(["/x/a", "b/c"], [0.75, 0.25], "float32").splitlines() == [
        "merge_method: linear", "models:", '  - model: "/x/a"', "    parameters: {weight: 0.75}",
        '  - model: "b/c"', "    parameters: {weight: 0.25}", "dtype: float32",
    ]  # fmt: skip
    assert merge_recipe(["a", "b"], [0.0, 1.0]) == 'merge_method: passthrough\nmodels:\n  - model: "b"\n'


def test_the_recipes_name_the_outputs_of_the_runs():
    for name in ("quality", "diversity"):
        text = (RECIPES / "music" / f"musiclm_{name}.yaml").read_text()
        assert f"output_dir: outputs/musiclm_{name}\n" in text
        assert f"  - model: ./outputs/musiclm_{name}\n" in (RECIPES / "lerp.yaml").read_text()


def test_json_is_untouched_by_a_merge(workplace, tmp_path):
    parents = [workplace / "outputs" / f"musiclm_{name}" for name in ("quality", "diversity")]
    merged = interpolate_checkpoints(parents, [0.5, 0.5], tmp_path / "m")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((merged / name).read_text()) == json.loads((parents[0] / name).read_text())

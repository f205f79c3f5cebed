"""Bad evaluations: strategies, settings, judges, and results that are there already."""

from pathlib import Path
from typing import Any

from bad_world import Bad
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_drcd.audio import TextAudioJudge

BASE = {"name": "base"}


def strategy(title: str, value: str, remedy: str, argument: str = "`strategies[1]`", **changed: Any) -> Bad:
    """The base and one more strategy, to which `{model}` and the like are names of folders of the world."""

    def act(world: Any, tmp: Path) -> None:
        def place(item: Any) -> Any:
            return str(world / item[1:-1]) if isinstance(item, str) and item.startswith("{") else item

        given = {
            key: [place(part) for part in item] if isinstance(item, list) else place(item)
            for key, item in ({"name": "x"} | changed).items()
        }
        world.evaluate(tmp, strategies=[BASE, given])

    return Bad(title, act, ValueError, argument, value, remedy)


def setting(name: str, value: str, remedy: str, error: type[BaseException] = ValueError, **changed: Any) -> Bad:
    """A setting of the evaluation; `{codec}` and the like are folders of the world."""

    def act(world: Any, tmp: Path) -> None:
        places = {
            key: str(world / item[1:-1]) if isinstance(item, str) and item.startswith("{") else item
            for key, item in changed.items()
        }
        world.evaluate(tmp, **places)

    return Bad(name, act, error, f"`{next(iter(changed))}", value, remedy)


def changed_model(
    name: str, change: Any, error: type[BaseException], value: str, remedy: str, argument: str = "`strategies[1]`"
) -> Bad:
    """A strategy whose model is `change(world, tmp)`, after one that could be sampled."""

    def act(world: Any, tmp: Path) -> None:
        world.evaluate(tmp, strategies=[BASE, {"name": "x", "model": str(change(world, tmp))}])

    return Bad(name, act, error, argument, value, remedy)


def other_vocabulary(world: Any, tmp: Path) -> Path:
    world.model(vocab_size=99).save_pretrained(tmp / "wide")
    return tmp / "wide"


def classifier(world: Any, tmp: Path, outputs: int = 3) -> Path:
    """A sequence classifier with the world's tokenizer."""
    config = LlamaConfig(
        vocab_size=len(world.tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, num_labels=outputs,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp / "classifier")
    world.tokenizer.save_pretrained(tmp / "classifier")
    return tmp / "classifier"


def broken_judge(argument: str, what: str, break_it: Any, error: type[BaseException], value: str, remedy: str) -> Bad:
    """A judge of text from `break_it(a classifier of one output)`."""

    def act(world: Any, tmp: Path) -> None:
        folder = classifier(world, tmp, outputs=1)
        break_it(folder)
        world.evaluate(tmp, **{argument: str(folder)})

    return Bad(f"a {argument} {what}", act, error, f"`{argument}", value, remedy)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:99])


def with_modules(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "os.path.Module"}]')


def with_torn_modules(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"idx": 0,')


def earlier(name: str, content: str, value: str) -> Bad:
    """A `results.jsonl` that is there already."""

    def act(world: Any, tmp: Path) -> None:
        (tmp / "out").mkdir()
        (tmp / "out" / "results.jsonl").write_text(content)
        world.evaluate(tmp)

    return Bad(name, act, ValueError, "results.jsonl", value, "remove that line, or the file")


def torn_reference(world: Any, tmp: Path) -> None:
    (tmp / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    judge = TextAudioJudge(["slow"], {}, channels=[4], n_mels=8, feature_size=8, embedding_size=8, text_size=8)
    judge.save_pretrained(tmp / "judge")
    places = {"judge": str(tmp / "judge"), "codec": str(world / "codec")}
    world.evaluate(tmp, reference=str(tmp / "torn.safetensors"), **places)


def into_a_file(world: Any, tmp: Path) -> None:
    (tmp / "out").touch()
    world.evaluate(tmp)


ROWS = [
    setting("no strategies", "empty", "give at least one", strategies=[]),
    setting("strategies as a word", "'base'", "a list of mappings", TypeError, strategies="base"),
    setting("strategies as a mapping", "{'name': 'base'}", "a list of mappings", TypeError, strategies=BASE),
    setting("a strategy that is a word", "'base'", "a mapping with a `name`", strategies=["base"]),
    strategy("an unknown key", "['gamma']", "known are", gamma=3),
    strategy("a name that is a number", "3", "a `name`", name=3),
    strategy("a name with control characters", "\\x1b", "printable", name="x\x1b[2J"),
    strategy("a name with a line break", "\\n", "printable", name="x\ny"),
    strategy("a name that turns the writing round", "\\u202e", "printable", name="x\u202ey"),
    strategy("an enormous name", "(100002 characters)", "at most 100", name="x" * 100_000),
    strategy("a name twice", "base", "write a sweep as one strategy with a list", name="base"),
    strategy("two sweeps at once", "['guidance_scale', 'temperature']", "at most one setting",
             guidance_scale=[1], temperature=[1]),
    strategy("a sweep of nothing", "[]", "at least one value", temperature=[]),
    strategy("an enormous sweep", "10001", "at most", temperature=[1.0] * 10_001),
    strategy("guidance in words", "'high'", "a number", guidance_scale="high"),
    strategy("guidance NaN in a sweep", "nan", "finite and at least 0", guidance_scale=[1, float("nan")]),
    strategy("early steps without guidance", "`early_steps`", "other than 1", early_steps=2),
    strategy("half an early step", "0.5", "whole number", early_steps=0.5, guidance_scale=2),
    strategy("early steps below 0", "-1", "at least 0", early_steps=-1, guidance_scale=2),
    strategy("an early scale alone", "`early_guidance_scale`", "needs `early_steps`", early_guidance_scale=1,
             guidance_scale=2),
    strategy("an early scale below 0", "-1", "at least 0", early_guidance_scale=-1, early_steps=2, guidance_scale=2),
    strategy("a checkpoint of the base", "`checkpoint`", "needs a `model`", checkpoint=20),
    strategy("half a training step", "0.5", "whole number", checkpoint=0.5, model="{model}"),
    strategy("checkpoint 0", "0", "at least 1", checkpoint=[0, 20], model="{model}"),
    strategy("temperature below 0", "-1", "above 0", temperature=-1),
    strategy("temperature true", "True", "a number", temperature=True),
    strategy("coefficient in words", "'much'", "a number", diversity_coef="much"),
    strategy("negative prompt as a number", "3", "a string", negative_prompt=3, guidance_scale=2),
    strategy("a model and models", "give only one of them", "`models`", model="{model}", models=["{other}"]),
    strategy("models as one word", "'ab'", "a list of folders", models="ab"),
    strategy("a model that is a number", "3", "a folder or a Hub name", model=3),
    strategy("lambda beyond 1", "1.5", "in [0, 1]", models=["{model}", "{other}"], interpolation_weight=1.5),
    strategy("lambda in words", "'half'", "a number", models=["{model}", "{other}"], interpolation_weight="half"),
    strategy("lambda for one model", "['", "exactly two `models`", models=["{model}"], interpolation_weight=0.5),
    strategy("weights that sum to more", "[0.5, 0.6]", "sum to 1", models=["{model}", "{other}"], weights=[0.5, 0.6]),
    strategy("weights in words", "['a', 'b']", "numbers", models=["{model}", "{other}"], weights=["a", "b"]),
    strategy("an adapter among models", "adapter", "merge the adapters first", models=["{model}", "{adapter}"]),
    changed_model("a model that is not there", lambda w, tmp: tmp / "none", FileNotFoundError, "none",
                  "give the folder of a saved model"),
    changed_model("a model that is neither there nor on the hub", lambda w, tmp: "outputs/none", FileNotFoundError,
                  "outputs/none is not a folder", "train it first", "`strategies` (x)"),
    changed_model("a model torn", lambda w, tmp: w.torn("model", tmp), ValueError, "safetensors", "copy or save it"),
    changed_model("a model pickled", lambda w, tmp: w.pickled("model", tmp), FileNotFoundError, "pytorch_model.bin",
                  "save the model as safetensors"),
    changed_model("a model with code of its own", lambda w, tmp: w.with_code("model", tmp), ValueError, "auto_map",
                  "is not run"),
    changed_model("an adapter pickled",
                  lambda w, tmp: w.pickled("adapter", tmp, "adapter_model.safetensors", "adapter_model.bin"),
                  FileNotFoundError, "adapter_model.bin", "as safetensors"),
    changed_model("a model of another vocabulary", other_vocabulary, ValueError, "(99, 16)", "base and vocabulary",
                  "`strategies` (x)"),
    setting("a base that is not there", "/none", "give the folder", FileNotFoundError, model="/none"),
    setting("one prompt", "1", "at least 2", num_prompts=1),
    setting("one sample", "1", "at least 2", samples_per_prompt=1),
    setting("likelihoods of no sample", "0", "from 1 to `samples_per_prompt=2`", likelihood_samples=0),
    setting("likelihoods of too many samples", "3", "from 1 to `samples_per_prompt=2`", likelihood_samples=3),
    setting("prompts in words", "'all'", "a whole number", TypeError, num_prompts="all"),
    setting("batches of nothing", "0", "at least 1", batch_size=0),
    setting("more prompts than there are", "99", "has 8 distinct prompts", num_prompts=99),
    setting("fewer prompts than are skipped", "9", "`skip_prompts=9`", num_prompts=9, skip_prompts=9),
    setting("prompts skipped below 0", "-1", "at least 0", skip_prompts=-1),
    setting("teacher's guidance below 0", "-1", "finite and at least 0", guidance_scale=-1),
    setting("a seed below 0", "-1", "at least 0", seed=-1),
    setting("a codec that is not there", "/none", "give the folder of a codec", FileNotFoundError, codec="/none"),
    setting("an embedder for a codec", "embedder", "give the folder of a codec", codec="{embedder}"),
    setting("a codec for an embedder", "codec", "an embedder", embedder="{codec}"),
    setting("an embedder that hears, of texts", "embedder", "completions are text", embedder="{embedder}"),
    setting("an embedder for a judge", "embedder", "not a judge", judge="{embedder}", codec="{codec}"),
    setting("an embedder for a preference model", "holds a MusicEmbedder", "the folder of a PreferenceModel",
            preference="{embedder}", codec="{codec}"),
    setting("a preference model that is not there", "/none", "give the folder", FileNotFoundError, preference="/none",
            codec="{codec}"),
    setting("a preference model of sound, of texts", "judges audio", "leave it out", preference="{embedder}"),
    setting("a language model for CLAP", "holds a llama", "a CLAP checkpoint", clap="{model}", codec="{codec}"),
    setting("CLAP that is not there", "/none", "give the folder", FileNotFoundError, clap="/none", codec="{codec}"),
    setting("CLAP that is not on the Hub either", "nobody/none", "correct the name", FileNotFoundError,
            clap="nobody/none", codec="{codec}"),
    setting("CLAP of texts", "judges audio", "leave it out", clap="{model}"),
    setting("a cross-encoder of sound", "judges text", "leave it out", cross_encoder="{model}", codec="{codec}"),
    setting("a cross-encoder that is not there", "/none", "give the folder", FileNotFoundError, cross_encoder="/none"),
    setting("a language model for a cross-encoder", "got 2", "with one output", cross_encoder="{model}"),
    setting("a reward model of sound", "judges text", "leave it out", reward_model="{model}", codec="{codec}"),
    setting("a reward model that is not there", "/none", "give the folder", FileNotFoundError, reward_model="/none"),
    setting("a reward model that is not on the Hub either", "nobody/none", "correct the name", FileNotFoundError,
            reward_model="nobody/none"),
    setting("a codec for a reward model", "got 2", "with one output", reward_model="{codec}"),
    Bad("a reward model of three outputs", lambda w, tmp: w.evaluate(tmp, reward_model=str(classifier(w, tmp))),
        ValueError, "`reward_model=", "got 3", "a reward model with one output"),
    *(broken_judge(argument, "pickled", pickled, FileNotFoundError, "pytorch_model.bin", "as safetensors")
      for argument in ("reward_model", "cross_encoder", "embedder")),
    broken_judge("reward_model", "torn", torn, ValueError, "model.safetensors is truncated", "copy or save it again"),
    *(broken_judge(argument, "with code", with_modules, ValueError, "'os.path.Module'", "of sentence_transformers")
      for argument in ("cross_encoder", "embedder", "judge")),
    broken_judge("cross_encoder", "with torn modules", with_torn_modules, ValueError, "modules.json is not valid JSON",
                 "copy or save it again"),
    setting("an embedder that is not on the Hub either", "nobody/none", "correct the name", FileNotFoundError,
            embedder="nobody/none"),
    setting("a judge that is not there", "/none", "give", FileNotFoundError, judge="/none"),
    setting("omega NaN", "'nan'", "a number or `equal`", omega="nan"),
    setting("omega in words", "'much'", "a number or `equal`", omega="much"),
    setting("omega that compares one strategy", "got only `base`", "give a number", omega="equal",
            preference="{model}"),
    setting("unknown data type", "'float7'", "float32, bfloat16 or float16", dtype="float7"),
    setting("no process", "0", "at least 1", num_processes=0),
    setting("metrics as one word", "'os.system'", "a list of texts", TypeError, metrics="os.system"),
    setting("a metric that is nowhere", "'none.such'", "cannot be imported as module.function", metrics=["none.such"]),
    setting("a metric that is no function", "'math.pi'", "which is not callable", metrics=["math.pi"]),
    setting("a reference without a judge", "None", "needs a `judge` of audio", reference="/none"),
    setting("strategies that are none of these", "['other']", "the strategies are", only=["other"]),
    Bad("a reference torn", torn_reference, ValueError, "`reference`", "torn.safetensors", "copy or save it again"),
    earlier("results with a broken line", '{"row": \n{"row": "a"}\n', "line 1"),
    earlier("results of something else", '{"x": 1}\n', "line 1"),
    Bad("output that is a file", into_a_file, FileExistsError, "`output_dir=", "out", "give a folder"),
]  # fmt: skip
for row in ROWS:  # names are unique over all tables
    row.name = f"evaluation: {row.name}"

"""Bad command lines of the recipes and of `trl-drcd`: each ends with one line, no traceback."""

from pathlib import Path
from typing import Any

from bad_world import Bad

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 10)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED_BOMB = "a: &a {x0: 0, x1: 1}\n" + "".join(
    f"{now}: &{now} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)


def recipe(
    name: str, argument: str, value: str, remedy: str, which: str = "music", *words: str, **changed: Any
) -> Bad:
    """The music or the text recipe; `{adapter}` and the like are folders of the world."""

    def act(world: Any, tmp: Path) -> None:
        places = {
            key: str(world / item[1:-1]) if isinstance(item, str) and item.startswith("{") else item
            for key, item in changed.items()
        }
        world.recipe(which, tmp, *words, **places)

    return Bad(f"{which} recipe: {name}", act, SystemExit, argument, value, remedy)


def broken(name: str, argument: str, change: Any, value: str, remedy: str, which: str = "music") -> Bad:
    """The recipe with a folder that `change(world, tmp)` breaks."""

    def act(world: Any, tmp: Path) -> None:
        world.recipe(which, tmp, **{argument: change(world, tmp)})

    return Bad(f"{which} recipe: {name}", act, SystemExit, f"`{argument}", value, remedy)


def yaml(name: str, content: str | bytes, value: str, remedy: str, command: str = "evaluate") -> Bad:
    """A YAML file for `trl-drcd evaluate`, or for a recipe."""

    def act(world: Any, tmp: Path) -> None:
        file = world.yaml(tmp, content)
        if command == "evaluate":
            world.command("evaluate", "--config", file)
        else:
            world.recipe(command, tmp, "--config", file)

    return Bad(
        f"YAML: {name}" + ("" if command == "evaluate" else f" ({command})"), act, SystemExit, "`", value, remedy
    )


def command(name: str, argument: str, value: str, remedy: str, *words: str) -> Bad:
    """`trl-drcd` with these words; `{model}` and the like are folders of the world, `{tmp}` is an empty one."""

    def act(world: Any, tmp: Path) -> None:
        places = {f"{{{p}}}": str(world / p) for p in ("model", "other", "adapter")} | {"{tmp}": str(tmp / "out")}
        world.command(*(places.get(word, word) for word in words))

    return Bad(f"command: {name}", act, SystemExit, argument, value, remedy)


def merge_with_code(world: Any, tmp: Path) -> None:
    world.command(
        "merge", "--quality", world / "model", "--diversity", world.with_code("model", tmp), "--out", tmp / "o"
    )


def merge_torn(world: Any, tmp: Path) -> None:
    world.command("merge", "--quality", world / "model", "--diversity", world.torn("model", tmp), "--out", tmp / "o")


def claims(world: Any, tmp: Path) -> None:
    import claims

    (tmp / "results.jsonl").write_text('{"strategy": "base"}\n')
    claims.main([str(tmp / "results.jsonl")])


def missing_prompt(world: Any, tmp: Path) -> None:
    world.recipe("text", tmp, dataset=world.prompts(tmp, '{"prompt": "a"}\n{"prompt": '))


def wrong_embedder(world: Any, tmp: Path) -> None:
    embedder = world.edited("embedder", tmp, model_class="Other")
    world.recipe("music", tmp, embedder=embedder, codec=world / "codec")


STRATEGY = "model: m\ndataset: d\nstrategies:\n"
ROWS = [
    recipe("unknown flag", "unknown argument", "'--lerning_rate'", "did you mean `--learning_rate`?", "music",
           "--lerning_rate", "1"),
    recipe("prefix of a flag", "unknown argument", "'--learning-rat'", "did you mean `--learning-rate`?", "text",
           "--learning-rat", "1"),
    recipe("steps in words", "--max_steps", "'many'", "invalid int value", max_steps="many"),
    recipe("no data set", "`dataset`", "missing", "give a Hub name", dataset=""),
    recipe("data that is not there", "`dataset=", "none.jsonl", "give a JSONL", dataset="none.jsonl"),
    recipe("no model there", "`model_name_or_path", "./none", "give the folder", model_name_or_path="./none"),
    recipe("guidance NaN", "`guidance_scale`", "nan", "finite", guidance_scale="nan"),
    recipe("diversity without an embedder", "`diversity_coef=5.0`", "None", "needs `embedder`", diversity_coef=5),
    recipe("embedder without a codec", "`embedder=", "embedder", "no `codec`", embedder="{embedder}"),
    recipe("evaluation without data", "`eval_strategy=", "steps", "`eval_dataset`", eval_strategy="steps"),
    recipe("no held-out prompts", "`max_eval_prompts`", "0", "at least 1", max_eval_prompts=0),
    recipe("samples below 0", "`num_samples`", "-1", "at least 0", num_samples=-1),
    recipe("no minutes", "`max_minutes`", "0.0", "finite and above 0", max_minutes=0),
    recipe("minutes NaN", "`max_minutes`", "nan", "finite and above 0", max_minutes="nan"),
    recipe("nothing to resume", "`resume_from_checkpoint=", "true", "no checkpoint", resume_from_checkpoint="true"),
    recipe("resuming from elsewhere", "`resume_from_checkpoint=", "/none", "not a complete checkpoint",
           resume_from_checkpoint="/none"),
    recipe("a reward without a module", "`reward_funcs=", "length", "give `module.function`", reward_funcs="length"),
    recipe("a reward of a module that is not there", "`reward_funcs=", "there is no module `no_such`",
           "give `module.function`", reward_funcs="no_such.length"),
    recipe("a reward that its module has not", "`reward_funcs=", "no function `nothing`", "give `module.function`",
           "text", reward_funcs="json.nothing"),
    recipe("an embedder of a module that is not there", "`embedder=", "there is no module `no_such`",
           "give `module.function`", embedder="no_such.embed"),
    recipe("weights of no rewards", "`reward_weights=", "[1.0]", "without `reward_funcs`", reward_weights=1),
    recipe("neither a model nor a YAML file", "`model_name_or_path`", "missing", "`--config`", "script",
           model_name_or_path=None),
    recipe("a prompt that is empty", "`dataset=", "rows [1]", "give every row a prompt", dataset="{empty.jsonl}"),
    recipe("LoRA on nothing", "Target modules", "none_proj", "check the target modules", "text", use_peft=True,
           lora_target_modules="none_proj"),
    recipe("stream without an end", "`max_steps", "-1", "set `max_steps`", "text", streaming=True, max_steps=None),
    recipe("longer than the model reads", "`max_completion_length=", "5000", "shorten it", "text",
           max_completion_length=5000),
    broken("model torn", "model_name_or_path", lambda w, tmp: w.torn("model", tmp), "safetensors", "copy or save it"),
    broken("model pickled", "model_name_or_path", lambda w, tmp: w.pickled("model", tmp), ".bin", "as safetensors"),
    broken("model with code of its own", "model_name_or_path", lambda w, tmp: w.with_code("model", tmp), "auto_map",
           "`trust_remote_code`"),
    broken("model with code of its own", "model_name_or_path", lambda w, tmp: w.with_code("model", tmp), "auto_map",
           "`trust_remote_code`", "text"),
    broken("adapter for a model", "model_name_or_path", lambda w, tmp: w / "adapter", "adapter",
           "merge it into its base first", "text"),
    broken("codec torn", "codec", lambda w, tmp: w.torn("codec", tmp, "codec.safetensors"), "codec.safetensors",
           "copy or save it again"),
    Bad("music recipe: embedder of another class", wrong_embedder, SystemExit, "`embedder`", "Other",
        "expected a MusicEmbedder"),
    Bad("text recipe: line broken off", missing_prompt, SystemExit, "`dataset=", "line 2", "one JSON object on each"),
    yaml("not there", "", "none.yaml", "give a YAML file"),
    yaml("empty", "", "None", "lines of `name: value`"),
    yaml("a list", "- a\n- b\n", "['a', 'b']", "lines of `name: value`"),
    yaml("torn", "model: [a, b\n", "line 2", "correct that line"),
    yaml("no text", b"\xff\xfe\x00", "byte 0", "UTF-8"),
    yaml("control characters", "model: a\x00b\n", "#x0000", "correct that line"),
    yaml("code", "model: !!python/object/apply:os.system ['touch ran']\n", "python/object/apply", "correct that line"),
    yaml("bomb", BOMB, "100000", "use fewer anchors"),
    yaml("bomb", BOMB, "100000", "use fewer anchors", "music"),
    yaml("bomb of merged keys", MERGED_BOMB, "100000", "use fewer anchors"),
    yaml("bomb within the strategies", BOMB.replace("i: &i", "strategies: &i"), "100000", "use fewer anchors"),
    yaml("anchor within itself", "model: &a [*a]\n", "line 1", "remove it"),
    yaml("nested without an end", "a: " + "[" * 5000, "nested too deeply", "a few levels"),
    yaml("enormous", "# " + "x" * 2**20, "1048578 bytes", "at most 1048576"),
    yaml("unknown key", "model: a\nstrategys: []\n", "strategys", "did you mean `strategies`?"),
    yaml("unknown key", "lerning_rate: 1\n", "lerning_rate", "did you mean `learning_rate`?", "music"),
    yaml("a key twice", "seed: 1\nseed: 2\n", "`seed` twice", "keep one"),
    yaml("environment", "env: {WANDB_BASE_URL: elsewhere}\n", "`env`", "in the shell", "music"),
    yaml("a list for a number", "max_steps: [1, 2]\n", "`max_steps`", "a whole number", "music_yaml"),
    yaml("nothing for a number", "num_prompts:\nmodel: a\ndataset: b\n", "None", "a whole number"),
    yaml("a number for a list", STRATEGY.replace("strategies:\n", "strategies: 3\n"), "3", "a list of mappings"),
    yaml("a strategy with an unknown key", STRATEGY + "  - {name: a, gamma: 3}\n", "['gamma']", "known are"),
    yaml("a strategy's name that leads out", STRATEGY + "  - {name: \"../../x\\0\"}\n", "\\x00", "printable"),
    command("merge without models", "`quality`", "`diversity`", "give", "merge", "--out", "{tmp}"),
    command("merge of a model and an adapter", "`models`", "adapter", "merge each adapter into its base first",
            "merge", "--quality", "{model}", "--diversity", "{adapter}", "--out", "{tmp}"),
    command("lambda beyond 1", "`interpolation_weight`", "1.5", "between 0 and 1", "merge", "--quality", "{model}",
            "--diversity", "{other}", "--out", "{tmp}", "--interpolation_weight", "1.5"),
    command("lambda in words", "--interpolation_weight", "'half'", "invalid float value", "merge", "--quality",
            "{model}", "--diversity", "{other}", "--out", "{tmp}", "--interpolation_weight", "half"),
    command("data type for adapters", "`dtype=", "float16", "full checkpoints", "merge", "--quality", "{adapter}",
            "--diversity", "base", "--out", "{tmp}", "--dtype", "float16"),
    command("nothing to evaluate", "--model", "--dataset", "required", "evaluate"),
    command("a flag without its file", "`config=", "`config=`", "give a YAML file", "evaluate", "--config"),
    Bad("command: a merge recipe with code of its own", merge_with_code, SystemExit, "`models[1]`", "auto_map",
        "use a model whose class is in transformers"),
    Bad("claims: results of something else", claims, SystemExit, "results.jsonl", "line 1", "remove that line"),
    Bad("command: a merge of torn weights", merge_torn, SystemExit, "`models", "safetensors", "copy or save it again"),
]  # fmt: skip


def _not_there(world: Any, tmp: Path) -> None:
    world.command("evaluate", "--config", str(tmp / "none.yaml"))


def _from_yaml(world: Any, tmp: Path) -> None:
    world.recipe("music", tmp, "--config", world.yaml(tmp, "max_steps: [1, 2]\n"), max_steps=None)


for _row in ROWS:
    if _row.name == "YAML: not there":
        _row.act = _not_there
    if _row.name.startswith("YAML: a list for a number"):
        _row.act = _from_yaml

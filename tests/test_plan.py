"""What a row's numbers depend on, what is read of the data set, and a user's own functions."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from conftest import make_model

from trl_drcd.evaluation import digests, plan
from trl_drcd.evaluation.allowed import further_end
from trl_drcd.evaluation.arguments import EvaluateArguments, help_on_strategies
from trl_drcd.evaluation.digests import content_digest, hub_revision
from trl_drcd.evaluation.judging import embed_all, is_function, load_embedder
from trl_drcd.evaluation.results import Result
from trl_drcd.evaluation.strategies import KEYS

# ---------------------------------------------------------------- digests


@pytest.fixture
def folder(tmp_path, tokenizer):
    make_model(tokenizer).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "additional_chat_templates/tool.jinja", "vocab.txt", "merges.txt", "spiece.model"),
        *("config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "some.file.of.a.tokenizer"),
    ],
)
def test_a_digest_changes_with_every_file_that_is_read(folder, name):
    before = content_digest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    with open(folder / name, "ab") as file:
        file.write(b"x")
    assert content_digest(folder) != before


@pytest.mark.parametrize(
    "name", ["README.md", "curves.png", "training_args.bin", "log.jsonl", "checkpoint-3/model.safetensors", ".x.tmp"]
)
def test_a_digest_does_not_change_with_what_is_not_read(folder, name):
    before = content_digest(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert content_digest(folder) == before
    shutil.move(folder, folder.with_name("elsewhere"))
    assert content_digest(folder.with_name("elsewhere")) == before  # nor with its name


def test_modules_of_a_sentence_encoder_are_read_in_whatever_folder(tmp_path):
    (tmp_path / "0_Pooling").mkdir()
    (tmp_path / "0_Pooling" / "config.json").write_text("{}")
    plain = content_digest(tmp_path)
    (tmp_path / "modules.json").write_text("[]")
    before = content_digest(tmp_path)
    (tmp_path / "0_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    assert len({plain, before, content_digest(tmp_path)}) == 3


def test_a_model_of_the_hub_that_was_pushed_again_has_another_digest(monkeypatch):
    class Info:
        sha = "1" * 40

    monkeypatch.setattr(digests, "model_info", lambda name, timeout: Info)
    first = content_digest("owner/model")
    monkeypatch.setattr(Info, "sha", "2" * 40)
    assert content_digest("owner/model") != first and hub_revision("owner/model") == "2" * 40


def test_offline_the_revision_is_the_one_in_the_cache(monkeypatch, tmp_path):
    def offline(name, timeout):
        raise ConnectionError

    monkeypatch.setattr(digests, "model_info", offline)
    assert hub_revision("owner/model") is None and content_digest("owner/model") == content_digest("owner/model")
    cached = tmp_path / "snapshots" / "3" / "config.json"
    monkeypatch.setattr(digests, "try_to_load_from_cache", lambda name, file: str(cached))
    assert hub_revision("owner/model") == "3"
    assert hub_revision("no/name/of/the/hub") is None


# ---------------------------------------------------------------- the data set


@pytest.fixture
def args(folder, tmp_path):
    rows = [
        {"prompt": "slow", "negative_prompt": "fast"},
        {"prompt": "slow"},
        {"prompt": "harp", "negative_prompt": None},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluateArguments(str(folder), str(tmp_path / "p.jsonl"), num_prompts=2, output_dir=str(tmp_path / "out"))


def test_prompts_come_with_their_own_negative_prompts(args):
    held_out, _ = plan.plan(args, {})
    assert held_out.prompts == ["slow", "harp"] and held_out.negative_prompts == ["fast", None]


def test_prompts_that_settings_were_chosen_on_can_be_left_out(args, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{word}"}}\n' for word in "aabcde"))
    first, _ = plan.plan(args, {})
    args.skip_prompts = 2
    rest, _ = plan.plan(args, {})
    assert (first.prompts, rest.prompts) == (["a", "b"], ["c", "d"])


def test_early_steps_change_the_samples_and_their_name_and_their_absence_nothing(args):
    """Digest and name of the file without them are those of versions that did not know it."""
    plain, late = {"name": "CFG", "guidance_scale": 3}, {"name": "late", "guidance_scale": 3, "early_steps": [2, 4]}
    args.strategies = [plain, late, {"name": "of a float", "guidance_scale": 3, "early_steps": 2.0}]
    _, tasks = plan.plan(args, {})
    drawn = [task.drawn for task in tasks]
    assert len(set(drawn)) == 3 and drawn[1] == drawn[3]
    names = ["CFG (gamma 3)", "late (gamma 3, early 2)", "late (gamma 3, early 4)"]
    assert [task.row.name for task in tasks[:3]] == names
    assert tasks[0].row.slug == "CFG_gamma_3_7109b301"
    result = tasks[1].about(args)
    assert Result.from_json(result.to_json()) == result and result.early_steps == 2
    assert "early_steps" not in tasks[0].about(args).to_json()


def test_an_empty_negative_prompt_is_one_of_its_own(args, tmp_path):
    """As in training: the null prompt, whatever the settings have for prompts without one."""
    lines = [{"prompt": "slow", "negative_prompt": ""}, {"prompt": "harp"}]
    (tmp_path / "null.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args.dataset = str(tmp_path / "null.jsonl")
    assert plan.held_out_prompts(args).negative_prompts == ["", None]


def test_rows_say_which_negative_prompts_they_and_the_teacher_have(args):
    args.negative_prompt = "Bad quality."
    args.strategies = [
        {"name": "base", "negative_prompt": "unused"}, {"name": "CFG", "guidance_scale": 3, "negative_prompt": "fast"},
    ]  # fmt: skip
    base, guided = (Result.from_json(task.about(args).to_json()) for task in plan.plan(args, {})[1])
    assert (base.negative_prompt, guided.negative_prompt) == (None, "fast")
    assert guided.teacher_negative_prompt == "Bad quality."


def test_checkpoints_of_a_training_are_a_sweep_and_their_absence_changes_nothing(args, folder, tmp_path):
    for run, step in product(("a", "b"), (20, 100)):
        shutil.copytree(folder, tmp_path / run / f"checkpoint-{step}")
    runs = [str(tmp_path / run) for run in ("a", "b")]
    args.strategies = [{"name": "base"}, {"name": "training", "model": runs, "checkpoint": [20, 100]}]
    _, tasks = plan.plan(args, {})
    assert [task.row.name for task in tasks[1:]] == [
        f"training (step {step}) #{seed}" for seed in range(2) for step in (20, 100)
    ]
    assert tasks[2].row.models == (f"{runs[0]}/checkpoint-100",)
    result = tasks[2].about(args)
    assert Result.from_json(result.to_json()) == result and result.checkpoint == 100
    assert not result.is_trained() and "checkpoint" not in tasks[0].about(args).to_json()
    args.strategies[1]["checkpoint"] = [20, 60]
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint=60.*has \['checkpoint-20', 'checkpoint-100'\].*save_steps"
    ):
        plan.plan(args, {})


def test_negative_prompts_count_where_there_is_guidance_and_the_chat_template_everywhere(args, tmp_path):
    args.strategies = [{"name": "base"}, {"name": "CFG", "guidance_scale": 3}]
    drawn = [task.drawn for task in plan.plan(args, {})[1]]
    (tmp_path / "p.jsonl").write_text('{"prompt": "slow", "negative_prompt": "drum"}\n{"prompt": "harp"}\n')
    changed = [task.drawn for task in plan.plan(args, {})[1]]
    assert changed[0] == drawn[0] and changed[1] != drawn[1]
    args.chat_template_kwargs = {"enable_thinking": False}
    assert plan.plan(args, {})[1][0].drawn != drawn[0]


def test_settings_change_with_the_source_of_a_metric_and_with_extra_metrics(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metric_of_plan.py").write_text("def length(prompts, completions, **kwargs):\n    return [1.0]\n")
    args.metrics = ["my_metric_of_plan.length"]
    first = plan.plan(args, {})[1][0]
    (tmp_path / "my_metric_of_plan.py").write_text("def length(prompts, completions, **kwargs):\n    return [2.0]\n")
    second = plan.plan(args, {})[1][0]
    third = plan.plan(args, {"more": lambda prompts, completions: [0.0]})[1][0]
    assert len({first.settings, second.settings, third.settings}) == 3 and first.drawn == second.drawn == third.drawn
    args.metrics = ["my_metric_of_plan.length", "other.length"]
    with pytest.raises(ValueError, match="cannot be imported"):
        plan.plan(args, {})
    (tmp_path / "other.py").write_text("def length(**kwargs):\n    return []\n")
    with pytest.raises(ValueError, match=r"`metrics` has two functions called `length`"):
        plan.plan(args, {})
    (tmp_path / "third.py").write_text("def diversity(**kwargs):\n    return []\n")
    args.metrics = ["third.diversity"]
    with pytest.raises(ValueError, match=r"`metrics` has a function called `diversity`, which is a metric of this"):
        plan.plan(args, {})
    args.metrics = []
    with pytest.raises(ValueError, match=r"`metrics` has a function called `kl`, which is a metric of this package"):
        plan.plan(args, {"kl": lambda prompts, completions: [0.0]})


# ---------------------------------------------------------------- a user's own embedder

OWN = """
import torch

def words(texts):
    return torch.tensor([[1.0, float(len(text.split()))] for text in texts])

class Letters:
    def __call__(self, texts):
        return [[1.0, float(len(text))] for text in texts]

def wrong(texts):
    return torch.zeros(1, 2)
"""


def test_an_embedder_of_ones_own_is_named_by_its_path(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_of_plan.py").write_text(OWN)
    assert load_embedder("embedder", "own_of_plan.words")(["a b"]).tolist() == [[1.0, 2.0]]
    letters = load_embedder("embedder", "own_of_plan.Letters")
    assert embed_all("embedder", letters, ["abc", ""]).tolist() == [[1.0, 3.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match=r"`embedder` returned shape \(1, 2\) for 3 completions"):
        embed_all("embedder", load_embedder("embedder", "own_of_plan.wrong"), ["a", "b", "c"])
    for name, known in {
        "own_of_plan.words": True,
        "owner/model.v2": False,
        "no_such_module.f": False,
        "model": False,
    }.items():
        assert is_function(name) == known
    args.embedder = "own_of_plan.words"
    first = plan.plan(args, {})[1][0].settings
    (tmp_path / "own_of_plan.py").write_text(OWN + "\n")
    assert plan.plan(args, {})[1][0].settings != first
    args.embedder = "own_of_plan.nothing"
    with pytest.raises(ValueError, match=r"`embedder` has 'own_of_plan.nothing', which cannot be imported"):
        plan.plan(args, {})


def test_gradients_and_devices_of_an_own_embedder_do_not_matter():
    weights = torch.ones(2, requires_grad=True)
    found = embed_all("embedder", lambda texts: torch.ones(len(texts), 2).double() * weights, ["a", "b"])
    assert found.dtype == torch.float64 and not found.requires_grad


# ---------------------------------------------------------------- arguments


def test_the_chat_template_takes_a_mapping_also_as_json():
    assert EvaluateArguments("m", "d", chat_template_kwargs='{"a": 1}').chat_template_kwargs == {"a": 1}
    assert EvaluateArguments("m", "d", chat_template_kwargs={"a": 1}).chat_template_kwargs == {"a": 1}
    for wrong in ("{a", "[1]", [1], 3):
        with pytest.raises((TypeError, ValueError), match="`chat_template_kwargs` must be a mapping, or JSON of one"):
            EvaluateArguments("m", "d", chat_template_kwargs=wrong)


def test_help_names_the_keys_of_a_strategy():
    text = help_on_strategies()
    assert "--config FILE.yaml" in text and all(f"  {key}: " in text for key in KEYS)


# ---------------------------------------------------------------- what a row is of


def test_rows_that_are_further_samples_differ_in_their_seed_and_batches_alone(args, tmp_path):
    args.strategies = [{"name": "CFG", "guidance_scale": [1.5, 3]}]

    def digests_of(**changed):
        return [(task.drawn, task.but_seed) for task in plan.plan(replace(args, **changed), {})[1]]

    before = digests_of()
    for changed in ({"seed": 1}, {"batch_size": 7}):
        after = digests_of(**changed)
        assert [one[1] for one in after] == [one[1] for one in before] and not {*after} & {*before}
    (tmp_path / "other.jsonl").write_text('{"prompt": "fast"}\n{"prompt": "drum"}\n')
    for changed in (
        {"dataset": str(tmp_path / "other.jsonl")}, {"max_new_tokens": 5}, {"samples_per_prompt": 9},
        {"dtype": "bfloat16"}, {"guidance_scale": 2.0}, {"temperature": 0.5}, {"system_prompt": "Be slow."},
    ):  # fmt: skip
        if "temperature" in changed:
            after = digests_of(strategies=[{"name": "CFG", "guidance_scale": 3, **changed}])
        else:
            after = digests_of(**changed)
        assert not {one[1] for one in after} & {one[1] for one in before}
    assert plan.plan(args, {})[1][0].about(args).but_seed == before[0][1]


def test_rows_that_can_be_compared_differ_in_model_and_sampling_alone(args, folder, tmp_path):
    def digests_of(**changed):
        return {task.about(args).but_row for task in plan.plan(replace(args, **changed), {})[1]}

    args.strategies = [
        {"name": "base"}, {"name": "CFG", "guidance_scale": [1.5, 3], "negative_prompt": "slow"},
        {"name": "own", "model": str(folder), "temperature": 0.5},
    ]  # fmt: skip
    before = digests_of()
    assert len(before) == 1 and digests_of(seed=1, batch_size=7, samples_per_prompt=9, listen=1) == before
    (tmp_path / "other.jsonl").write_text('{"prompt": "fast"}\n{"prompt": "drum"}\n')
    for changed in (
        {"dataset": str(tmp_path / "other.jsonl")}, {"max_new_tokens": 5}, {"dtype": "bfloat16"},
        {"guidance_scale": 2.0}, {"negative_prompt": "slow"},
    ):  # fmt: skip
        assert not digests_of(**changed) & before


def test_a_row_of_one_folder_has_the_digest_of_its_contents(args, folder):
    args.strategies = [{"name": "base"}, {"name": "LERP", "models": [str(folder), "base"]}]
    base, merged = (task.about(args) for task in plan.plan(args, {})[1])
    assert base.model_digest == digests.weights_digest(folder) and merged.model_digest is None


class Near:
    def __init__(self, target):
        self.target = target

    def __call__(self, prompts, completions, **kwargs):
        return [float(self.target)] * len(prompts)

    def score(self, prompts, completions, **kwargs):
        return self(prompts, completions)


def near(target, prompts, completions, **kwargs):
    return [float(target)] * len(prompts)


def closure(target):
    def inner(prompts, completions, **kwargs):
        return [float(target)] * len(prompts)

    return inner


@pytest.mark.parametrize("make", [Near, lambda t: partial(near, t), closure, lambda t: Near(t).score, partial])
def test_a_metric_is_another_one_if_it_holds_something_else(args, make):
    """The same source in all cases."""
    if make is partial:  # of other functions of one module
        first, second = partial(near, 2), partial(closure, 2)
    else:
        first, second = make(2), make(100)
    one, again, other = (plan.plan(args, {"near": it})[1][0] for it in (first, first, second))
    assert one.settings == again.settings != other.settings
    assert one.drawn == other.drawn  # the samples are kept


def test_a_metric_that_cannot_be_hashed_is_measured_again(args):
    one, other = (plan.plan(args, {"near": Near(x for x in ())})[1][0] for _ in range(2))
    assert one.settings != other.settings and one.drawn == other.drawn


def test_a_system_prompt_is_read_as_in_training(args):
    args.system_prompt = "Be slow."
    system = {"role": "system", "content": "Be slow."}
    assert plan.held_out_prompts(args).prompts[1] == [system, {"role": "user", "content": "harp"}]


def test_another_end_of_the_tokenizers_is_another_way_to_sample(args, folder, tokenizer):
    """And where it is one of the generation config's, the digest is that of earlier versions."""
    before = plan.plan(args, {})[1][0]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "drum"
    assert further_end(str(folder)) is None
    digest = content_digest(folder)
    tokenizer.save_pretrained(folder)
    assert further_end(str(folder)) == tokenizer.eos_token_id
    after = plan.plan(args, {})[1][0]
    assert after.drawn != before.drawn and content_digest(folder) != digest
    row, held_out = plan.expand(args.strategies)[0], plan.held_out_prompts(args)
    without, with_it = (
        plan.sampling_digest(row, args, held_out, lambda name: "the same files", None, end)
        for end in (None, tokenizer.eos_token_id)
    )
    assert without != with_it

"""Strategies, judging and the files of an evaluation, on a tiny model."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from trl_drcd.evaluation import grid, measuring, metrics
from trl_drcd.evaluation.allowed import suppressed_in
from trl_drcd.evaluation.grid import EvaluateArguments, evaluate
from trl_drcd.evaluation.information import forward_information
from trl_drcd.evaluation.joining import joined
from trl_drcd.evaluation.judging import Judges, import_function
from trl_drcd.evaluation.metrics import Drawn, Metric, measure
from trl_drcd.evaluation.models import Models
from trl_drcd.evaluation.results import read_results
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.evaluation.strategies import Row, expand
from trl_drcd.evaluation.variety import distinct_n, diversity_between_prompts
from trl_drcd.policies import CausalLMPolicy, policy_for
from trl_drcd.validation.sampler import check_sampler

sys.path.insert(0, str(Path(__file__).parent / "families"))

from tiny import REFUSED, RIGHT, make

# ---------------------------------------------------------------- strategies


def test_a_list_is_a_sweep():
    rows = expand([
        {"name": "base"},
        {"name": "CFG", "guidance_scale": [2, 3]},
        {"name": "LERP", "models": ["a", "b"], "interpolation_weight": [0, 0.25], "temperature": 0.9},
        {"name": "uniform", "models": ["a", "b", "c", "d"]},
    ])  # fmt: skip
    assert [row.name for row in rows] == [
        "base", "CFG (gamma 2)", "CFG (gamma 3)", "LERP (T 0.9, lambda 0)", "LERP (T 0.9, lambda 0.25)", "uniform"
    ]  # fmt: skip
    assert rows[4].weights == (0.75, 0.25) and rows[5].weights == (0.25,) * 4
    seeds = expand([
        {"name": "quality", "model": ["q0", "q1"]},
        {"name": "LERP", "models": [["q0", "d0"], ["q1", "d1"]], "interpolation_weight": [0, 1]},
    ])  # fmt: skip
    assert [row.name for row in seeds] == [
        "quality #0", "quality #1", "LERP (lambda 0) #0", "LERP (lambda 1) #0", "LERP (lambda 0) #1",
        "LERP (lambda 1) #1",
    ]  # fmt: skip
    assert seeds[1].point == "quality" and seeds[5].models == ("q1", "d1") and seeds[5].training_seed == 1
    later = expand([{"name": "quality", "model": ["q2", "q3"], "first_training_seed": 2}])
    assert [(row.name, row.training_seed) for row in later] == [("quality #2", 2), ("quality #3", 3)]
    assert len({row.slug for row in rows}) == 6 and all(re.fullmatch(r"[\w.]+", row.slug) for row in rows)


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ([], "`strategies` is empty"),
        ([{"guidance_scale": 3}], r"`strategies\[0\]` must be a mapping with a `name`"),
        ([{"name": "a", "model": "q", "first_training_seed": 2}], "`first_training_seed` needs a list of trainings"),
        ([{"name": "a", "model": ["q"], "first_training_seed": -1}], "a whole number, at least 0, got -1"),
        ([{"name": "a", "model": ["q"], "first_training_seed": True}], "a whole number, at least 0, got True"),
        ([{"name": "a", "gamma": 3}], r"has unknown keys \['gamma'\]; known are"),
        ([{"name": "a"}, {"name": "a"}], "repeats the name of an earlier strategy"),
        # Rows of one point are pooled as trainings with other seeds
        ([{"name": "a (gamma 3)"}, {"name": "a", "guidance_scale": 3}], r"a second row called `a \(gamma 3\)`"),
        ([{"name": "a", "guidance_scale": [2, 3]}, {"name": "a (gamma 3)"}], r"a second row called `a \(gamma 3\)`"),
        ([{"name": "a #0"}, {"name": "a", "model": ["x", "y"]}], r"a second row called `a #0`"),
        ([{"name": "a", "temperature": [0.7, 0.7]}], r"a second row called `a \(T 0.7\)`"),
        ([{"name": "a", "temperature": [1.0000001, 1.0000002]}], r"a second row called `a \(T 1\)`"),
        ([{"name": "a", "guidance_scale": [1], "temperature": [1]}], "at most one setting can be swept"),
        ([{"name": "a", "model": "x", "models": ["y"]}], "give only one of them"),
        ([{"name": "a", "models": ["x"], "interpolation_weight": 0.5}], "needs exactly two `models`"),
        ([{"name": "a", "models": ["x", "y"], "interpolation_weight": 1.5}], r"must be in \[0, 1\], got 1.5"),
        ([{"name": "a", "models": ["x", "y"], "weights": [0.5, 0.6]}], "`weights` must be finite and sum to 1"),
        ([{"name": "a", "models": ["base", "base"]}], "`base` may occur once, together with trained `models`"),
        ([{"name": "a", "model": "base"}], "`base` may occur once, together with trained `models`"),
        ([{"name": "a", "temperature": 0}], "`temperature` must be finite and above 0, got 0"),
        ([{"name": "a", "guidance_scale": -1}], "`guidance_scale` must be finite and at least 0, got -1"),
    ],
)
def test_bad_strategies_are_refused(strategies, message):
    with pytest.raises(ValueError, match=message):
        expand(strategies)


def test_models_are_mixed_in_memory(tokenizer, tmp_path):
    ends = []
    for seed in (0, 1, 2):
        model = make_model(tokenizer, seed)
        model.save_pretrained(tmp_path / str(seed))
        ends.append(model.state_dict())
    models = Models(str(tmp_path / "0"))
    (a, b, c) = (str(tmp_path / str(seed)) for seed in (0, 1, 2))
    for weight in (0.25, 1.0, 0.0):
        mixed = models(Row("x", (b, c), (1 - weight, weight))).state_dict()
        for name, tensor in mixed.items():
            torch.testing.assert_close(tensor, (1 - weight) * ends[1][name] + weight * ends[2][name])
    assert models(Row("base")) is models.base
    uniform = models(Row("uniform", (a, b, c), (1 / 3,) * 3)).state_dict()
    for name, tensor in uniform.items():
        torch.testing.assert_close(tensor, sum(end[name] for end in ends) / 3)
    single = models(Row("one", (c,), (1.0,))).state_dict()
    assert all(torch.equal(single[name], ends[2][name]) for name in single)
    towards_base = models(Row("towards the base", ("base", c), (0.25, 0.75))).state_dict()
    for name, tensor in towards_base.items():
        torch.testing.assert_close(tensor, 0.25 * ends[0][name] + 0.75 * ends[2][name])
    assert all(torch.equal(tensor, ends[0][name]) for name, tensor in models.base.state_dict().items())


def test_adapters_are_mixed_in_memory(tokenizer, tmp_path):
    base = make_model(tokenizer)
    base.save_pretrained(tmp_path / "base")
    folders = []
    for seed in (1, 2):
        adapted = get_peft_model(make_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / f"lora{seed}")
        folders.append(str(tmp_path / f"lora{seed}"))
    models, ids = Models(str(tmp_path / "base")), torch.tensor([[1, 5, 6]])
    ends = [models(Row("x", tuple(folders), weights))(ids).logits.clone() for weights in ((1.0, 0.0), (0.0, 1.0))]
    alone = [models(Row("x", (folder,), (1.0,)))(ids).logits for folder in folders]
    for end, single in zip(ends, alone, strict=True):
        torch.testing.assert_close(end, single)
    assert not torch.allclose(ends[0], ends[1]) and not torch.allclose(ends[0], models.base(ids).logits)
    own = models.base(ids).logits
    for names, weights in (((folders[0], "base"), (0.75, 0.25)), (("base", folders[0]), (0.25, 0.75))):
        merged = PeftModel.from_pretrained(make_model(tokenizer), folders[0])
        for parameter_name, parameter in merged.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data *= 0.75
        torch.testing.assert_close(models(Row("x", names, weights))(ids).logits, merged(ids).logits)
    torch.testing.assert_close(models(Row("x", (folders[0], "base"), (0.0, 1.0)))(ids).logits, own)
    with pytest.raises(ValueError, match="mixes checkpoints and adapters"):
        expand([{"name": "x", "models": [folders[0], str(tmp_path / "base")]}])
    with pytest.raises(ValueError, match="`base` can be mixed with only one adapter"):
        expand([{"name": "x", "models": [*folders, "base"]}])
    shutil.copy(tmp_path / "base" / "model.safetensors", folders[0])
    with pytest.raises(
        ValueError, match="holds both a whole model and a LoRA adapter, one of them from an earlier run"
    ):
        expand([{"name": "x", "model": folders[0]}])


# ---------------------------------------------------------------- judging


def test_judged_by_hand():
    samples = Samples(["p", "q"], [[1], [2], [3], [4]], 2, seconds=1.0)
    vectors = {"a b": [1.0, 0.0], "a c": [0.0, 1.0], "b": [1.0, 1.0], "b b": [2.0, 2.0]}
    judges = Judges(
        embedders={"diversity": lambda items: torch.tensor([vectors[item] for item in items])},
        adherence={"adherence": lambda prompts, items: torch.tensor([1.0, 2.0, 3.0, 5.0])},
        preference=lambda items: torch.tensor([0.0, 1.0, 2.0, 4.0]),
        rewards={"length": lambda prompts, completions, **kwargs: [float(len(c)) for c in completions]},
    )
    intervals, values = measure(Drawn(samples, list(vectors), judges))
    np.testing.assert_allclose(values["diversity"], [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(values["adherence"], [1.5, 4])
    np.testing.assert_allclose(values["preference"], [0.5, 3])
    np.testing.assert_allclose(values["length"], [3, 2])
    assert intervals["diversity_between_prompts"]["mean"] == pytest.approx(1 - 0.5**0.5)
    assert {"diversity_second", "kl", "frechet", "adherence_clap"}.isdisjoint(intervals)


def test_distance_between_prompts_is_the_mean_over_pairs():
    embeddings = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    interval = diversity_between_prompts(embeddings, 3)
    pairs = [(a, b) for a in range(12) for b in range(12) if a // 3 != b // 3]
    distances = [1 - torch.cosine_similarity(embeddings[a], embeddings[b], dim=0).item() for a, b in pairs]
    assert interval["mean"] == pytest.approx(sum(distances) / len(distances), abs=1e-6)
    assert interval["low"] < interval["mean"] < interval["high"]


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab, ba, ab; ab
    assert distinct_n(["a", ""], 2) == 0.0


def test_a_metric_of_ones_own_has_a_value_for_each_sample_or_none():
    """`None` is "not judged", as in TRL: the prompt has the mean of its other samples."""

    def measured(values):
        judges = Judges(rewards={"mine": lambda prompts, completions: values})
        return measure(Drawn(Samples(["a", "b"], [[1]] * 4, 2, 1.0), ["x"] * 4, judges))[1]["mine"].tolist()

    assert measured([1.0, 3.0, None, 5.0]) == measured(torch.tensor([2.0, 2.0, 5.0, 5.0])) == [2.0, 5.0]
    with pytest.raises(ValueError, match="gave 2 values for 4 completions"):
        measured([1.0, 2.0])


def test_self_bleu_of_equal_and_of_different_texts():
    pytest.importorskip("sacrebleu")
    samples = Samples(["p", "q"], [[1]] * 4, 2, seconds=1.0)
    texts = ["the slow old harp played a tune"] * 2 + ["one two three four five", "six seven eight nine ten"]
    _, values = measure(Drawn(samples, texts, Judges()))
    assert values["self_bleu"][0] == pytest.approx(100) and values["self_bleu"][1] < 5


def length(prompts, completions, **kwargs):
    """A metric for `metrics`."""
    return [float(len(completion)) for completion in completions]


def test_a_metric_is_imported_by_its_name(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert import_function("metrics", "test_grid.length")(prompts=[], completions=["ab"]) == [2.0]
    for name in ("length", "test_grid.nothing", "no_such_module.f"):
        with pytest.raises(ValueError, match="cannot be imported as module"):
            import_function("metrics", name)


@torch.no_grad()
def test_forward_information_is_the_log_likelihood_ratio(model, tokenizer):
    samples = Samples(["slow harp", "a fast tune"], [[5, 6, 2], [7, 8, 9, 10]], 1, seconds=1.0)
    found = forward_information(model, tokenizer, samples, batch_size=1)

    def log_likelihood(prompt, completion):
        ids = tokenizer(prompt)["input_ids"]
        logits = model(input_ids=torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())

    pairs = zip(samples.prompts, samples.token_ids, strict=True)
    expected = [log_likelihood(prompt, ids) - log_likelihood("", ids) for prompt, ids in pairs]
    assert found.tolist() == pytest.approx(expected, abs=1e-4) and abs(expected[0]) > 0.01
    assert forward_information(model, tokenizer, samples).tolist() == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- the whole


@pytest.fixture
def args(tokenizer, tmp_path):
    for seed in (0, 1):
        make_model(tokenizer, seed).save_pretrained(tmp_path / str(seed))
    tokenizer.save_pretrained(tmp_path / "0")
    prompts = ["a slow tune", "fast <drum> & flute", "harp"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    ends = [str(tmp_path / "0"), str(tmp_path / "1")]
    strategies = [
        {"name": "base"},
        {"name": "CFG", "guidance_scale": [2.0, 3.0]},
        {"name": "LERP", "models": ends, "interpolation_weight": [0, 0.5, 1]},
        {"name": "diversity", "model": ends[1], "diversity_coef": 5},
    ]
    return EvaluateArguments(
        str(tmp_path / "0"), str(tmp_path / "p.jsonl"), strategies, output_dir=str(tmp_path / "out"), num_prompts=3,
        samples_per_prompt=4, max_new_tokens=5, listen=2,
    )  # fmt: skip


@pytest.fixture
def judged(monkeypatch):
    """Judges that look at the texts, without loading any model."""

    def embed(texts):
        words = ["slow", "fast", "harp", "drum", "flute", "tune"]
        return torch.tensor([[1.0] + [float(text.split().count(word)) for word in words] for text in texts])

    embedders = {"diversity": embed, "diversity_second": embed}
    judges = Judges(embedders, {"adherence": lambda p, c: torch.tensor([float(len(text)) for text in c])})
    monkeypatch.setattr(Judges, "load", classmethod(lambda cls, args, rewards: judges))


def test_evaluation_writes_everything_and_does_nothing_twice(args, judged, tmp_path, monkeypatch):
    results = evaluate(args)
    output = tmp_path / "out"
    assert [row.name for row in results][-2:] == ["LERP (lambda 1)", "diversity"]
    # The end of a sweep is the model that it is, and measured once
    assert results[-1].samples == results[-2].samples and results[-1].diversity_coef == 5
    assert len(list((tmp_path / "out" / "samples").glob("*.safetensors"))) == 6
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert lines == [result.to_json() for result in results] and read_results(output / "results.jsonl") == results
    needed = {"quality", "adherence", "diversity", "diversity_second", "entropy_per_token", "tokens_per_second", "kl"}
    assert needed <= set(results[0].metrics)
    by_name = {row.name: row for row in results}
    assert by_name["CFG (gamma 3)"].metrics["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert by_name["CFG (gamma 3)"].passes_per_token == 2 and results[0].passes_per_token == 1
    # lambda 0 is the base: the same draws, the same samples
    assert by_name["LERP (lambda 0)"].per_prompt == by_name["base"].per_prompt
    for name in ("front.png", "front.svg", "lambda.png", "lambda.svg", "entropy.png", "summary.csv", "report.html"):
        assert (output / name).stat().st_size > 0
    tables = (output / "report.md").read_text()
    assert "\n| CFG (gamma 3) | " in tables and "| CFG buys quality | " in tables and "## Along lambda\n" in tables
    assert "### fast \\<drum\\> \\& flute\n\n~~~text\nbase: " in tables and "\nCFG (gamma 3): " in tables
    page = (output / "report.html").read_text()
    assert "fast &lt;drum&gt; &amp; flute" in page and "<drum>" not in page and "CFG buys quality" in page
    assert len((output / "summary.csv").read_text().splitlines()) == 1 + len(results)

    with open(output / "results.jsonl", "a") as file:
        file.write('{"torn')  # as after a crash
    monkeypatch.setattr(measuring.Worker, "__call__", lambda *a: pytest.fail("measured twice"))
    assert evaluate(args) == results
    assert (output / "results.jsonl").read_text().count("\n") == len(results)
    args.only = ["CFG"]
    assert evaluate(args) == results[1:3]
    with open(output / "results.jsonl", "a") as file:
        file.write('{"name": "base"}\n')
    with pytest.raises(ValueError, match="line 3 is not a result of an evaluation; remove that line"):
        evaluate(args)
    args.only = ["cfg"]
    with pytest.raises(
        ValueError,
        match=r"`only` has unknown names \['cfg'\]; the strategies are \['base', 'CFG', 'LERP', 'diversity'\]",
    ):
        evaluate(args)


def test_likelihoods_of_some_samples_are_those_of_the_first_of_each_prompt(args, judged, monkeypatch):
    monkeypatch.setattr(grid, "write_report", lambda *a: None)
    args.only, scored = ["CFG"], []
    plain = measuring.teacher_terms

    def seen(*given, **more):
        scored.append((given[3], plain(*given, **more)))
        return scored[-1][1]

    monkeypatch.setattr(measuring, "teacher_terms", seen)
    whole = evaluate(args)[0]
    args.likelihood_samples = 2
    part = evaluate(args)[0]
    samples, terms = scored[0]
    assert [s.token_ids for s, _ in scored[2:3]] == [[ids for i, ids in enumerate(samples.token_ids) if i % 4 < 2]]
    first = (terms.entropy / terms.tokens).view(3, 4)[:, :2].mean(1)
    assert part.per_prompt["entropy_per_token"] == pytest.approx(first.tolist(), rel=1e-4)
    assert part.settings != whole.settings and part.per_prompt["diversity"] == whole.per_prompt["diversity"]


def test_what_changed_is_measured_anew_and_what_did_not_is_not_sampled_again(
    args, judged, tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setattr(grid, "write_report", lambda *a: None)
    first = evaluate(args)
    make_model(tokenizer, 5).save_pretrained(tmp_path / "1")  # another model under the same name
    calls = []
    sample = measuring.sample_prompts
    monkeypatch.setattr(measuring, "sample_prompts", lambda *a, **k: calls.append(1) or sample(*a, **k))
    second = evaluate(args)
    names = [row.name for row, old in zip(second, first, strict=True) if row.settings != old.settings]
    assert names == ["LERP (lambda 0.5)", "LERP (lambda 1)", "diversity"] and len(calls) == 2
    kept = (tmp_path / "out" / "other_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in kept] == names
    args.prompt_information = True  # another judge, the same samples
    third = evaluate(args)
    assert len(calls) == 2 and "prompt_information" in third[0].metrics
    assert third[0].per_prompt["diversity"] == first[0].per_prompt["diversity"]
    args.seed, samples = 1, {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "samples").glob("*/*")}
    again = evaluate(args)
    assert all(path.stat().st_mtime_ns == time for path, time in samples.items())  # each line keeps what it plays
    assert len(calls) == 8 and again[0].per_prompt != third[0].per_prompt
    args.seed, args.prompt_information = 0, False
    assert evaluate(args) == second and len(calls) == 8  # still there


def test_a_new_metric_is_one_entry_of_the_table(args, judged, tmp_path, monkeypatch):
    """It is in results.jsonl, the summary, the tables, an axis of the fronts and a plot, from one entry alone."""
    words = Metric("words", "number of words", "words", "higher", lambda drawn: drawn.of_prompts(
        [float(len(text.split())) for text in drawn.texts]
    ), "quality")  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, words))
    results, output = evaluate(args), tmp_path / "out"
    assert all(len(row.per_prompt["words"]) == 3 and row.metrics["words"]["mean"] >= 0 for row in results)
    assert "words,words_low,words_high" in (output / "summary.csv").read_text().splitlines()[0]
    assert {"front_words.png", "front_words_second.svg"} <= {path.name for path in output.iterdir()}
    page = (output / "report.html").read_text()
    for text in (
        "number of words (words)</th>", "Number of words against diversity</h2>",
        "Fronts in number of words and diversity</h2>", "The paper&#39;s claims in number of words",
    ):  # fmt: skip
        assert text in page, text


def test_extra_metrics_are_measured_also_where_everything_else_is(args, tmp_path):
    args.strategies = args.strategies[:1]
    evaluate(args)
    (row,) = evaluate(args, {"length": length})
    assert row.metrics["length"]["mean"] > 0 and "| length |" in (tmp_path / "out" / "report.md").read_text()


def test_own_negative_prompts_and_those_of_the_strategy_reach_sampling_and_scoring(
    args, judged, tmp_path, monkeypatch
):
    rows = [
        {"prompt": p, "negative_prompt": n} for p, n in (("slow tune", "fast"), ("harp", None), ("a drum", "flute"))
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The strategy's own x^- is the model's, the teacher's another: the KL of the guided base to itself is not 0
    args.strategies = [{"name": "CFG", "guidance_scale": 3.0, "negative_prompt": "slow"}]
    args.negative_prompt, args.listen = "a", 3
    streams = []
    generate = CausalLMPolicy.rollout

    def spy(self, model, prompts, negatives=None, *rest, **others):
        streams.append((prompts, negatives))
        return generate(self, model, prompts, negatives, *rest, **others)

    monkeypatch.setattr(CausalLMPolicy, "rollout", spy)
    (row,) = evaluate(args)
    tokenizer = measuring.AutoTokenizer.from_pretrained(args.model)
    expected = [tokenizer(text)["input_ids"] for text in ("fast", "slow", "flute") for _ in range(4)]
    assert next(negatives for _, negatives in streams if negatives) == expected
    assert row.per_prompt["kl"][0] == pytest.approx(0, abs=1e-5) and row.per_prompt["kl"][1] > 1e-3
    args.negative_prompt = "slow"
    assert evaluate(args)[0].per_prompt["kl"] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_model_that_is_not_finite_is_named(args, judged, tmp_path, tokenizer, guidance_scale):
    broken = make_model(tokenizer, 7)
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "1")
    args.strategies = [{"name": "x", "model": str(tmp_path / "1"), "guidance_scale": guidance_scale}]
    with pytest.raises(ValueError, match=r"`strategies` \(x\): .*1 has a weight that is not finite, in .*up_proj"):
        evaluate(args)
    # One end of a mixture
    args.strategies = [{"name": "x", "models": [str(tmp_path / "0"), str(tmp_path / "1")], "weights": [0.9, 0.1]}]
    with pytest.raises(ValueError, match="not finite"):
        evaluate(args)
    shutil.copy(tmp_path / "1" / "model.safetensors", tmp_path / "0")
    args.strategies = [{"name": "base", "guidance_scale": guidance_scale}]
    with pytest.raises(ValueError, match=r"`model=.*0` has a weight that is not finite"):
        evaluate(args)


def test_log_probabilities_that_are_not_numbers_are_named(args, judged, tmp_path, tokenizer):
    huge = make_model(tokenizer, 7)
    huge.lm_head.weight.data *= 1e38
    huge.save_pretrained(tmp_path / "1")
    args.strategies = [{"name": "x", "model": str(tmp_path / "1"), "guidance_scale": 3.0}]
    message = r"`x \(gamma 3\)` (gives log-probabilities that are NaN|cannot be sampled)"
    with pytest.raises((ValueError, RuntimeError), match=message):
        evaluate(args)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_sampled_wrong_is_refused(args, judged, tmp_path, tokenizer, name):
    make(name, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "0")
    args.strategies = [{"name": "base"}]
    with pytest.raises(ValueError, match=r"`model`: \w+ cannot be sampled here: the sampler draws tokens at"):
        evaluate(args)


@pytest.mark.parametrize("name", RIGHT)
def test_families_that_are_sampled_right_pass(tokenizer, name):
    model = make(name, vocab_size=len(tokenizer))
    state = torch.get_rng_state()
    check_sampler(policy_for(model, tokenizer), model, [[3, 4], [5, 6, 7, 8, 9]])
    assert torch.equal(torch.get_rng_state(), state)


def test_two_processes_measure_the_same(args, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "write_report", lambda *a: None)
    args.strategies, args.prompt_information = args.strategies[:2], True
    one = evaluate(args)
    args.output_dir, args.num_processes = str(tmp_path / "two"), 2
    two = evaluate(args)
    assert [row.name for row in two] == ["base", "CFG (gamma 2)", "CFG (gamma 3)"]
    for row, other in zip(two, one, strict=True):
        # Not the last digit: the processes may have another number of threads
        assert row.per_prompt == {name: pytest.approx(v, rel=1e-4) for name, v in other.per_prompt.items()}


def test_the_vocabulary_is_that_of_all_strategies_whichever_run(args, judged, tmp_path, tokenizer):
    """A model that suppresses tokens: the base beside it does too, also where its row is added, or run alone."""
    trained = make_model(tokenizer, 1)
    trained.generation_config.suppress_tokens = suppressed = [6, 7, 8, 9]
    trained.save_pretrained(tmp_path / "1")
    mine = {"name": "mine", "model": str(tmp_path / "1")}

    def tokens(folder):
        (file,) = (tmp_path / folder / "samples").glob("base_*.safetensors")
        return set(load_file(file)["ids"].tolist())

    args.samples_per_prompt, args.max_new_tokens = 16, 10
    args.strategies, args.output_dir = [mine, {"name": "base"}], str(tmp_path / "at once")
    at_once = evaluate(args)[1]
    args.strategies, args.output_dir = [mine], str(tmp_path / "extended")
    evaluate(args)
    args.strategies = [mine, {"name": "base"}]
    extended = evaluate(args)[1]
    args.output_dir, args.only, args.seed = str(tmp_path / "alone"), ["base"], 1
    alone = evaluate(args)[0]
    assert extended.per_prompt == at_once.per_prompt and extended.settings == at_once.settings
    assert alone.but_seed == at_once.but_seed and joined([at_once, alone]).samples_per_prompt == 32
    for folder in ("at once", "extended", "alone"):
        assert tokens(folder) and not tokens(folder) & set(suppressed)


def test_the_vocabulary_is_that_of_checkpoints_and_of_models_that_are_there(args, tmp_path, tokenizer, caplog):
    model = make_model(tokenizer, 1)
    model.save_pretrained(tmp_path / "run")
    model.generation_config.suppress_tokens = [6, 7]
    model.save_pretrained(tmp_path / "run" / "checkpoint-4")
    args.strategies = [{"name": "base"}, {"name": "run", "model": str(tmp_path / "run"), "checkpoint": [4]}]
    assert suppressed_in(args) == [6, 7] and not caplog.text
    args.strategies = [{"name": "base"}, {"name": "run", "models": [[str(tmp_path / "gone")]]}]
    assert suppressed_in(args) is None and "gone of `strategies` does not exist" in caplog.text


@pytest.mark.parametrize("end", ["base", "0"])
def test_models_that_compute_otherwise_are_not_mixed(args, judged, tmp_path, tokenizer, monkeypatch, end):
    """The same shapes, and another `rope_theta`: the mix would have one of the two for both ends."""
    other = make_model(tokenizer, 1)
    other.config.rope_parameters["rope_theta"] = 100.0
    other.save_pretrained(tmp_path / "other")
    ends = ["base" if end == "base" else str(tmp_path / end), str(tmp_path / "other")]
    args.strategies = [{"name": "base"}, {"name": "LERP", "models": ends, "interpolation_weight": 0.5}]
    monkeypatch.setattr(measuring.Worker, "__call__", lambda *a: pytest.fail("measured before it was refused"))
    with pytest.raises(ValueError, match=r"`models` of `LERP`: .*architectures: `rope_parameters.*100"):
        evaluate(args)


def test_adapters_that_cannot_be_mixed_are_refused_at_once(tokenizer, tmp_path):
    for name, option in {"dora": {"use_dora": True}, "saved": {"modules_to_save": ["lm_head"]}, "lora": {}}.items():
        config = LoraConfig(r=2, target_modules=["q_proj"], **option)
        get_peft_model(make_model(tokenizer), config).save_pretrained(tmp_path / name)
    dora, saved, lora = (str(tmp_path / name) for name in ("dora", "saved", "lora"))
    expand([{"name": "x", "model": dora}, {"name": "y", "model": saved}])  # alone they are right
    for models, message in (([lora, dora], "use_dora=True"), ([saved, "base"], "replaces tensors of the base")):
        with pytest.raises(ValueError, match=rf"`strategies\[0\]` \(x\): .*{message}"):
            expand([{"name": "x", "models": models}])


def test_adapters_with_a_larger_vocabulary_are_not_mixed_in_memory(args, judged, tokenizer, tmp_path, monkeypatch):
    """PEFT saves the embeddings of each by itself, and loads them into one."""
    larger = make_model(tokenizer)
    larger.resize_token_embeddings(len(tokenizer) + 2)
    larger.save_pretrained(tmp_path / "0")
    ends = [str(tmp_path / name) for name in ("a", "b")]
    for end in ends:
        model = get_peft_model(make_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.model.resize_token_embeddings(len(tokenizer) + 2)
        model.base_model.model.get_input_embeddings().weight.data += 0.1 * (1 + ends.index(end))
        model.save_pretrained(end, save_embedding_layers=True)
    args.strategies = [{"name": "LERP", "models": ends, "interpolation_weight": 0.5}]
    monkeypatch.setattr(measuring.Worker, "__call__", lambda *a: pytest.fail("measured before it was refused"))
    with pytest.raises(
        ValueError, match=r"`strategies` \(LERP\): .*a replaces a tensor of the base, .*(lm_head|embed_tokens)"
    ):
        evaluate(args)


def test_adapters_of_the_embedding_are_mixed_in_memory(args, judged, tokenizer, tmp_path):
    """PEFT saves the base's embedding beside its factors."""
    ends = [str(tmp_path / name) for name in ("a", "b")]
    for end in ends:
        config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
        get_peft_model(make_model(tokenizer), config).save_pretrained(end)
        assert any(
            "embed_tokens" in name and "lora" not in name for name in load_file(f"{end}/adapter_model.safetensors")
        )
    args.strategies = [{"name": "LERP", "models": ends, "interpolation_weight": 0.5}]
    assert len(evaluate(args)) == 1


def test_a_model_is_sampled_no_further_than_asked_for(args, judged, tmp_path, tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=12, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "0")
    args.strategies = [{"name": "base"}]
    assert len(evaluate(args)) == 1


def test_an_adapter_is_extrapolated_beyond_itself(tokenizer, tmp_path):
    """As two adapters are: base + 1.5 times its change."""
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        make_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    ids = torch.tensor([[1, 5, 6]])
    row = Row("x", ("base", str(tmp_path / "lora")), (-0.5, 1.5))
    found = Models(str(tmp_path / "base"))(row)(ids).logits
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1.5
    torch.testing.assert_close(found, adapted(ids).logits)


def test_a_metric_that_fails_is_named():
    samples = Samples(["a"], [[1], [2]], 2, 1.0)

    def broken(prompts, completions, **kwargs):
        return {}["x"]

    for function, message in (
        (broken, "metric `broken` raised KeyError: 'x'"),
        (lambda **_: None, "gave `None` for 2"),
    ):
        drawn = Drawn(samples, ["a", "b"], Judges(rewards={"own": function}), 0)
        with pytest.raises((RuntimeError, ValueError), match=message):
            measure(drawn)


def test_too_few_prompts(args):
    args.num_prompts = 4
    with pytest.raises(ValueError, match="has 3 distinct prompts, but `num_prompts` is 4"):
        evaluate(args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"omega": "large"}, "`omega` must be a number or `equal`, got 'large'"),
        ({"dtype": "int8"}, "`dtype` must be auto, float32, bfloat16 or float16, got 'int8'"),
        ({"samples_per_prompt": 1}, "`samples_per_prompt` must be at least 2, got 1"),
        ({"num_processes": 0}, "`num_processes` must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArguments("m", "d", **given)


def test_the_command_line_reads_numbers_and_words(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndataset: d\nomega: 7\nstrategies: [{name: base}]\n")
    from trl import TrlParser

    (read,) = TrlParser(EvaluateArguments).parse_args_and_config(["--config", str(config), "--only", "a", "b"])
    assert float(read.omega) == 7 and read.only == ["a", "b"] and read.strategies == [{"name": "base"}]
    (read,) = TrlParser(EvaluateArguments).parse_args_and_config(["--config", str(config), "--omega", "equal"])
    assert read.omega == "equal"

"""
No code from outside is run, no pickle from outside is read, what people write is shown and not executed, and tokens
stay where they are.
"""

import ast
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from bad_world import Bomb, World
from datasets import Dataset

from trl_drcd.cards import TrainedModel, model_card
from trl_drcd.evaluation.plots import Plot, front_plot, save
from trl_drcd.evaluation.points import Point
from trl_drcd.evaluation.report import Item, Page, PromptItems, Sample
from trl_drcd.evaluation.strategies import expand
from trl_drcd.evaluation.tables import Table
from trl_drcd.markdown import markdown_table
from trl_drcd.validation.model_folders import check_model

ROOT = Path(__file__).parents[2]
SOURCES = sorted(file for part in ("trl_drcd", "recipes", "benchmarks") for file in (ROOT / part).rglob("*.py"))
# What a person may write into a prompt or a name: markup, escape codes, other scripts, ways out of a folder
NASTY = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</title></style></script><b>", "a & b &lt; c",
    "\x1b[2J\x07 bell", "x\u202eexe.wav", "Größe 音楽 🎵", "../../../../etc/passwd", "C:\\con\\nul", "a\x00b",
    "%s %n {0} $x$",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> World:
    return World(tmp_path_factory.mktemp("secure"), tokenizer)


# ------------------------------------------------------------------------------------------------ the sources

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    *("torch.load", "eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"),
    *("yaml.full_load", "pd.read_pickle", "accelerator.register_for_checkpointing"),
}
FORBIDDEN_ARGUMENTS = {
    "allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True, "use_safetensors": False,
}  # fmt: skip


def offences(source: str) -> list[str]:
    """What of the forbidden a source file does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                found.append(name)
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_ARGUMENTS and value is FORBIDDEN_ARGUMENTS[keyword.arg]:
                    found.append(f"{keyword.arg}={value}")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(ROOT)) for file in SOURCES])
def test_nothing_reads_pickles_or_runs_what_it_reads(file):
    assert offences(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        *("torch.load('x')", "import pickle", "from joblib import load", "np.load(f, allow_pickle=True)"),
        *("M.from_pretrained(n, trust_remote_code=True)", "subprocess.run(c, shell=True)", "eval(t)", "yaml.load(t)"),
    ],
)
def test_the_check_finds(source):
    assert len(offences(source)) == 1


def test_the_library_never_asks_whether_code_may_be_run():
    """Left out, `trust_remote_code` makes transformers ask on a terminal, where a wrong key runs the code."""
    for file in (ROOT / "trl_drcd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(\w+\.)?Auto\w+\.from_pretrained", ast.unparse(node.func)
            ):
                given = {keyword.arg for keyword in node.keywords}
                assert given & {"trust_remote_code", None}, f"{file.name}:{node.lineno}"


# ------------------------------------------------------------------------------------------------ code, pickles


def test_code_of_a_model_is_trusted_only_when_the_user_says_so(world, tmp_path):
    folder = world.with_code("model", tmp_path)
    for given in (None, False):
        with pytest.raises(ValueError, match="needs code of its own"):
            check_model("model", folder, given)
    check_model("model", folder, True)
    assert not (tmp_path / "ran").exists()
    assert world.config(tmp_path).trust_remote_code is False
    with pytest.raises(AttributeError, match="OwnConfig"):  # it was run, and is not what it said
        world.trainer(tmp_path, model=folder, processing_class=None, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_code_left_over_beside_a_model_of_transformers_is_not_run(world, tmp_path):
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = world.edited("model", tmp_path, auto_map=auto_map)
    (folder / "own.py").write_text(f"from pathlib import Path\n\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    world.trainer(tmp_path, model=folder, processing_class=None)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run(world, tmp_path):
    folder = world.edited(
        "model", tmp_path, file="tokenizer_config.json", tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", None]},
    )  # fmt: skip
    (folder / "own.py").write_text(f"from pathlib import Path\n\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    try:
        world.trainer(tmp_path, model=folder, processing_class=None)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_run(world, tmp_path, file):
    dataset = Dataset.from_dict({"prompt": ["slow harp", "fast tune"]})
    settings = {"max_steps": 1, "save_steps": 1, "num_generations": 2}
    world.trainer(tmp_path, dataset=dataset, **settings).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "complete.json").unlink()  # as another program would have written it
    torch.save({"state": Bomb(str(tmp_path / "ran"))}, checkpoint / file)
    trainer = world.trainer(tmp_path, dataset=dataset, **(settings | {"max_steps": 2}))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_a_checkpoint_of_the_embedder_is_not_run(world, tmp_path, monkeypatch):
    pytest.importorskip("pytorch_metric_learning")
    import train_embedder
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for number in range(2):
        world.wav(tmp_path / "music" / f"{number}.wav")
    words = ["--dataset", str(tmp_path / "music"), "--output_dir", str(tmp_path / "out"), "--versions", "1"]
    words += ["--recordings_per_batch", "2", "--save_steps", "1", "--steps", "2"]
    train_embedder.main(words)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert not list(checkpoint.glob("custom_checkpoint*"))  # accelerate would read one as any pickle
    (checkpoint / "complete.json").unlink()
    (pickle,) = checkpoint.glob("random_states_0.pkl")
    torch.save({"step": Bomb(str(tmp_path / "ran"))}, pickle)
    train_embedder.main([*words, "--resume_from_checkpoint", str(checkpoint)])  # goes on without it
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ what people write


class Tags(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_what_people_write_and_runs_none_of_it():
    samples = [*(Sample(text, text) for text in NASTY), *(Sample(text, None, "a.wav", "a.png") for text in NASTY)]
    prompts = [PromptItems(text, [Item(name, samples) for name in NASTY[:3]]) for text in NASTY]
    tables = [Table(NASTY[1], NASTY, [NASTY]), Table(NASTY[2], NASTY, [])]
    page = Page(NASTY[0], " ".join(NASTY), tables, prompts, [Plot(text, b"png") for text in NASTY]).html()
    tags = Tags()
    tags.feed(page)
    assert tags.elements <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "table", "tr", "th", "td", "div"),
        *("thead", "tbody", "section", "small", "figure", "figcaption", "img", "audio", "nav", "a"),
    }
    assert not any(name.startswith("on") for name in tags.attributes)
    addresses = {one for one in re.findall(r'(?:src|href)="([^"]*)"', page) if not re.fullmatch(r"#\w+", one)}
    assert addresses == {"a.wav", "a.png", "data:image/png;base64,cG5n"}
    assert "default-src &#39;none&#39;" in page and "script-src" not in page
    for text in NASTY:
        assert text.replace("\x00", "") in tags.text.replace("\x00", "").replace("\ufffd", ""), text


def test_a_plot_shows_names_as_they_are(tmp_path):
    def metric(value):
        return {"mean": value, "low": value - 0.1, "high": value + 0.1}

    names = [*(text for text in NASTY if text.isprintable()), "costs $5 and $x", "$\\frac{1$", "_hidden"]
    points = [
        Point(
            strategy=name, point=name, name=name, temperature=1.0,
            metrics={"quality": metric(number / 10), "diversity": metric(1 - number / 10)},
        ) for number, name in enumerate(names)
    ]  # fmt: skip
    figure = front_plot(points)
    save(figure, tmp_path / "front")
    legend = [text.get_text().strip().replace("\\$", "$") for text in figure.legends[0].get_texts()]
    assert set(names) <= set(legend)
    assert "<script>" not in (tmp_path / "front.svg").read_text()


def test_a_model_card_keeps_its_table_and_shows_names_as_they_are():
    settings = {"guidance_scale": 3.0, "negative_prompt": "a | b\n| c | <script>x</script>"}
    model = TrainedModel("<b>base</b>: [x", "audio tokens", False, 3, 3.0, 0.99, 8, settings=settings)
    card = str(model_card("<script>x</script>", model, {"last": {"kl": 1.0}}))
    (row,) = [line for line in card.splitlines() if line.startswith("| negative_prompt")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert not re.search(r"(?<!\\)<script>", card.replace('name = "<script>', ""))
    assert 'name = "<script>x</script>"' in card  # in a block of code
    assert markdown_table({"a": {"x": 1.5}}) == "| | x |\n|---|---|\n| a | 1.5 |"
    for nasty in NASTY:
        model_card(nasty, replace(model, base=nasty), {})


def test_no_name_of_a_strategy_leads_out_of_the_folder(tmp_path):
    rows = expand([{"name": name} for name in NASTY if name.isprintable()])
    assert len(rows) == len({row.slug for row in rows}) == 8
    for row in rows:
        folder = (tmp_path / "samples" / row.slug).resolve()
        assert folder.parent == (tmp_path / "samples").resolve() and re.fullmatch(r"[\w.]+", row.slug, re.ASCII)
        folder.mkdir(parents=True)


@pytest.mark.parametrize("audio", [True, False])
def test_prompts_in_the_log_are_plain_names(world, tmp_path, monkeypatch, audio):
    """Weights & Biases makes file names of the keys of media."""
    from trl_drcd.callbacks import SampleCallback

    entries: list[dict] = []
    codec = SimpleNamespace(decode=lambda rows: [(torch.zeros(160), 16000) for _ in rows]) if audio else None
    prompts = [*NASTY, "long " * 100, "<script>alert(1)</script>"]
    trainer = world.trainer(tmp_path, codec=codec, sample_steps=1, sample_prompts=prompts)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SampleCallback))
    trainer.args.report_to = ["wandb"]
    fake = SimpleNamespace(log=entries.append, Audio=lambda waveform, sample_rate: waveform.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    callback.on_step_end(trainer.args, SimpleNamespace(global_step=1), None)
    keys = [key.removeprefix("samples/") for key in entries[0] if key.startswith("samples/")]
    assert len(keys) == len(prompts)
    for key in keys:
        assert not set(key) & set("/\\<>\"'|:*?%$") and ".." not in key and 0 < len(key) <= 80 and key.isprintable()


def test_prompts_of_every_script_are_sampled_and_kept(world, tmp_path):
    """What is strange is not bad: such prompts go through the whole evaluation, and come out as they were."""
    prompts = ["a\x00b", "\x1b[2J slow", "音楽 🎵", "<script>alert(1)</script>", "../../harp", "tune\u202e"]
    file = world.prompts(tmp_path, "".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    strategies = [{"name": "<b>base</b>"}, {"name": "../../x", "temperature": 0.9}]
    world.evaluate(tmp_path, dataset=str(file), num_prompts=6, listen=6, strategies=strategies)
    page = (tmp_path / "out" / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.elements and "b" not in tags.elements and "<script>alert(1)</script>" in tags.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.jsonl"]
    kept = sorted(path.name for path in (tmp_path / "out" / "samples").iterdir())
    assert len(kept) == 4 and all(re.fullmatch(r"[\w.]+", name, re.ASCII) for name in kept)  # folders and tokens


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("which", ["music", "text"])
def test_tokens_reach_no_file_and_no_line(world, tmp_path, monkeypatch, capfd, which):
    secrets = {name: f"hf_secret{number}secretsecretsecret" for number, name in enumerate((
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TRACKIO_TOKEN"
    ))}  # fmt: skip
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    secrets["--hub_token"] = "hf_argumentargumentargument"
    world.recipe(
        which, tmp_path, hub_token=secrets["--hub_token"], save_steps=1, logging_steps=1, num_samples=1,
        report_to="tensorboard", eval_dataset=world / "prompts.jsonl",
    )  # fmt: skip
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"README.md", "log.jsonl", "model.safetensors", "trainer_state.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    printed = capfd.readouterr()
    for secret in secrets.values():
        assert [file for file in files if secret.encode() in file.read_bytes()] == []
        assert secret not in printed.out + printed.err


def test_tokens_are_not_in_merges_and_reports(world, tmp_path, monkeypatch, capfd):
    secret = "hf_secretsecretsecretsecret"
    monkeypatch.setenv("HF_TOKEN", secret)
    from trl_drcd.merging import interpolate_checkpoints

    interpolate_checkpoints([world / "model", world / "other"], [0.5, 0.5], tmp_path / "merged")
    world.evaluate(tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"README.md", "report.html", "results.jsonl"} <= {file.name for file in files}
    assert [file for file in files if secret.encode() in file.read_bytes()] == []
    printed = capfd.readouterr()
    assert secret not in printed.out + printed.err


# ------------------------------------------------------------------------------------------------ workflows

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("file", WORKFLOWS, ids=[file.name for file in WORKFLOWS])
def test_workflows_are_pinned_and_may_only_read(file):
    text = file.read_text()
    content = yaml.safe_load(text)
    assert content["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in content["jobs"].values())
    uses = re.findall(r"uses: (.*)", text)
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use) for use in uses)
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert "pull_request_target" not in text and "secrets." not in text
    assert not re.search(r"run:.*\$\{\{ *github\.(event|head_ref)", text)


def test_there_are_workflows():
    assert {file.name for file in WORKFLOWS} == {"checks.yml", "scheduled.yml"}

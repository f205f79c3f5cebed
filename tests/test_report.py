"""The page: which sample stands under which caption, what can be heard, how it is laid out."""

import io
import json
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

from trl_drcd.evaluation import listening
from trl_drcd.evaluation.listening import heard, keep_completions, read_clips, spectrogram_png
from trl_drcd.evaluation.plots import Plot
from trl_drcd.evaluation.report import Item, Page, PromptItems, Sample, kept_samples, summary, write_report
from trl_drcd.evaluation.results import Result
from trl_drcd.evaluation.sampling import Samples
from trl_drcd.evaluation.tables import Table, formatted, markdown, markdown_text

PROMPTS = ["harp", "flute", "drum", "tune", "oboe"]


def kept(folder, name, prompts=PROMPTS, listen=2, listen_samples=2, samples_per_prompt=3):
    """A row whose completions say what they are of."""
    samples = Samples(prompts, [[1]] * len(prompts) * samples_per_prompt, samples_per_prompt, 1.0)
    texts = [f"{name} {prompt} {number}" for prompt in prompts for number in range(samples_per_prompt)]
    keep_completions(folder / "samples" / name, samples, texts, listen, listen_samples)
    return Result(strategy=name, point=name, name=name, samples=name)


def heard_under(page_prompts):
    return {prompt.text: [sample.text for item in prompt.items for sample in item.samples] for prompt in page_prompts}


def test_the_prompts_that_are_heard_are_spread():
    assert heard(5, 2) == [0, 2] and heard(64, 4) == [0, 16, 32, 48] and heard(3, 9) == [0, 1, 2] and heard(3, 0) == []


def test_several_samples_of_each_prompt_are_kept(tmp_path):
    rows = [kept(tmp_path, "base"), kept(tmp_path, "CFG", listen_samples=9)]
    names = sorted(path.name for path in (tmp_path / "samples" / "base").iterdir())
    assert names == ["00_0.txt", "00_1.txt", "01_0.txt", "01_1.txt", "samples.jsonl"]
    lines = (tmp_path / "samples" / "base" / "samples.jsonl").read_text().splitlines()
    assert json.loads(lines[2]) == {"prompt": "drum", "file": "01_0.txt"}
    assert heard_under(kept_samples(rows, tmp_path)) == {
        prompt: [f"base {prompt} 0", f"base {prompt} 1", *(f"CFG {prompt} {number}" for number in range(3))]
        for prompt in ("harp", "drum")
    }
    kept(tmp_path, "base", listen=1, listen_samples=1)  # in place of those that were there
    assert len(list((tmp_path / "samples" / "base").iterdir())) == 2


def test_captions_do_not_depend_on_how_prompts_are_chosen(tmp_path, monkeypatch):
    """Rows of before and after a change of the choice, on one page: every sample stands under its own prompt."""
    rows = [kept(tmp_path, "before")]
    monkeypatch.setattr(listening, "heard", lambda prompts, listen: [prompts - 1, 0])
    rows += [kept(tmp_path, "after"), kept(tmp_path, "other prompts", prompts=PROMPTS[::-1])]
    assert heard_under(kept_samples(rows, tmp_path)) == {
        prompt: [f"{name} {prompt} {number}" for name in names for number in range(2)]
        for prompt, names in {
            "harp": ("before", "after", "other prompts"), "drum": ("before",), "oboe": ("after", "other prompts"),
        }.items()
    }  # fmt: skip


def test_samples_that_are_gone_are_left_out(tmp_path):
    rows = [kept(tmp_path, "base"), Result(strategy="x", point="x", name="x", samples="gone")]
    assert heard_under(kept_samples(rows, tmp_path))["harp"] == ["base harp 0", "base harp 1"]
    assert read_clips(tmp_path / "nothing") == []


def test_conversations_have_their_last_turn_as_caption(tmp_path):
    prompts = [[{"role": "system", "content": "brief"}, {"role": "user", "content": text}] for text in ("a", "b")]
    (prompt, _) = kept_samples([kept(tmp_path, "base", prompts=prompts)], tmp_path)
    assert prompt.text == "a" and read_clips(tmp_path / "samples" / "base")[0].prompt == prompts[0]


def test_sounds_are_files_beside_the_page_with_players_that_say_what_they_play(tmp_path):
    pytest.importorskip("soundfile")
    pytest.importorskip("matplotlib")
    tone = torch.sin(torch.arange(4000) / 5)
    samples = Samples(["slow & <b>", "b"], [[1]] * 4, 2, 1.0)
    keep_completions(tmp_path / "samples" / "a#1", samples, [(tone, 8000)] * 4, 2, 2)
    row = Result(strategy="a", point="a", name="a", samples="a#1", kind="music")
    prompts = kept_samples([row], tmp_path)
    page = Page("t", "i", [], prompts).html()
    players = re.findall(r'<audio controls preload="none" src="([^"]*)" aria-label="([^"]*)"></audio>', page)
    assert players[1] == ("samples/a%231/00_1.wav", "a, sample 2: slow &amp; &lt;b&gt;") and len(players) == 4
    assert (tmp_path / "samples" / "a#1" / "00_1.wav").read_bytes()[:4] == b"RIFF"
    assert (tmp_path / "samples" / "a#1" / "00_1.png").read_bytes()[:4] == b"\x89PNG"
    assert 'src="samples/a%231/00_1.png" alt="Spectrogram of a, sample 2' in page and "base64" not in page


class Outline(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def first(self, tag, **attrs):
        return next(i for i, (name, has) in enumerate(self.tags) if name == tag and attrs.items() <= has.items())


def test_the_page_is_laid_out_for_any_screen_and_loads_nothing_from_elsewhere():
    prompts = [PromptItems("p", [Item("a", [Sample("a, sample 1: p", None, "s.wav", "s.png")])])]
    tables = [Table("", ["", "x (nats)"], [["a", "1.000 [0.500, 1.500]"]]), Table("More", ["", "y"], [["a", "b"]])]
    page = Page("title", "about", tables, prompts, [Plot("Quality against diversity", b"png")]).html()
    outline = Outline(page)
    head = [attrs for tag, attrs in outline.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in head
    (policy,) = [attrs["content"] for attrs in head if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy and "script" not in policy
    assert "http://" not in page and "https://" not in page and "<script" not in page
    # What can be heard comes first, then numbers, plots under their headings, and the rest
    order = [
        outline.first("audio"),
        outline.first("table"),
        outline.first("img", alt="Plot: Quality against diversity"),
    ]
    assert order == sorted(order) and page.index('<h2 id="plots">Quality against diversity</h2>') < page.index("Plot:")
    assert page.index("Plot:") < page.index("More</h2>")
    # No anchor leads nowhere
    targets = {attrs["href"] for tag, attrs in outline.tags if tag == "a"}
    assert targets == {f"#{attrs['id']}" for _, attrs in outline.tags if "id" in attrs}
    # An interval stands below its mean, so that a dozen columns fit on a screen of 1280 px
    assert "<td>1.000<small>[0.500, 1.500]</small></td>" in page


def test_a_page_without_samples_or_plots_says_nothing_of_them():
    page = Page("t", "i", [Table("", ["", "x"], [["a", "1"]])]).html()
    assert "Listen" not in page and "Read" not in page and "Plots" not in page and "<audio" not in page


def test_prompts_in_markdown_are_no_markup():
    evil = "# <b>x</b> [link](http://a.b) ![](c) `d` *e*\n\n## f | g ~~~"
    page = Page("t", "i", [], [PromptItems(evil, [Item("a", [Sample("", "~~~\n~~~~ text")])])]).markdown()
    (heading,) = [line for line in page.splitlines() if line.startswith("###")]
    assert re.sub(r"\\(.)", r"\1", heading) == "### " + " ".join(evil.split())
    for mark in ("<", "[", "](", "!", "`", "*", "|", "~"):
        assert not re.search(rf"(?<!\\){re.escape(mark)}", heading.removeprefix("### ")), mark
    fence = "~" * (3 + 4)
    assert f"\n{fence}text\na: ~~~ ~~~~ text\n{fence}\n" in page
    assert markdown_text("plain words, 3") == "plain words, 3"
    table = Table("", ["name", "x"], [["[a](http://b) `c` | d", "1 [0, 2]"]])
    assert markdown(table).splitlines()[2] == "| [a]\\(http://b) \\`c\\` \\| d | 1 [0, 2] |"


def test_the_summary_has_the_metrics_in_the_order_of_the_table():
    interval = {"mean": 1.0, "low": 0.5, "high": 1.5}
    rows = [
        Result(
            strategy="a, b", point="a", name="a, b", metrics={"kl": interval, "mine": interval, "quality": interval}
        ),
        Result(strategy="c", point="c", name="c", metrics={"kl": interval}, guidance_scale=3),
    ]
    lines = summary(rows).splitlines()
    assert lines[0].endswith("omega,quality,quality_low,quality_high,kl,kl_low,kl_high,mine,mine_low,mine_high")
    assert lines[1].startswith('"a, b","a, b",') and lines[1].endswith("1.0,0.5,1.5," * 2 + "1.0,0.5,1.5")
    assert lines[2].endswith(",,,,1.0,0.5,1.5,,,")


def test_a_report_of_one_strategy_without_judges(tmp_path):
    """A user's own data: what was not measured is not on the page, and no claim is said to be missing twice."""
    pytest.importorskip("matplotlib")
    interval = {"mean": 1.0, "low": 0.5, "high": 1.5}
    metrics = {"kl": interval, "entropy_per_token": interval, "tokens_per_second": interval}
    row = Result(
        strategy="mine", point="mine", name="mine", metrics=metrics, per_prompt={"kl": [1.0, 2.0]}, prompts=2,
        samples_per_prompt=2,
    )  # fmt: skip
    write_report([row], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "KL to the guided teacher (nats)" in page and "not measured" not in page and "do not answer" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "summary.csv"]


def test_an_interval_without_ends_is_not_written_as_one():
    ends = {"low": float("-inf"), "high": float("inf")}
    assert formatted({"mean": -0.0081, **ends}) == "-0.008 (no interval)"
    assert formatted({"mean": -0.0001, "low": -0.5, "high": 0.25}) == "0.000 [-0.500, 0.250]"


def test_a_spectrogram_shows_time_to_the_right_and_frequency_upwards():
    """A tone of 1 kHz in the second half only, at a quarter of the height up to 4 kHz."""
    rate = 16000
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(2 * rate) / rate) * (torch.arange(2 * rate) >= rate)
    with Image.open(io.BytesIO(spectrogram_png(tone, rate))) as image:
        pixels = np.asarray(image.convert("RGB")).sum(-1)
    assert pixels.shape == (512, 63)  # 4 kHz in bins of 7.8 Hz, two seconds in hops of 32 ms
    loudest = np.unravel_index(pixels.argmax(), pixels.shape)
    assert 511 - loudest[0] == 128 and loudest[1] > 31
    colours = matplotlib.colormaps["magma"]([0, 255], bytes=True)[:, :3].astype(int)
    assert (pixels[:, :28] == colours[0].sum()).all() and pixels.max() == colours[1].sum()  # 60 dB


def test_a_spectrogram_has_the_colours_of_matplotlib():
    noise = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 16000) ** 4
    spectrum = torch.stft(noise, 2048, 512, window=torch.hann_window(2048), pad_mode="constant", return_complex=True)[
        :512
    ].abs()
    decibels = 20 * spectrum.log10()
    file = io.BytesIO()
    edges = {"vmin": decibels.max() - 60, "vmax": decibels.max()}
    matplotlib.image.imsave(file, decibels.numpy(), cmap="magma", origin="lower", **edges)
    with Image.open(file) as one, Image.open(io.BytesIO(spectrogram_png(noise, 16000))) as other:
        expected, found = (np.asarray(image.convert("RGB")).astype(int) for image in (one, other))
    assert found.shape == expected.shape and (found != expected).any(-1).mean() < 0.01
    assert np.abs(found - expected).max() <= 4  # a neighbouring colour, where rounding differs


def test_completions_are_there_while_they_are_written_again(tmp_path, monkeypatch):
    """Another process may read them meanwhile: what is not kept any more goes last."""
    kept(tmp_path, "base", listen_samples=3)
    folder, seen = tmp_path / "samples" / "base", []
    write = listening.write_bytes
    monkeypatch.setattr(
        listening, "write_bytes", lambda *a: (write(*a), seen.append(len(list(folder.glob("*.txt")))))[0]
    )
    kept(tmp_path, "base", listen_samples=2)
    assert set(seen) == {6} and len(list(folder.glob("*.txt"))) == 4 == len(read_clips(folder))

"""The tab Listen: the kept samples of an evaluation, with strategies side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_drcd.app import pages
from trl_drcd.evaluation.report import Item, PromptItems, kept_samples
from trl_drcd.evaluation.results import read_results


class Listen:
    """
    Content of the tab.

    Args:
        folder (`str`): `output_dir` of an evaluation.

    Raises:
        FileNotFoundError: If it has no results, or no samples were kept.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if not (self.folder / "results.jsonl").is_file():
            raise FileNotFoundError(
                f"`evaluation={folder}` has no results.jsonl; give the `output_dir` of `trl-drcd evaluate`"
            )
        self.prompts = kept_samples(read_results(self.folder / "results.jsonl"), self.folder)
        if not self.prompts:
            raise FileNotFoundError(f"`evaluation={folder}` has no kept samples; evaluate with `listen` above 0")

    @property
    def strategies(self) -> list[str]:
        """Names of the strategies, in order."""
        return list(dict.fromkeys(item.name for prompt in self.prompts for item in prompt.items))

    @property
    def samples(self) -> int:
        """The largest number of samples of a strategy and prompt."""
        return max(len(item.samples) for prompt in self.prompts for item in prompt.items)

    def show(self, words: str, strategies: list[str], samples: int) -> str:
        """
        Render the samples that match the filters as HTML.

        Args:
            words (`str`): Text that prompts must contain, ignoring case.
            strategies (`list[str]`): Names of the strategies to show.
            samples (`int`): Largest number of samples per strategy and prompt.
        """
        wanted = str(words or "").casefold().strip()
        return pages.listening([
            PromptItems(prompt.text, [
                Item(item.name, item.samples[: int(samples)]) for item in prompt.items if item.name in strategies
            ])
            for prompt in self.prompts
            if wanted in prompt.text.casefold()
        ] if strategies else [])  # fmt: skip


def build(gr: Any, listen: Listen) -> None:
    """Add filters and samples to a tab."""
    with gr.Row():
        words = gr.Textbox(label="Prompts that contain", elem_id="listen-words", scale=2)
        samples = gr.Slider(1, max(2, listen.samples), listen.samples, step=1, label="Samples per strategy", scale=1)
    strategies = gr.CheckboxGroup(listen.strategies, value=listen.strategies, label="Strategies")
    shown = gr.HTML(listen.show("", listen.strategies, listen.samples), elem_id="listen-samples")
    for changed in (words.change, strategies.change, samples.release):
        changed(
            listen.show, [words, strategies, samples], shown, show_progress="hidden", trigger_mode="always_last",
            api_visibility="private",
        )  # fmt: skip

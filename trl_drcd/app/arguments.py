"""Arguments of `trl-drcd app`, validated before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trl_drcd.validation.field_types import check_types

TABS = ("play", "listen", "rate")
# Results of `make demo` for `--demo`, a study of them, and the models of the repository to use without them
DEMO = Path("outputs/demo")
DEMO_STUDY = Path("outputs/demo_study")
WORLD = Path("recipes/tiny_music/models")
# From recipes/tiny_music/data/test_prompts.jsonl
EXAMPLES = ["a fast tune for flute", "an irish reel at a slow tempo in Eb major", "a hornpipe for piano"]
SHIPPED_ENDS = ("results/music/runs/beta0_s0", "results/music/runs/beta300_s0")


@dataclass
class AppArguments:
    """Arguments of `trl-drcd app`; `--config FILE.yaml` reads them from a file."""

    model: str | None = field(default=None, metadata={"help": "Play: the base model, folder or Hub name."})
    ends: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Play: trained models or LoRA adapters; for two there is one slider, lambda from the first to the "
            "second; for more, one slider each. `base` may be one."
        },
    )
    end_names: list[str] = field(default_factory=list, metadata={"help": "Play: names of the ends on the page."})
    examples: list[str] = field(default_factory=list, metadata={"help": "Play: example prompts."})
    codec: str | None = field(default=None, metadata={"help": "Play: codec of a causal LM over audio tokens."})
    dtype: str = field(default="float32", metadata={"help": "Play: float32, bfloat16 or float16."})
    max_new_tokens: int = field(default=200, metadata={"help": "Play: largest length of a completion."})
    most_samples: int = field(default=8, metadata={"help": "Play: largest number of samples per request."})
    evaluation: str | None = field(default=None, metadata={"help": "Listen: `output_dir` of an evaluation."})
    study: str | None = field(default=None, metadata={"help": "Rate: folder of a study of `trl-drcd ratings design`."})
    tabs: list[str] = field(
        default_factory=list,
        metadata={"help": "play, listen, rate; by default those whose model, evaluation or study is given."},
    )
    demo: bool = field(default=False, metadata={"help": "Use the results of `make demo`, else the shipped models."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to bind to; with 0.0.0.0 other machines have access, without a password."},
    )
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    sync_to: str | None = field(
        default=None, metadata={"help": "Rate: private data set on the Hub that ratings are copied to, user/name."}
    )
    export: str | None = field(
        default=None, metadata={"help": "Write a static page of the evaluation to this folder instead of serving."}
    )
    title: str = field(default="Quality and diversity", metadata={"help": "Heading of the static page."})

    def __post_init__(self) -> None:
        check_types(self)
        if unknown := [tab for tab in self.tabs if tab not in TABS]:
            raise ValueError(f"`tabs` has unknown names {unknown}; known are {list(TABS)}")
        if not 0 < self.port < 2**16:
            raise ValueError(f"`port` must be between 1 and {2**16 - 1}, got {self.port}")
        for name in ("max_new_tokens", "most_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.end_names and len(self.end_names) != len(self.ends):
            raise ValueError(f"`end_names` must have one name per end, got {self.end_names} for `ends={self.ends}`")
        if self.demo:
            self._fill_in_demo()
        if not self.tabs:
            self.tabs = [tab for tab, needed in self._needed().items() if needed]
        if missing := [tab for tab in self.tabs if not self._needed()[tab]]:
            wanted = {"play": "model", "listen": "evaluation", "rate": "study"}
            raise ValueError(f"the tab {missing[0]} needs `{wanted[missing[0]]}`")
        if not self.tabs:
            raise ValueError("give `model` to play, `evaluation` to listen, `study` to rate, or set `demo`")
        if self.export and not self.evaluation:
            raise ValueError("`export` needs an `evaluation`; give its folder")

    def _needed(self) -> dict[str, str | None]:
        return {"play": self.model, "listen": self.evaluation, "rate": self.study}

    def _fill_in_demo(self) -> None:
        """Fill in the results of `make demo` or, without them, the shipped base and adapters."""
        if not WORLD.is_dir():
            raise FileNotFoundError(
                f"`demo` needs {WORLD}, which is in the repository; run it in a clone, or give `model`"
            )
        made = [str(DEMO / name) for name in ("quality", "diversity")]
        self.model = self.model or str(WORLD / "musiclm")
        self.codec = self.codec or str(WORLD / "codec")
        if not self.ends:
            ran = all(Path(end).is_dir() for end in made)
            self.ends = made if ran else list(SHIPPED_ENDS)
            self.end_names = ["quality", "diversity"] if ran else ["quality (beta 0)", "diversity (beta 300)"]
        self.examples = self.examples or EXAMPLES
        if self.evaluation is None and (DEMO / "results.jsonl").is_file():
            self.evaluation = str(DEMO)
        if self.study is None and (DEMO_STUDY / "study.sqlite").is_file():
            self.study = str(DEMO_STUDY)

"""What `trl-drcd app` takes, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trl_drcd.validation.field_types import check_types

TABS = ("play", "listen", "rate")
# Where `--demo` looks for what `make demo` has made; and what comes with the repository, to play without it
DEMO = Path("outputs/demo")
WORLD = Path("recipes/tiny_music/models")
# Of recipes/tiny_music/data/test_prompts.jsonl
EXAMPLES = ["a fast tune for flute", "an irish reel at a slow tempo in Eb major", "a hornpipe for piano"]
SHIPPED_ENDS = ("results/music/runs/beta0_s0", "results/music/runs/beta300_s0")


@dataclass
class AppArguments:
    """What `trl-drcd app` takes; `--config FILE.yaml` gives the same from a file."""

    model: str | None = field(default=None, metadata={"help": "Play: the base model, folder or hub name."})
    ends: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Play: trained models or LoRA adapters; two have one slider, lambda from the first to the second, "
            "more have one each. `base` may be one."
        },
    )
    end_names: list[str] = field(default_factory=list, metadata={"help": "Play: what to call the ends on the page."})
    examples: list[str] = field(default_factory=list, metadata={"help": "Play: prompts to begin with."})
    codec: str | None = field(default=None, metadata={"help": "Play: codec of a causal LM over audio tokens."})
    dtype: str = field(default="float32", metadata={"help": "Play: float32, bfloat16 or float16."})
    max_new_tokens: int = field(default=200, metadata={"help": "Play: largest length of a completion."})
    most_samples: int = field(default=8, metadata={"help": "Play: most samples at one time."})
    evaluation: str | None = field(default=None, metadata={"help": "Listen: `output_dir` of an evaluation."})
    study: str | None = field(default=None, metadata={"help": "Rate: folder of a study of `trl-drcd ratings design`."})
    tabs: list[str] = field(
        default_factory=list, metadata={"help": "play, listen, rate; those that have what they need if none is given."}
    )
    demo: bool = field(default=False, metadata={"help": "What `make demo` has made, or the shipped models."})
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to bind to; 0.0.0.0 lets others in, who need no password."}
    )
    port: int = field(default=7860, metadata={"help": "Port."})
    sync_to: str | None = field(
        default=None, metadata={"help": "Rate: private data set on the Hub that ratings are copied to, user/name."}
    )
    export: str | None = field(
        default=None, metadata={"help": "Write a static page of the evaluation into this folder, and serve nothing."}
    )
    title: str = field(default="Quality and diversity", metadata={"help": "Heading of the static page."})

    def __post_init__(self) -> None:
        check_types(self)
        if unknown := [tab for tab in self.tabs if tab not in TABS]:
            raise ValueError(f"`tabs` has {unknown}; there are {list(TABS)}")
        if not 0 < self.port < 2**16:
            raise ValueError(f"`port` must be between 1 and {2**16 - 1}, got {self.port}")
        for name in ("max_new_tokens", "most_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.end_names and len(self.end_names) != len(self.ends):
            raise ValueError(f"`end_names` must have one for each of `ends`, got {self.end_names} for {self.ends}")
        if self.demo:
            self._fill_in_demo()
        if not self.tabs:
            self.tabs = [tab for tab, needed in self._needed().items() if needed]
        if missing := [tab for tab in self.tabs if not self._needed()[tab]]:
            wanted = {"play": "model", "listen": "evaluation", "rate": "study"}
            raise ValueError(f"the tab {missing[0]} needs `{wanted[missing[0]]}`")
        if not self.tabs:
            raise ValueError("give `model` to play, `evaluation` to listen, `study` to rate; or `demo`")
        if self.export and not self.evaluation:
            raise ValueError("`export` writes a page of an `evaluation`; give its folder")

    def _needed(self) -> dict[str, str | None]:
        return {"play": self.model, "listen": self.evaluation, "rate": self.study}

    def _fill_in_demo(self) -> None:
        """What `make demo` has left, and the shipped base and adapters where it has not run."""
        if not WORLD.is_dir():
            raise FileNotFoundError(
                f"`demo` needs {WORLD}, which comes with the repository; call it in a clone, or give `model`"
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

"""A small evaluation's folder, with samples as an evaluation keeps them, and a study of it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from trl_drcd.files import wav_bytes
from trl_drcd.ratings.design import DesignArguments
from trl_drcd.ratings.study import create_study

MODELS = ["base", "CFG", "beta 0", "beta 15", "LERP"]
PROMPTS = ["slow waltz", "<img src=x onerror=alert(1)>", "a reel", "march", "jig", "air"]


def make_evaluation(folder: Path, kind: str = "music", samples: int = 3, models=MODELS, prompts=PROMPTS) -> Path:
    """`results.jsonl` and `samples/`: tones whose pitch tells the model, or texts."""
    rng = np.random.default_rng(0)
    lines = []
    for number, model in enumerate(models):
        slug, index = f"m{number}", []
        for prompt in range(len(prompts)):
            for sample in range(samples):
                path = folder / "samples" / slug / f"{prompt:02d}_{sample}.{'txt' if kind == 'text' else 'wav'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                index.append(json.dumps({"prompt": prompts[prompt], "file": path.name}) + "\n")
                if kind == "text":
                    path.write_text(f"{model} wrote <b>{prompt}</b> number {sample} of several words")
                else:
                    time = torch.arange(3200) / 8000
                    tone = 0.3 * torch.sin(2 * torch.pi * (220 + 40 * number + 10 * sample + prompt) * time)
                    path.write_bytes(wav_bytes(tone, 8000))
        (folder / "samples" / slug / "samples.jsonl").write_text("".join(index))
        metrics = {m: rng.normal(number, 1, len(prompts)) for m in ("quality", "diversity", "entropy_per_token")}
        lines.append(
            {
                "name": model, "samples": slug, "kind": kind, "prompts": len(prompts),
                "metrics": {m: {"mean": v.mean(), "low": v.min(), "high": v.max()} for m, v in metrics.items()}
                | {"tokens_per_second": {"mean": 100.0, "low": 100.0, "high": 100.0}},
                "per_prompt": {m: v.tolist() for m, v in metrics.items()},
            }
        )  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory) -> Path:
    """Five models, six prompts, three samples of each, as music."""
    return make_evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def study(evaluation, tmp_path):
    """A study of it for six raters, three for each item."""
    arguments = DesignArguments(str(evaluation), str(tmp_path / "study"), raters=6, diversity_prompts=3)
    return create_study(arguments)[0]


@pytest.fixture
def environment() -> dict[str, str]:
    """For processes that import this package."""
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

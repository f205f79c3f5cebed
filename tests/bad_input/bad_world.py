"""A world of a few thousand weights on disk, and what a row of bad input is."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from conftest import WORDS, make_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer
from trl_drcd.audio import MusicEmbedder
from trl_drcd.audio.codecs import SpectralCodec

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "music")]


@dataclass
class Bad:
    """
    One bad input: what is done with it, and what must come of it before anything is sampled.

    Args:
        name (`str`): What is bad.
        act (`Callable`): Called with the world and an empty folder.
        error (`type`): The class of the error; `SystemExit` on the command line.
        argument, value, remedy (`str`): What the message must name: whose fault, what was given, what would be right.
    """

    name: str
    act: Callable[[World, Path], Any]
    error: type[BaseException]
    argument: str
    value: str
    remedy: str


class World:
    """
    Folders `model`, `other` (another seed), `adapter`, `codec`, `embedder`, and a file `prompts.jsonl`; all are read
    alone. What is to be broken is copied first.
    """

    def __init__(self, root: Path, tokenizer: Any) -> None:
        self.root, self.tokenizer = root, tokenizer
        for name, seed in (("model", 0), ("other", 1)):
            make_model(tokenizer, seed).save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        adapted = get_peft_model(make_model(tokenizer), LoraConfig(r=2, task_type="CAUSAL_LM"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(root / "adapter")
        SpectralCodec(torch.randn(2, 2, 96), iterations=2).save_pretrained(root / "codec")
        sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "feed_forward_size": 8}
        MusicEmbedder(**sizes).save_pretrained(root / "embedder")
        (root / "empty.jsonl").write_text('{"prompt": "slow"}\n{"prompt": ""}\n')
        (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"slow {w}"}) + "\n" for w in WORDS))

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def model(self, **overrides: Any) -> Any:
        return make_model(self.tokenizer, **overrides)

    def chat(self, template: str) -> Any:
        """The tokenizer with a chat template."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    def copy(self, name: str, tmp: Path) -> Path:
        """A copy of a folder, to be broken."""
        return Path(shutil.copytree(self.root / name, tmp / name))

    def edited(self, name: str, tmp: Path, file: str = "config.json", **changes: Any) -> Path:
        """A copy of a folder with entries of a JSON file changed; `...` removes one."""
        folder = self.copy(name, tmp)
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
        return folder

    def with_file(self, name: str, tmp: Path, file: str, content: bytes | str | None) -> Path:
        """A copy of a folder with one file replaced, or removed."""
        folder = self.copy(name, tmp)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    def torn(self, name: str, tmp: Path, file: str = "model.safetensors") -> Path:
        """A copy of a folder in which a file lacks its second half, as after a broken download."""
        content = (self.root / name / file).read_bytes()
        return self.with_file(name, tmp, file, content[: len(content) // 2])

    def pickled(
        self, name: str, tmp: Path, file: str = "model.safetensors", pickle: str = "pytorch_model.bin"
    ) -> Path:
        """A copy of a folder whose weights are a pickle that would leave the file `ran` beside the folder."""
        folder = self.with_file(name, tmp, file, None)
        torch.save({"weight": Bomb(str(tmp / "ran"))}, folder / pickle)
        return folder

    def with_code(self, name: str, tmp: Path) -> Path:
        """A copy of a model's folder with code of its own, which would leave the file `ran` beside the folder."""
        folder = self.edited(
            name, tmp, model_type="own", architectures=["OwnModel"],
            auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        )  # fmt: skip
        (folder / "own.py").write_text(f"from pathlib import Path\n\nPath({str(tmp / 'ran')!r}).touch()\n")
        return folder

    def poisoned(self, name: str, tmp: Path, file: str = "model.safetensors") -> Path:
        """A copy of a folder with one NaN in its first tensor."""
        folder = self.copy(name, tmp)
        tensors = load_file(folder / file)
        tensors[min(tensors)].view(-1)[0] = float("nan")
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return folder

    def large(self, tmp: Path) -> Path:
        """A model with a weight of 1e6, which float16 does not hold."""
        model = self.model()
        model.lm_head.weight.data[0, 0] = 1e6
        model.save_pretrained(tmp / "large")
        return tmp / "large"

    def prompts(self, tmp: Path, content: str | bytes, suffix: str = ".jsonl") -> Path:
        """A file of prompts."""
        file = tmp / f"prompts{suffix}"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def yaml(self, tmp: Path, content: str | bytes) -> str:
        """A YAML file."""
        file = tmp / "run.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(file)

    def config(self, tmp: Path, **overrides: Any) -> CFGDistillDiversityConfig:
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_completion_length": 4,
            "gradient_checkpointing": False, "report_to": "none", "use_cpu": True,
        }  # fmt: skip
        return CFGDistillDiversityConfig(str(tmp / "out"), **(settings | overrides))

    def trainer(
        self, tmp: Path, model: Any = None, dataset: Any = None, processing_class: Any = ..., **overrides: Any
    ) -> CFGDistillDiversityTrainer:
        """A trainer; `overrides` are its own arguments or those of its configuration."""
        own = {
            name: overrides.pop(name)
            for name in ("embedder", "codec", "peft_config", "eval_dataset", "reward_funcs")
            if name in overrides
        }
        return CFGDistillDiversityTrainer(
            model=self.model() if model is None else str(model) if isinstance(model, Path) else model,
            args=self.config(tmp, **overrides),
            train_dataset=Dataset.from_dict({"prompt": ["slow harp", "fast tune"]}) if dataset is None else dataset,
            processing_class=self.tokenizer if processing_class is ... else processing_class,
            **own,
        )

    def recipe(self, which: str, tmp: Path, *words: str, **changed: Any) -> None:
        """The music or the text recipe, or the package's script; `None` leaves an argument out."""
        import musiclm_drcd
        import text_drcd

        from trl_drcd.scripts import train_text

        settings: dict[str, Any] = {
            "model_name_or_path": self / "model", "dataset": self / "prompts.jsonl", "output_dir": tmp / "out",
            "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "use_cpu": True,
            "max_completion_length": 4, "gradient_checkpointing": False, "bf16": False, "report_to": "none",
        }  # fmt: skip
        given = {name: value for name, value in (settings | changed).items() if value is not None}
        main = {"music": musiclm_drcd.main, "text": text_drcd.main, "script": train_text.main}[which]
        main([*words, *(word for name, value in given.items() for word in (f"--{name}", str(value)))])

    def command(self, *words: object) -> None:
        """`trl-drcd ...`."""
        from trl_drcd import cli

        cli.main([str(word) for word in words])

    def evaluate(self, tmp: Path, **changed: Any) -> None:
        """An evaluation, from Python."""
        from trl_drcd.evaluation.grid import EvaluateArguments, evaluate

        settings: dict[str, Any] = {
            "model": str(self / "model"), "dataset": str(self / "prompts.jsonl"), "output_dir": str(tmp / "out"),
            "num_prompts": 2, "samples_per_prompt": 2, "max_new_tokens": 3, "batch_size": 4, "listen": 1,
        }  # fmt: skip
        evaluate(EvaluateArguments(**(settings | changed)))

    def wav(self, file: Path, seconds: float = 9.0) -> Path:
        """A sound file of noise."""
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).standard_normal(int(16000 * seconds)) * 0.1
        soundfile.write(file, noise, 16000)
        return file


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.file),)

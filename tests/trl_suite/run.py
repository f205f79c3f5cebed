"""
TRL's own tests of its RLOO trainer, with our trainer and configuration in place of TRL's.

    python tests/trl_suite/run.py                       # clones TRL at the version that is installed; nothing is kept
    python tests/trl_suite/run.py --trl CLONE           # with the tests of a clone that is there
    python tests/trl_suite/run.py --trl CLONE --own     # with TRL's own classes: what the stand-ins alone make fail
    python tests/trl_suite/run.py --trl CLONE -k peft   # further words are pytest's

A test that asks for something we refuse stands in `REFUSED` with what the message says: it passes where that error is
raised, and fails where anything else happens. Tests of vLLM are skipped where there is none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/huggingface/trl"
sys.path.insert(0, str(HERE))

IMAGES = "`train_dataset` has a column `images?`: .* scored without it; use text-only prompts"
BETA = "`beta=0.1` is TRL's KL penalty to the base without guidance, .*; set `beta=0`"
REFUSED = {
    "test_train_vlm": IMAGES,
    "test_train_vlm_with_pad_to_multiple_of": IMAGES,
    "test_train_vlm_peft": IMAGES,
    "test_train_vlm_multi_image": IMAGES,
    "test_train_vlm_log_multimodal_false": IMAGES,
    "test_train_vlm_beta_non_zero": BETA,
    "test_train_with_sync_ref_model": BETA,
    "test_train_with_additional_generation_kwargs": "`top_k=10` samples from a different .*; set `top_k=0`",
    "test_train_with_generation_kwargs": "`generation_kwargs` has .* which may change the sampled distribution",
}
# Fails with TRL's own classes too where its tests are older than TRL 1.16 or PEFT is newer than they know
OLDER = {"test_train_moe_peft_model": "with PEFT 0.20 TRL gives every adapter a frozen copy, `ref`"}
# Needs a `generate` of the test's own, and the vocabulary that it draws from
MOCKED = {"test_train_with_mask_truncated_completions": "mocks `generate`, and the trainer samples by itself"}
# Streams without `max_steps` are refused before what this test is about
STREAMS = ("test_iterable_dataset_requires",)
# With the default batch, which here is the paper's
WHOLE_BATCH = ("test_init", "test_iterable", "test_trust", "test_correct", "test_single", "test_mismatched")
# In place of the helpers beside TRL's tests, which belong to one version of TRL
HELPERS = """
import pytest
from transformers.utils import is_peft_available, is_vision_available
from trl.import_utils import is_vllm_available

require_peft = pytest.mark.skipif(not is_peft_available(), reason="test requires peft")
require_vision = pytest.mark.skipif(not is_vision_available(), reason="test requires vision")
require_vllm = pytest.mark.skipif(not is_vllm_available(), reason="test requires vllm")


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def set_tmp_dir(self, tmp_path):
        self.tmp_dir = str(tmp_path)
"""


class Swap:
    """Pytest plugin: puts stand-ins, and our classes, in the place of TRL's, and checks refusals."""

    def __init__(self, own: bool):
        self.own = own

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Once their module is imported."""
        import pytest
        import torch
        from stand_ins import load_dataset

        from trl_drcd import CFGDistillDiversityConfig, CFGDistillDiversityTrainer

        if not torch.cuda.is_available():
            on_the_cpu()
        for item in items:
            item.module.load_dataset = load_dataset
            if item.originalname in OLDER:
                item.add_marker(pytest.mark.xfail(reason=OLDER[item.originalname]))
            if self.own:
                continue
            if item.originalname in MOCKED:
                item.add_marker(pytest.mark.skip(reason=MOCKED[item.originalname]))
            if item.originalname.startswith(WHOLE_BATCH):
                item.obj = self._with(item.obj, item.module, "load_dataset", partial(load_dataset, times=2))
            item.module.RLOOTrainer, item.module.RLOOConfig = CFGDistillDiversityTrainer, CFGDistillDiversityConfig
            if item.originalname.startswith(STREAMS):
                config = partial(CFGDistillDiversityConfig, max_steps=1)
                item.obj = self._with(item.obj, item.module, "RLOOConfig", config)
            if (reason := REFUSED.get(item.originalname)) is not None:
                item.obj = self._refused(item.obj, reason, pytest.raises)

    @staticmethod
    def _with(test: Any, module: Any, name: str, value: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> None:
            before = getattr(module, name)
            setattr(module, name, value)
            try:
                test(*args, **kwargs)
            finally:
                setattr(module, name, before)

        return changed

    @staticmethod
    def _refused(test: Any, reason: str, raises: Any) -> Any:
        def checked(*args: Any, **kwargs: Any) -> None:
            with raises((ValueError, TypeError), match=reason):
                test(*args, **kwargs)

        return checked


def on_the_cpu() -> None:
    """TRL's configurations ask for bfloat16 on a GPU unless told otherwise; its own conftest tells them so."""
    from trl.trainer.base_config import _BaseConfig

    post_init = _BaseConfig.__post_init__

    def with_cpu(self: Any) -> None:
        self.use_cpu = True
        post_init(self)

    _BaseConfig.__post_init__ = with_cpu


def clone_trl(folder: Path) -> Path:
    """TRL's repository at the version that is installed: a wheel has no tests, nor has the source archive."""
    tag = f"v{version('trl')}"
    command = ["git", "clone", "-q", "--depth", "1", "--branch", tag, REPOSITORY, str(folder)]
    if subprocess.run(command).returncode:
        raise SystemExit(f"{REPOSITORY} could not be cloned at {tag} (see above); clone it elsewhere and give --trl")
    return folder


def rloo_tests(clone: Path) -> Path:
    """The file with TRL's tests of its RLOO trainer."""
    file = clone / "tests" / "test_rloo_trainer.py"
    if not file.is_file():
        raise SystemExit(f"--trl {clone} has no tests/test_rloo_trainer.py; give a clone of {REPOSITORY}")
    return file


def main() -> int:
    """Runs them; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trl", type=Path, help="a clone of TRL's repository; else one is made")
    parser.add_argument("--own", action="store_true", help="TRL's own classes")
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": f"{folder}/hub", "HF_HOME": f"{folder}/home"}
        tests = Path(folder, "suite", "tests")
        tests.mkdir(parents=True)
        (tests / "__init__.py").touch()
        (tests / "testing_utils.py").write_text(HELPERS)
        shutil.copy(rloo_tests(options.trl or clone_trl(Path(folder, "trl"))), tests)
        import pytest
        from stand_ins import write_cache

        write_cache(Path(folder, "hub"))
        os.chdir(tests.parent)
        return pytest.main(
            [str(tests), "-q", "-p", "no:cacheprovider", "--rootdir", str(tests.parent), *words], [Swap(options.own)]
        )


if __name__ == "__main__":
    sys.exit(main())

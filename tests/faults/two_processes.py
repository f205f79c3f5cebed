"""
Two processes on the CPU (gloo), one of which fails in the third update; what the processes print goes to their logs.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 \\
        tests/faults/two_processes.py FAULT OUT

It goes on from the newest checkpoint of OUT, if there is one. FAULT is `none`, `embedder` (raises on one process),
`dies` (SIGKILL), `hangs`, `signal` (SIGTERM), `disk` (one cannot write), or `skip` (its embedder raises, then its
teacher gives NaN).
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from worlds import bag_of_words, make_trainer

from trl_drcd.reliability.checkpoints import checkpoints


def main(fault: str, output: Path) -> None:
    """Trains; rank 1 is the one that fails."""
    rank = int(os.environ["RANK"])

    def embed(texts):
        if rank == 1 and trainer.state.global_step == 2:
            if fault in ("embedder", "skip"):
                raise TimeoutError("the embedding service does not answer")
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if fault == "hangs":
                time.sleep(600)
        return bag_of_words(texts)

    settings = {"max_steps": 4, "num_iterations": 1, "eval_strategy": "no", "save_steps": 1, "ddp_timeout": 15}
    settings["save_total_limit"] = 4
    if fault == "embedder":
        settings["save_steps"] = 100
    if fault == "skip":
        settings |= {"on_bad_batch": "skip", "max_steps": 5}
    trainer = make_trainer("text", output, embedder=embed, **settings)
    if fault == "skip" and rank == 1:
        trainer.teacher.copy.model.norm.register_forward_hook(
            lambda module, args, output: output * torch.nan if trainer.state.global_step == 3 else output
        )
    if fault == "disk":
        save = trainer._save_rng_state

        def limited(folder):
            if rank == 1 and trainer.state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, resource.RLIM_INFINITY))
            save(folder)

        trainer._save_rng_state = limited
    trainer.train(resume_from_checkpoint=bool(checkpoints(output)))
    trainer.save_model(str(output))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

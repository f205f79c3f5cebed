"""
The diversity advantages of a training run's steps: the critic of prefixes, on any number of processes.

Letters: `b` completions of this process, `B` of all, `G` generations per prompt, `M` prefixes of a completion, `S`
steps, `K` codebooks, `D` embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from trl_drcd.credit import per_code
from trl_drcd.critic import CriticOutput, PrefixCritic, critic_advantages, embed_prefixes, prefix_steps
from trl_drcd.reliability.batches import raise_together

FILE = "critic.safetensors"


class StepCredit:
    """
    [`~trl_drcd.critic.critic_advantages`] of rollouts whose groups may lie on several processes.

    Each process embeds the prefixes of its own completions; the embeddings are gathered, so that every process
    computes the advantages of the global batch and its critic learns the same.

    Args:
        accelerator (`Accelerator`): Of the launch.
        gae_lambda (`float`): See [`~trl_drcd.credit.generalized_advantages`].
        kernel (`str`): See [`~trl_drcd.kernels.diversity_shares`].
        max_steps (`int`): Longest completion in steps.
        num_prefixes (`int`): `M`.
        num_codebooks (`int`, *optional*, defaults to 1): `K`.

    Raises:
        ValueError: If completions are too short for a prefix.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        gae_lambda: float,
        kernel: str,
        max_steps: int,
        num_prefixes: int,
        num_codebooks: int = 1,
    ) -> None:
        self.accelerator, self.gae_lambda, self.kernel = accelerator, gae_lambda, kernel
        self.steps = prefix_steps(max_steps, num_prefixes, least=num_codebooks)
        self.num_codebooks = num_codebooks
        self.critic = PrefixCritic(len(self.steps))

    def advantages(
        self,
        embed: Callable[[list[list[int]]], torch.Tensor],
        completion_ids: list[list[int]],
        mask: torch.Tensor,
        embeddings: torch.Tensor,
        num_generations: int,
        fit: bool,
    ) -> CriticOutput:
        """
        Advantages of the codes of this process's completions, and the critic's metrics; then the critic learns.

        Args:
            embed (`Callable`): Embeddings `(len, D)` of lists of token ids.
            completion_ids (`list[list[int]]`): Of this process, `b` of them, without padding.
            mask (`torch.Tensor`): True where a code is scored, shape `(b, S, K)`.
            embeddings (`torch.Tensor`): Of the completions of all processes, shape `(B, D)`.
            num_generations (`int`): Group size `G`.
            fit (`bool`): False in evaluation.

        Returns:
            `CriticOutput`: Advantages `(b, S, K)`, 0 where no code is scored.

        Raises:
            BadBatchError: In every process, if in any one the embedder raises.
        """
        problems: list[str] = []
        cause: Exception | None = None
        prefixes, reached = torch.zeros(0, 0, 0), torch.zeros(0, 0)
        try:
            size = embeddings.shape[1]
            prefixes, reached = embed_prefixes(embed, completion_ids, self.steps, size, self.num_codebooks)
        except Exception as error:  # the other processes wait for this one's embeddings
            problems, cause = (
                [f"the embedder raised {type(error).__name__} for beginnings of completions: {error}"],
                error,
            )
        raise_together(problems, cause)
        device = self.accelerator.device
        prefixes, reached = (self.accelerator.gather(t.to(device)) for t in (prefixes, reached.long()))
        output = critic_advantages(
            self.critic, prefixes, reached.bool(), embeddings, num_generations, self.gae_lambda, self.kernel, fit
        )
        start = self.accelerator.process_index * len(completion_ids)
        own = output.advantages[start : start + len(completion_ids)]
        return CriticOutput(per_code(own, self.steps, mask), output.metrics)

    def save(self, folder: Path) -> None:
        """Writes the critic's state into a checkpoint."""
        save_file({name: tensor.contiguous() for name, tensor in self.critic.state_dict().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Reads what [`save`] wrote; a checkpoint of a run that credited sequences has none."""
        if (folder / FILE).is_file():
            self.critic.load_state_dict(load_file(folder / FILE))

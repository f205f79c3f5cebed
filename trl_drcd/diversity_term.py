"""
The diversity term of a training run: what a rollout is rewarded, and the advantages of its sequences or codes.

Letters: `b` completions of this process, `B` of all, `G` generations per prompt, `S` steps, `K` codebooks, `D`
embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from trl_drcd.config import CFGDistillDiversityConfig
from trl_drcd.credit import per_code
from trl_drcd.critic import PrefixCritic, critic_advantages, embed_prefixes, hidden_means, prefix_steps
from trl_drcd.diversity import DiversityReward
from trl_drcd.kernels import kernel_advantages
from trl_drcd.mixture import EmbedderMixture
from trl_drcd.policies import Policy
from trl_drcd.prompts import Row
from trl_drcd.reliability.batches import raise_together

FILE = "critic.safetensors"


class ScoredDiversity(NamedTuple):
    """
    `rewards (b,)` of this process's completions and `all_rewards (B,)`, mean cosine distances; `advantages` of the
    former, `(b,)`, or of their codes, `(b, S, K)`; and metrics by log key: the critic's, and of each embedder.
    """

    rewards: torch.Tensor
    all_rewards: torch.Tensor
    advantages: torch.Tensor
    metrics: dict[str, float]


class DiversityTerm:
    """
    Scores rollouts whose groups may lie on several processes.

    Each process embeds its own completions, and with a critic the beginnings of them; the embeddings are gathered, so
    that every process computes the advantages of the global batch, and its critic learns the same.

    Args:
        reward ([`~trl_drcd.diversity.DiversityReward`]): With embedder and codec.
        decode (`Callable`): Texts of lists of token ids; used where there is no codec.
        args ([`~trl_drcd.config.CFGDistillDiversityConfig`]): `diversity_credit`, `gae_lambda`, `diversity_prefixes`,
            `diversity_hidden_states`, `diversity_kernel`, the length of completions, and the sizes of groups.
        policy ([`~trl_drcd.policies.Policy`]): Of the model's family.
        accelerator (`Accelerator`): Of the launch.

    Raises:
        ValueError: If completions are too short for the critic's prefixes.
    """

    def __init__(
        self,
        reward: DiversityReward,
        decode: Callable[[list[list[int]]], list[str]],
        args: CFGDistillDiversityConfig,
        policy: Policy,
        accelerator: Accelerator,
    ) -> None:
        self.reward, self.decode, self.accelerator = reward, decode, accelerator
        self.gae_lambda, self.kernel, self.policy = args.gae_lambda, args.diversity_kernel, policy
        train = int(args.num_generations)
        self.num_generations = {"train": train, "eval": int(args.num_generations_eval or train)}
        self.max_length = int(args.max_completion_length or 0)  # `check_before_loading` refuses 0
        self.steps: list[int] = []
        self.critic: PrefixCritic | None = None
        if args.diversity_credit == "critic" and args.diversity_coef:  # without a reward there is nothing to credit
            self.steps = prefix_steps(self.max_length, args.diversity_prefixes, policy.first_frame_steps)
            self.critic = PrefixCritic(len(self.steps), hidden_states=args.diversity_hidden_states is not False)

    def score(
        self, rows: Sequence[Row], batch: dict[str, torch.Tensor], mode: str, hidden: torch.Tensor
    ) -> ScoredDiversity:
        """
        Rewards and advantages of a rollout; then, in training, the critic learns from it.

        Args:
            rows (`list[dict]`): Dataset rows of this process, `b` of them; `prompt` is for messages.
            batch (`dict`): Their `completion_ids` and `completion_mask`, right-padded.
            mode (`str`): `"train"` or `"eval"`.
            hidden (`torch.Tensor`): The teacher's last hidden states on them, with the prompt, `(b, S, H)` or
                `(b, S, K, H)`; the critic reads them.

        Raises:
            BadBatchError: In every process, if in any one the embedder raises, or a vector has no direction.
        """
        prompts, num_generations = [row["prompt"] for row in rows], self.num_generations[mode]
        completion_ids = unpadded(batch["completion_ids"], batch["completion_mask"], self.max_length)
        scored = self.reward.score(prompts, self._texts(completion_ids), completion_ids, num_generations)
        start = self.accelerator.process_index * len(prompts)
        own = slice(start, start + len(prompts))
        rewards, metrics = scored.rewards[own], self._of_each_embedder(scored.embeddings, num_generations)
        if self.critic is None:
            advantages = kernel_advantages(scored.embeddings, num_generations, self.kernel)[own]
            return ScoredDiversity(rewards, scored.rewards, advantages, metrics)
        prefixes, reached = self._prefixes(completion_ids, scored.embeddings.shape[1])
        _, mask = self.policy.ids_and_mask(batch["completion_ids"], batch["completion_mask"])
        means = None
        if self.critic.hidden_states:
            means = self.accelerator.gather(hidden_means(hidden, mask.any(-1), self.steps))
        blocks, learnt = critic_advantages(
            self.critic, prefixes, reached, scored.embeddings, num_generations, self.gae_lambda, self.kernel,
            mode == "train", means,
        )  # fmt: skip
        return ScoredDiversity(rewards, scored.rewards, per_code(blocks[own], self.steps, mask), metrics | learnt)

    def _of_each_embedder(self, embeddings: torch.Tensor, num_generations: int) -> dict[str, float]:
        """`diversity/<name>` of the embedders of a mixture."""
        embedder = self.reward.embedder
        if not isinstance(embedder, EmbedderMixture):
            return {}
        found = embedder.diversities(embeddings, num_generations)
        return {f"diversity/{name}": value for name, value in found.items()}

    def _prefixes(self, completion_ids: list[list[int]], size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[`~trl_drcd.critic.embed_prefixes`] of all processes: `(B, M, D)`, and `(B, M)`."""
        problems: list[str] = []
        cause: Exception | None = None
        prefixes, reached = torch.zeros(0, 0, 0), torch.zeros(0, 0)

        draft = getattr(self.reward.codec, "draft", None)

        def embed(ids: list[list[int]]) -> torch.Tensor:
            return self.reward.embed(self._texts(ids), ids)

        try:
            prefixes, reached = embed_prefixes(
                embed if draft is None else self.reward.embed_decoded,
                completion_ids,
                self.steps,
                size,
                self.policy.num_codebooks,
                draft,
            )
        except Exception as error:  # the other processes wait for this one's embeddings
            cause = error
            problems = [f"the embedder raised {type(error).__name__} for beginnings of completions: {error}"]
        raise_together(problems, cause)
        device = self.accelerator.device
        prefixes, reached = (self.accelerator.gather(t.to(device)) for t in (prefixes, reached.long()))
        return prefixes, reached.bool()

    def _texts(self, ids: list[list[int]]) -> list[Any]:
        """Completions, or beginnings of them, as the embedder reads them where there is no codec."""
        return ids if self.reward.codec is not None else self.decode(ids)

    # ---------------------------------------------------------------- state

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The critic's, whose tensors are never changed in place; empty without a critic."""
        return {} if self.critic is None else self.critic.state_dict()

    @state.setter
    def state(self, state: dict[str, torch.Tensor]) -> None:
        if self.critic is not None and state:
            self.critic.load_state_dict(state)

    def save(self, folder: Path) -> None:
        """Writes the critic's state into a checkpoint."""
        if state := {name: tensor.contiguous() for name, tensor in self.state.items()}:
            save_file(state, folder / FILE)

    def load(self, folder: Path) -> None:
        """Reads what [`save`] wrote; a checkpoint of a run that credited sequences has none."""
        if (folder / FILE).is_file():
            self.state = load_file(folder / FILE)


def unpadded(completion_ids: torch.Tensor, completion_mask: torch.Tensor, longest: int) -> list[list[int]]:
    """Token ids without padding; completions that `mask_truncated_completions` has masked are as long as may be."""
    lengths = [length or longest for length in completion_mask.sum(1).tolist()]
    return [row[:length] for row, length in zip(completion_ids.tolist(), lengths, strict=True)]

"""The models of the tab Play: set an interpolation in place, sample, measure the cost."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from trl_drcd.app.arguments import AppArguments
from trl_drcd.audio.codecs import SpectralCodec
from trl_drcd.evaluation.checks import check_ends
from trl_drcd.evaluation.models import Models
from trl_drcd.evaluation.sampling import Completion, Prompt, sample_prompts
from trl_drcd.evaluation.strategies import Row, expand
from trl_drcd.files import local_name
from trl_drcd.policies import policy_for
from trl_drcd.validation.messages import short_repr
from trl_drcd.validation.model_folders import check_model

MAX_PROMPT, MAX_TEMPERATURE, MAX_GUIDANCE = 4000, 5.0, 20.0
POLL_S = 0.1  # how soon a waiting job sees that it was cancelled, seconds


class Cancelled(Exception):
    """Raised in a sampling call that the user has cancelled."""


@dataclass(eq=False)
class Job:
    """
    A sampling call, waiting or running: its progress, and whether to cancel it.

    Args:
        steps (`int`): Forward passes of the model so far.
        started (`bool`): Whether its turn has come.
        replaced (`bool`): Whether a later call of the same user takes its place.
    """

    steps: int = 0
    started: bool = False
    replaced: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def cancelled(self) -> bool:
        """Whether [`cancel`] was called."""
        return self._stop.is_set()

    def cancel(self) -> None:
        """Cancel it before the next forward pass, or while it waits."""
        self._stop.set()

    def check(self) -> None:
        """
        Stop here if it was cancelled.

        Raises:
            Cancelled: If the job was cancelled.
        """
        if self.cancelled:
            raise Cancelled

    def step(self) -> None:
        """
        Count a forward pass.

        Raises:
            Cancelled: If the job was cancelled.
        """
        self.check()
        self.steps += 1


class Turns:
    """One job at a time, in the order of their calls; jobs that wait can be cancelled."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def of(self, job: Job) -> Iterator[None]:
        """
        Wait until all earlier jobs have ended.

        Raises:
            Cancelled: If the job was cancelled meanwhile.
        """
        with self._changed:
            self._jobs.append(job)
        try:
            with self._changed:
                while self._jobs[0] is not job:
                    job.check()
                    self._changed.wait(POLL_S)
            job.started = True
            yield
        finally:
            with self._changed:
                self._jobs.remove(job)
                self._changed.notify_all()


@dataclass(frozen=True)
class Ask:
    """
    A request for samples.

    Args:
        prompt (`str`): The prompt; a user turn if the tokenizer has a chat template.
        weights (`tuple[float, ...]`): Weights of the ends, which sum to 1; `()` for the base.
        guidance_scale (`float`): gamma; 1 turns guidance off.
        negative_prompt (`str`, *optional*): x^- of guidance; `None` is the null prompt.
        temperature (`float`): Sampling temperature, above 0.
        seed (`int`): Random seed.
        samples (`int`): Number of samples.
    """

    prompt: str
    weights: tuple[float, ...] = ()
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    temperature: float = 0.99
    seed: int = 0
    samples: int = 4

    def check(self, most_samples: int) -> None:
        """
        Check the ranges of all values.

        Raises:
            ValueError: If a value is out of range.
        """
        if not isinstance(self.prompt, str) or not self.prompt.strip() or len(self.prompt) > MAX_PROMPT:
            raise ValueError(f"the prompt must have 1 to {MAX_PROMPT} characters, got {short_repr(self.prompt)}")
        if self.negative_prompt is not None and len(self.negative_prompt) > MAX_PROMPT:
            raise ValueError(
                f"the negative prompt must have at most {MAX_PROMPT} characters, got {len(self.negative_prompt)}"
            )
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"the temperature must be above 0 and at most {MAX_TEMPERATURE:g}, got {self.temperature}"
            )
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise ValueError(f"the guidance scale must be between 0 and {MAX_GUIDANCE:g}, got {self.guidance_scale}")
        if not 1 <= self.samples <= most_samples:
            raise ValueError(f"the number of samples must be between 1 and {most_samples}, got {self.samples}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"the seed must be between 0 and {2**32 - 1}, got {self.seed}")


@dataclass(frozen=True)
class Drawn:
    """
    Samples and their cost.

    Args:
        completions (`list`): Texts, or `(waveform, sampling_rate)` pairs.
        seconds (`float`): Sampling time without the codec, seconds.
        tokens (`int`): Length of the longest completion, steps.
        passes (`float`): Forward passes per sequence and token after the first: 1, or 2 with guidance.
    """

    completions: list[Completion]
    seconds: float
    tokens: int
    passes: float

    def cost(self) -> str:
        """The cost in words."""
        plural = "pass" if round(self.passes) == 1 else "passes"
        return (
            f"{self.passes:.2g} {plural} per token, {self.seconds:.1f} s for {len(self.completions)} samples of up to "
            f"{self.tokens} tokens"
        )


class Engine:
    """
    The models of the tab Play; sampling calls run one at a time.

    Args:
        args ([`AppArguments`]): Arguments of the app, with `model`.

    Raises:
        FileNotFoundError, ValueError: If a model does not exist, or the ends do not match the base.
    """

    def __init__(self, args: AppArguments) -> None:
        assert args.model is not None
        self.args = args
        check_model("model", args.model)
        if args.ends:
            self._rows = expand([{"name": "ends", "models": list(args.ends)}])
        self.models = Models(args.model, getattr(torch, args.dtype))
        check_ends(self.models.base, self._rows if args.ends else [], args.model)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        self.policy: Any = policy_for(self.models.base, self.tokenizer)
        own = self.policy.codec(self.models.base)
        self.codec: Any = SpectralCodec.from_pretrained(args.codec) if args.codec else own
        self._turns = Turns()
        if args.ends:
            self.models(self._rows[0])  # loaded now, so that the first request does not wait for it

    @property
    def names(self) -> list[str]:
        """Display names of the ends."""
        return list(self.args.end_names) or [local_name(end) for end in self.args.ends]

    @property
    def sounds(self) -> bool:
        """Whether completions are audio."""
        return self.codec is not None

    def sample(self, ask: Ask, job: Job) -> Drawn:
        """
        Set the weights in memory and sample; waits for a running call to end.

        Args:
            ask ([`Ask`]): The request.
            job ([`Job`]): Counts every step; cancelling it ends this call.

        Returns:
            [`Drawn`]: The completions.

        Raises:
            Cancelled: If the job was cancelled.
            ValueError: If a value of the request is out of range.
        """
        ask.check(self.args.most_samples)
        with self._turns.of(job), torch.no_grad():
            ends = tuple(self.args.ends) if ask.weights else ()
            model = self.models(Row("play", ends, tuple(ask.weights)))
            with self._counting(model, job) as rows:
                samples = sample_prompts(
                    model, self.tokenizer, [self._prompt(ask.prompt)], ask.samples, ask.guidance_scale,
                    ask.negative_prompt or None, ask.temperature, self.args.max_new_tokens, ask.samples, ask.seed,
                )  # fmt: skip
            codebooks = getattr(self.policy, "num_codebooks", 1)
            lengths = [len(ids) // codebooks for ids in samples.token_ids]
            # The first pass encodes the prompt, shared by all samples; each later one has one token of each sample
            later = sum(max(0, length - 1) for length in lengths)
            passes = sum(rows[1:]) / later if later else 1.0 + (ask.guidance_scale != 1)
            return Drawn(self._decode(samples.token_ids), samples.seconds, max(lengths), passes)

    def _prompt(self, text: str) -> Prompt:
        return [{"role": "user", "content": text}] if getattr(self.tokenizer, "chat_template", None) else text

    def _decode(self, token_ids: list[list[int]]) -> list[Completion]:
        if self.codec is not None:
            return list(self.codec.decode(token_ids))
        return list(self.tokenizer.batch_decode(token_ids, skip_special_tokens=True))

    @contextmanager
    def _counting(self, model: Any, job: Job) -> Iterator[list[int]]:
        """Record the number of sequences of every forward pass, and stop if the job is cancelled."""
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        # For MusicGen and Dia the decoder, called at each step; MusicGen's batch has a row per codebook
        part = inner.decoder if hasattr(inner, "decoder") else inner.base_model
        if part is inner.base_model and inner.config.is_encoder_decoder:
            part = part.decoder
        codebooks, rows = getattr(self.policy, "num_codebooks", 1), []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            job.step()
            ids = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            ids = args[0] if ids is None else ids
            rows.append(ids.shape[0] // (codebooks if ids.ndim == 2 else 1))

        handle = part.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield rows
        finally:
            handle.remove()

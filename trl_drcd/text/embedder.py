"""Text embedder: a sentence encoder of the library sentence-transformers."""

from __future__ import annotations

from typing import Any

import torch

from trl_drcd.compat.extras import require
from trl_drcd.validation.encoders import check_encoder


class SentenceEmbedder:
    """
    Embeds texts with a sentence encoder; any callable `list[str] -> (N, D)` can be used instead.

    A text longer than the encoder's maximum length is split into windows of that length; its embedding is the
    normalised mean of their embeddings, weighted by their numbers of tokens. Empty and white-space texts are embedded
    as a full stop, since some encoders give "" a zero vector, so all empty completions have equal embeddings. Equal
    texts get equal embeddings, independent of the rest of the list.

    Args:
        model (`str` or `SentenceTransformer`): Folder or Hub name of a sentence encoder, or the encoder.
        batch_size (`int`, *optional*, defaults to 64): Texts per batch.
        device (`str`, *optional*): Device of the encoder; chosen by sentence-transformers if `None`.

    Raises:
        FileNotFoundError: If a path does not exist, or its weights are not safetensors.
        ImportError: If sentence-transformers is not installed (extra `text`).
        ValueError: If modules.json is broken, or names code from elsewhere.
    """

    def __init__(self, model: Any, batch_size: int = 64, device: str | None = None) -> None:
        if isinstance(model, str):
            check_encoder("model", model)
            sentence_transformers = require("sentence_transformers", "text")
            model = sentence_transformers.SentenceTransformer(model, device=device, trust_remote_code=False)
        self.model = model.eval()
        self.batch_size = batch_size

    def windows(self, text: str) -> list[tuple[str, int]]:
        """Split a text into parts within the encoder's maximum length, each with its number of tokens, at least 1."""
        tokenizer, limit = self.model.tokenizer, self.model.max_seq_length
        if limit is None or limit == torch.inf:
            return [(text, 1)]
        offsets = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )["offset_mapping"]
        if not offsets:
            return [(text, 1)]
        size = limit - tokenizer.num_special_tokens_to_add()
        parts = [offsets[start : start + size] for start in range(0, len(offsets), size)]
        return [(text[part[0][0] : part[-1][1]], len(part)) for part in parts]

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """
        Embed a list of texts.

        Args:
            texts (`list[str]`): `N` texts of any length; they may be empty.

        Returns:
            `torch.Tensor`: Shape `(N, D)`, float32, on the CPU, rows of unit norm.

        Raises:
            TypeError: If an item is not a string.
        """
        if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            raise TypeError(f"`texts` must be strings, got {wrong[0]}")
        texts = [text.strip() or "." for text in texts]
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        windows = {text: self.windows(text) for text in row_of}
        owners = torch.tensor([row_of[text] for text, parts in windows.items() for _ in parts])
        weights = torch.tensor([float(tokens) for parts in windows.values() for _, tokens in parts])
        vectors = self.model.encode(
            [part for parts in windows.values() for part, _ in parts],
            batch_size=self.batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        ).float().cpu()  # fmt: skip
        sums = torch.zeros(len(row_of), vectors.shape[1]).index_add_(0, owners, vectors * weights[:, None])
        return torch.nn.functional.normalize(sums, dim=-1)[[row_of[text] for text in texts]]

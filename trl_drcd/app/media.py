"""Audio and pictures of the tab Play, kept temporarily in memory under unguessable names."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict

from trl_drcd.evaluation.listening import spectrogram_png
from trl_drcd.evaluation.report import Sample
from trl_drcd.evaluation.sampling import Completion
from trl_drcd.files import wav_bytes

KINDS = {"wav": "audio/wav", "png": "image/png"}


class Media:
    """
    The newest files that were made for users' pages.

    Args:
        most (`int`, *optional*, defaults to 512): Largest number of files; the oldest are dropped first.
    """

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes, suffix: str) -> str:
        """Add a file; return its URL relative to the page."""
        name = f"{secrets.token_urlsafe(12)}.{suffix}"
        with self._lock:
            self._files[name] = content
            while len(self._files) > self.most:
                self._files.popitem(last=False)
        return f"media/{name}"

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content and media type of a file; `None` if it does not exist (any more)."""
        with self._lock:
            content = self._files.get(name)
        return None if content is None else (content, KINDS[name.rpartition(".")[2]])

    def sample(self, completion: Completion, label: str) -> Sample:
        """A completion for a page, with its files added."""
        if isinstance(completion, str):
            return Sample(label, completion)
        waveform, rate = completion
        sound, picture = wav_bytes(waveform, rate), spectrogram_png(waveform, rate)
        return Sample(label, None, self.add(sound, "wav"), self.add(picture, "png"))

"""Sounds and pictures of the tab Play, kept in memory for a while under names that cannot be guessed."""

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
    The newest files that were made for somebody's page.

    Args:
        most (`int`, *optional*, defaults to 512): Files that are kept; the oldest go first.
    """

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes, suffix: str) -> str:
        """The address of a new file, relative to the page."""
        name = f"{secrets.token_urlsafe(12)}.{suffix}"
        with self._lock:
            self._files[name] = content
            while len(self._files) > self.most:
                self._files.popitem(last=False)
        return f"media/{name}"

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content and type of a file; `None` if it is not, or no longer, there."""
        with self._lock:
            content = self._files.get(name)
        return None if content is None else (content, KINDS[name.rpartition(".")[2]])

    def sample(self, completion: Completion, label: str) -> Sample:
        """A completion as it stands on a page."""
        if isinstance(completion, str):
            return Sample(label, completion)
        waveform, rate = completion
        sound, picture = wav_bytes(waveform, rate), spectrogram_png(waveform, rate)
        return Sample(label, None, self.add(sound, "wav"), self.add(picture, "png"))

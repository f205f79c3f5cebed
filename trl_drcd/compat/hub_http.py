"""
Errors of the HTTP library under huggingface_hub.

huggingface_hub 1 uses httpx, later versions httpx2, and neither re-exports the errors of a connection that breaks.
Both derive `HfHubHTTPError` from their `HTTPError`, of which those errors are too. Seen by
`tests/hub/test_push.py` (timeouts). It can go once huggingface_hub has a public name for them.
"""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError

HTTPError: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

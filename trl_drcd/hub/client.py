"""huggingface_hub's client with errors of one line, a time limit, and another try where the fault passes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from trl_drcd.compat.hub_http import HTTPError

TIMEOUT = 60.0
"""Seconds without a byte after which a request has failed; the client's own default is to wait for ever."""
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before another try, where the Hub does not say how long."""
PASSING = {429, 500, 502, 503, 504}
REMEDIES = {
    401: "the Hub refuses the token; log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "the token may not write there; take one with write access, or a repository of your own",
    404: "there is no such repository, or the token may not see it",
    409: "something else has changed it meanwhile; call this again",
    413: "a file is too large for the Hub",
    429: "too many requests; wait some minutes and call this again: what was uploaded is not uploaded again",
}


def hub_api(token: str | None = None) -> HfApi:
    """
    The client.

    Raises:
        PermissionError: If there is no token.
        ConnectionError: If the Hub is switched off.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or give `dry_run`")
    token = token or get_token()
    if not token:
        raise PermissionError("no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token, library_name="trl-drcd")


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    A request of the client that does not try again by itself; `Retry-After` is obeyed up to a minute.

    Raises:
        Exception: The last error, if it does not pass.
    """
    for wait in (*WAITS, None):
        try:
            return call(*args, **kwargs)
        except HTTPError as error:
            response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
            if wait is None or (response is not None and response.status_code not in PASSING):
                raise
            asked = str(response.headers.get("retry-after", "")) if response is not None else ""
            time.sleep(min(float(asked), 60.0) if asked.isdigit() else wait)
    raise AssertionError("unreachable")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """
    While it lasts, requests have a time limit, and errors of the Hub are one line that says what to do.

    Args:
        what (`str`): That is being done, such as `"push of user/model"`.

    Raises:
        PermissionError: If the Hub refuses the token.
        ConnectionError: If the Hub cannot be reached, or fails, or its limit is reached.
        OSError: If it refuses for another reason.
    """
    session = get_session()
    before, session.timeout = session.timeout, TIMEOUT
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"{what}: {REMEDIES[401]}") from error
    except (HTTPError, RuntimeError) as error:
        raise _explained(what, error) from None  # a traceback of the client could show headers
    finally:
        session.timeout = before


def _explained(what: str, error: Exception) -> OSError:
    """The error in one line, without a token; the client wraps what fails in an upload in a RuntimeError."""
    cause: BaseException = error
    while not isinstance(cause, HTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        detail = REMEDIES.get(status) or without_tokens(_said(cause))
        if status >= 500:
            detail = "the Hub fails; call this again later: what was uploaded is not uploaded again"
        kind = PermissionError if status in (401, 403) else ConnectionError if status in PASSING else OSError
        return kind(f"{what}: {detail} (HTTP {status})")
    if isinstance(cause, HTTPError):
        return ConnectionError(
            f"{what}: the Hub cannot be reached ({type(cause).__name__}); call this again: what was uploaded is not "
            "uploaded again"
        )
    return OSError(f"{what}: {without_tokens(str(error))}")


def _said(error: HfHubHTTPError) -> str:
    return str(error.server_message or error)


def without_tokens(text: str) -> str:
    """A text in one line, without what looks like a token."""
    text = re.sub(r"\bhf_[A-Za-z0-9]+|(?i:bearer)\s+\S+", "***", text)
    own = get_token()
    return " ".join((text.replace(own, "***") if own else text).split())

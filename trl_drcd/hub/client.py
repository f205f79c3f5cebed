"""huggingface_hub's client with one-line errors, a timeout, and retries of transient failures."""

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
"""Timeout of a request without any data, seconds; the client by default waits forever."""
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each retry, unless the Hub sends `Retry-After`."""
PASSING = {429, 500, 502, 503, 504}
REMEDIES = {
    401: "the Hub refuses the token; log in with `hf auth login`, or set HF_TOKEN to a token with write access",
    403: "the token has no write access; use one that has, or a repository of your own",
    404: "the repository does not exist, or the token has no access to it",
    409: "the repository was changed by someone else meanwhile; run this again",
    413: "a file is too large for the Hub",
    429: "too many requests; wait some minutes and run this again: finished uploads are not repeated",
}


def hub_api(token: str | None = None) -> HfApi:
    """
    Create the client.

    Args:
        token (`str`, *optional*): Access token; that of the login or HF_TOKEN if `None`.

    Raises:
        PermissionError: If there is no token.
        ConnectionError: If HF_HUB_OFFLINE is set.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or set `dry_run`")
    token = token or get_token()
    if not token:
        raise PermissionError("no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token, library_name="trl-drcd")


def attempt(call: Callable[..., Any], *args: object, **kwargs: object) -> Any:
    """
    Call the client and retry transient failures; for calls that do not retry by themselves.

    A `Retry-After` header is honoured up to a minute.

    Raises:
        Exception: The error, if it is not transient or the last retry fails.
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
    Set a timeout for requests, and turn errors of the Hub into one-line messages with a remedy.

    Args:
        what (`str`): Name of the operation in messages, such as `"push of user/model"`.

    Raises:
        PermissionError: If the Hub refuses the token.
        ConnectionError: If the Hub cannot be reached, fails, or limits the rate of requests.
        OSError: If it refuses for another reason.
    """
    session = get_session()
    before, session.timeout = session.timeout, TIMEOUT
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"{what}: {REMEDIES[401]}") from error
    except (HTTPError, RuntimeError) as error:
        raise _explained(what, error) from None  # the client's traceback could reveal headers
    finally:
        session.timeout = before


def _explained(what: str, error: Exception) -> OSError:
    """The error in one line, without tokens; the client wraps failures of uploads in a RuntimeError."""
    cause: BaseException = error
    while not isinstance(cause, HTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        detail = REMEDIES.get(status) or without_tokens(_said(cause))
        if status >= 500:
            detail = "the Hub has an internal error; run this again later: finished uploads are not repeated"
        kind = PermissionError if status in (401, 403) else ConnectionError if status in PASSING else OSError
        return kind(f"{what}: {detail} (HTTP {status})")
    if isinstance(cause, HTTPError):
        return ConnectionError(
            f"{what}: the Hub cannot be reached ({type(cause).__name__}); run this again: finished uploads are not "
            "repeated"
        )
    return OSError(f"{what}: {without_tokens(str(error))}")


def _said(error: HfHubHTTPError) -> str:
    return str(error.server_message or error)


def without_tokens(text: str) -> str:
    """A text in one line, with anything that looks like a token masked."""
    text = re.sub(r"\bhf_[A-Za-z0-9]+|(?i:bearer)\s+\S+", "***", text)
    own = get_token()
    return " ".join((text.replace(own, "***") if own else text).split())

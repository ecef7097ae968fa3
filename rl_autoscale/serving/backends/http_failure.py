"""What an HTTP answer means for a back end: shared by Kubernetes and Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from rl_autoscale.serving.protocols import BackendError

TRANSIENT_STATUSES = frozenset({408, 409, 410, 425, 429})
"""Answers below 500 after which the same call may succeed: the rest is a mistake that time does not heal."""


class HttpFailure(BackendError):
    """A server refused, or did not answer.

    Attributes:
        status: the HTTP status; None when there was no answer.
        retry_after_s: how long the server asked us to stay away; None when it did not say.
    """

    def __init__(self, message: str, *, status: int | None, retry_after_s: float | None = None) -> None:
        retryable = status is None or status in TRANSIENT_STATUSES or status >= 500
        super().__init__(message, retryable=retryable)
        self.status = status
        self.retry_after_s = retry_after_s


def retry_after_s(headers: Mapping[str, str] | None) -> float | None:
    """The ``Retry-After`` header in seconds; None when absent, a date (no server here sends one) or not a number."""
    for name, value in (headers or {}).items():
        if name.lower() == "retry-after":
            try:
                return max(0.0, float(value))
            except ValueError:
                return None
    return None


def date_s(header: str | None) -> float | None:
    """A ``Date`` header in seconds since 1970; None when absent or unreadable."""
    try:
        return parsedate_to_datetime(header).timestamp() if header else None
    except ValueError:
        return None

"""The one exception of this folder."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

#: What the server says where not only the object but the API is not there.
_NO_API: Final = frozenset({"404 page not found", "the server could not find the requested resource"})

#: What the server says of everybody's rights until it has read its roles: this one, each cluster has.
_STARTING: Final = '"system:discovery" not found'


class ApiServerError(Exception):
    """The API server did not do what was asked. The message says what was asked, what came back, and what to do.

    `status` is the HTTP status, 0 where there was no answer. `retry_after`: seconds that the server asks to wait.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def not_found(self) -> bool:
        """Return whether there is no such object, or no such API."""
        return self.status == HTTPStatus.NOT_FOUND

    @property
    def conflict(self) -> bool:
        """Return whether the object is there already, or has been changed since it was read."""
        return self.status == HTTPStatus.CONFLICT

    @property
    def passing(self) -> bool:
        """Return whether it may pass by itself: there was no answer, or the server is busy or failing."""
        return self.status in (0, HTTPStatus.TOO_MANY_REQUESTS) or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR

    @property
    def expired(self) -> bool:
        """Return whether the resource version is too old to watch from: list again."""
        return self.status == HTTPStatus.GONE


def refusal(request: str, status: int, message: str, manifest: str, retry_after: str = "") -> ApiServerError:
    """Return the error for an answer that is not a success. `manifest` gives sgpu its rights."""
    cure = ""  # what to do, where the server's own message does not say it
    if status == HTTPStatus.UNAUTHORIZED:
        cure = "the token of sgpu's service account is not accepted; is the account still there?"
    elif status == HTTPStatus.FORBIDDEN and _STARTING in message:
        cure = "the API server has just started, and has not read its roles yet"
    elif status == HTTPStatus.FORBIDDEN:
        cure = f"does sgpu's service account have the rights of {manifest}?"
    elif status == HTTPStatus.NOT_FOUND and message in _NO_API:
        cure = "the API server does not have this version of the API, or it is turned off"
    text = f"{request}: {status} {message}" + (f" ({cure})" if cure else "")
    return ApiServerError(text, status, float(retry_after) if retry_after.isdecimal() else 0.0)

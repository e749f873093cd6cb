"""What can go wrong between an API server or a manifest and the proxy."""

from __future__ import annotations


class ApiError(Exception):
    """A request failed. The message says which, and why.

    `status` is the HTTP status, 0 where no answer came. `retry_after` is in seconds, where the server gave it.
    """

    def __init__(self, message: str, *, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class CredentialsError(ApiError):
    """The server did not accept who we are, or we did not accept the server: fresh credentials may help."""


class SilentError(ApiError):
    """Nothing was heard for longer than the server may be silent; the connection may be half open."""


class ApiConfigError(Exception):
    """No usable way to an API server; the message says in one line what was tried."""


class ManifestError(Exception):
    """Manifests that cannot be used. `errors` names each one with file, document, object and field."""

    def __init__(self, errors: tuple[str, ...]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors

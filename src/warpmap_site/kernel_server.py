"""What the Jupyter server of ``warpmap serve`` allows.

Its token opens kernels and nothing else, and to pages of the site alone: by
itself Jupyter asks whoever holds the token for no origin.
"""

from typing import Any

from jupyter_server.auth import Authorizer, IdentityProvider


class TokenAndOrigin(IdentityProvider):
    """The token in every request, from an origin that is allowed."""

    def should_check_origin(self, handler: Any) -> bool:
        """Always: the token does not replace the origin."""
        return True

    def get_user_cookie(self, handler: Any) -> None:
        """None: a cookie does not replace the token."""

    def set_login_cookie(self, handler: Any, user: Any) -> None:
        """Set none."""


class KernelsOnly(Authorizer):
    """No files, no terminals, no shutdown: only what a cell needs."""

    def is_authorized(
        self, handler: Any, user: Any, action: str, resource: str
    ) -> bool:
        """Whether the request is for a kernel, from a page of the site."""
        return resource in ("api", "kernels") and bool(handler.check_origin())

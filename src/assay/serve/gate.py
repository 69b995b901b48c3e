"""Who may ask the app, and what its pages may do: token, cookie, host, origin, and a policy for the browser."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

LARGEST_REQUEST: Final = 16 * 2**20
"""Bytes: an uploaded image of ``upload.LARGEST``, as text."""

_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


@final
@dataclass(frozen=True, slots=True)
class Gate:
    """Lets in who once came with the token, by a cookie that scripts cannot read and other sites cannot send.

    Every request must name this machine as its host, so that no name that is rebound to it is believed. What changes
    or computes something must come from a page of this very origin: cookies do not tell ports apart.
    """

    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def cookie(self) -> str:
        """Another name for every server, since all ports of a machine share their cookies."""
        return f"assay-{hashlib.sha256(self.token.encode()).hexdigest()[:12]}"

    def stand_before(self, server: Any, scripts: Sequence[str]) -> None:
        """Guard a Flask server; ``scripts`` are the hashes of the inline scripts that its pages may run."""
        from flask import abort, redirect, request

        policy = _policy(scripts)

        def enter() -> Any:
            if not _is_ours(request):
                abort(403)
            if request.method == "GET" and _same(request.args.get("token"), self.token):
                rest = "&".join(part for part in request.query_string.decode().split("&") if part[:6] != "token=")
                answer = redirect(request.path + (f"?{rest}" if rest else ""), 303)
                answer.set_cookie(self.cookie, self.token, httponly=True, samesite="Strict", path="/")
                return answer
            if not _same(request.cookies.get(self.cookie), self.token):
                abort(403)
            return None

        def leave(answer: Any) -> Any:
            answer.headers.update(_HEADERS | {"Content-Security-Policy": policy})
            answer.headers.pop("Server", None)
            return answer

        server.config["MAX_CONTENT_LENGTH"] = LARGEST_REQUEST
        server.before_request(enter)
        server.after_request(leave)


def _policy(scripts: Sequence[str]) -> str:
    """Return the policy: everything from here, but for styles, which Dash's components write into the page."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' {' '.join(scripts)}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "font-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _is_ours(request: Any) -> bool:
    port = request.environ.get("SERVER_PORT")
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    host = request.headers.get("Host", "")
    if host not in hosts:
        return False
    if request.method in ("GET", "HEAD"):
        return True
    return bool(request.headers.get("Origin") == f"http://{host}")


def _same(given: str | None, token: str) -> bool:
    return given is not None and secrets.compare_digest(given.encode(), token.encode())

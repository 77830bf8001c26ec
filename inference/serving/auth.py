"""Who may use the server: API keys, Host and Origin headers."""

import base64
import binascii
import hmac
from collections.abc import Collection

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.errors import ApiError

MAX_HEADERS = 32 << 10  # bytes


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


class Guard:
    """ASGI middleware in front of every route.

    With a key, everything but exactly /health needs it: as a bearer token, or as the password of basic authentication,
    which is how a browser asks for it. Without one (only on loopback) the Host header must name this machine, because a
    web page whose name was made to point here would name its own. Requests that a browser sends for a page of another
    origin, without its user's knowledge, are refused as well.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: Collection[str], origins: Collection[str]):
        self.app, self.hosts, self.origins = app, hosts, origins
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            self.check(scope)
        except ApiError as e:
            await error_response(e)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raises ApiError."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            raise ApiError(f"the headers have more than {MAX_HEADERS} bytes", status=431)
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        if b"transfer-encoding" in headers and b"content-length" in headers:  # a proxy may see another body
            raise ApiError("the request has both Transfer-Encoding and Content-Length", headers={"Connection": "close"})
        host = [value.decode("latin-1").lower() for value in headers.get(b"host", [])]
        if self.key is None:
            if len(host) != 1 or without_port(host[0]) not in self.hosts:
                raise ApiError(f"the Host header does not name {' or '.join(sorted(self.hosts))}", status=403,
                              code="wrong_host")  # fmt: skip
        elif scope["raw_path"] != b"/health":
            kind, secret = credentials(headers.get(b"authorization", []))
            if not hmac.compare_digest(secret, self.key):
                path = scope["raw_path"]  # the page's files are asked for by the browser itself
                browser = path == b"/" or (path.startswith(b"/page/") and not path.endswith(b".json"))
                challenge = 'Basic realm="API key as password", charset="UTF-8"' if browser else "Bearer"
                raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key",
                              headers={"WWW-Authenticate": challenge})  # fmt: skip
            if kind == "bearer":  # no browser sends that by itself
                return
        for origin in (value.decode("latin-1").lower() for value in headers.get(b"origin", [])):
            if "*" not in self.origins and origin not in self.origins and [origin.partition("://")[2]] != host:
                raise ApiError(f"pages of {origin} are not let in (--allow-origin)", status=403, code="wrong_origin")


def without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def credentials(values: list[bytes]) -> tuple[str, bytes]:
    """(kind, secret) of an Authorization header; empty for none, several or another kind."""
    kind, _, rest = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    if kind.lower() == b"bearer":
        return "bearer", rest.strip()
    if kind.lower() == b"basic":
        try:
            return "basic", base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            pass
    return "", b""

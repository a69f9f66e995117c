"""Which requests the page's server answers: those of the page itself, from the page itself. Standard library only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
API = "/gradio_api/"
PAGES = frozenset(
    path + end
    for path in (
        *("", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
        *(f"{API}{name}" for name in ("theme.css", "startup-events", "info", "queue/join", "queue/data")),
        *(f"{API}{name}" for name in ("cancel", "reset")),
    )
    for end in ("", "/")
)
FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}heartbeat/")
"""Gradio's own files, beside `PAGES`. Not among them: files by path, uploads, the proxy, calls of the API by name."""

Message = Mapping[str, Any]


class Guard:
    """ASGI middleware that refuses requests which the page does not make.

    - A name in ``Host`` that is not the server's own: a page of another site whose name was pointed to this machine
      after it was loaded (DNS rebinding) sends its own name.
    - An ``Origin`` that is not the server's: other sites in the same browser may send, even if they cannot read.
    - Paths that the page does not need.

    Args:
        app: The application.
        hosts: Names and addresses that the server goes by; None: any, where it listens on all addresses.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: Collection[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Passes a request on, or answers it with 403 or 404."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        status = 404 if scope["type"] != "http" else self._refused(headers, scope["path"])
        if not status:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        text = b"not found" if status == 404 else b"refused: not a request of this page"
        plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": plain})
        return await send({"type": "http.response.body", "body": text})

    def _refused(self, headers: Mapping[str, str], path: str) -> int:
        """The status with which a request is refused; 0: it is not."""
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 403
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403
        inside = path.startswith(FOLDERS) and ".." not in path
        return 0 if path in PAGES or inside else 404


def bare(host: str) -> str:
    """An address without the brackets that one of IPv6 has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def hosts_of(address: str) -> frozenset[str] | None:
    """What a server that listens on an address is called in ``Host``; None: anything."""
    if address in ("0.0.0.0", "::", ""):  # noqa: S104  (compared with, not listened on)
        return None
    return LOOPBACK | {f"[{address}]" if ":" in address else address.lower()}


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a server that listens on an address."""
    return address == "localhost" or address == "::1" or address.startswith("127.")


def _name(host: str) -> str:
    """A ``Host`` header without the port."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.partition(":")[0].lower()

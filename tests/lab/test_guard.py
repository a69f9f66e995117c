"""Which requests reach the page: its own, under the server's names, for its paths."""

from __future__ import annotations

import asyncio

import pytest

from kne_easyedit.lab.guard import Guard, bare, hosts_of, is_loopback

OWN = {"host": "127.0.0.1:7860"}


def status(path: str, headers: dict[str, str], address: str = "127.0.0.1", kind: str = "http") -> int | str:
    """What is answered; 200: the request was passed on."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(app, hosts_of(address))({"type": kind, "path": path, "headers": pairs}, None, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        *[(path, 200) for path in ("/", "/config", "/theme.css", "/gradio_api/queue/join", "/gradio_api/queue/data")],
        *[(path, 200) for path in ("/assets/index.js", "/static/x.css", "/gradio_api/heartbeat/abc")],
        *[(path, 404) for path in ("/gradio_api/file=/etc/passwd", "/file=x", "/gradio_api/upload", "/nothing")],
        *[(path, 404) for path in ("/gradio_api/proxy=http://x/", "/gradio_api/run/edit", "/gradio_api/vibe-edit")],
        *[(path, 404) for path in ("/assets/../../secret", "/static/..", "/configuration", "//")],
    ],
)
def test_the_pages_own_paths_alone_are_answered(path, wanted):
    assert status(path, OWN) == wanted


@pytest.mark.parametrize(
    ("headers", "address", "wanted"),
    [
        (OWN, "127.0.0.1", 200),
        ({"host": "localhost"}, "127.0.0.1", 200),
        ({"host": "[::1]:7860"}, "127.0.0.1", 200),
        ({"host": "LOCALHOST:1"}, "127.0.0.1", 200),
        ({"host": "evil.example:7860"}, "127.0.0.1", 403),  # a name that was pointed to 127.0.0.1
        ({"host": "127.0.0.1.evil.example"}, "127.0.0.1", 403),
        ({}, "127.0.0.1", 403),
        ({"host": "192.168.1.5:7860"}, "127.0.0.1", 403),
        ({"host": "192.168.1.5:7860"}, "192.168.1.5", 200),
        ({"host": "any.example"}, "0.0.0.0", 200),
        ({**OWN, "origin": "http://127.0.0.1:7860"}, "127.0.0.1", 200),
        ({**OWN, "origin": "http://127.0.0.1:80"}, "127.0.0.1", 403),  # another server of this machine
        ({**OWN, "origin": "http://evil.example"}, "127.0.0.1", 403),
        ({**OWN, "origin": "null"}, "127.0.0.1", 403),
        ({"host": "any.example", "origin": "http://evil.example"}, "0.0.0.0", 403),
    ],
)
def test_other_names_and_other_sites_are_refused(headers, address, wanted):
    assert status("/", headers, address) == wanted


def test_it_speaks_http_alone():
    assert status("/", OWN, kind="websocket") == "websocket.close"


def test_names_of_the_server():
    assert hosts_of("127.0.0.1") == {"127.0.0.1", "localhost", "[::1]"} and hosts_of("0.0.0.0") is None
    assert "192.168.1.5" in hosts_of("192.168.1.5") and "[fe80::1]" in hosts_of("fe80::1")
    assert bare("[fe80::1]") == bare("fe80::1") == "fe80::1" and bare("localhost") == "localhost"
    assert is_loopback("127.0.0.2") and is_loopback("::1") and not is_loopback("0.0.0.0") and not is_loopback("example")

"""glibc accepts the settings where there is a glibc, and nothing happens elsewhere."""

from __future__ import annotations

import platform

from kne_easyedit.machine import keep_large_blocks


def test_takes_effect_on_glibc_only(monkeypatch):
    assert keep_large_blocks() == (platform.system() == "Linux" and platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_large_blocks() is False

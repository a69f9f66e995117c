"""Serves the page: from this machine to this machine, with nothing of Gradio's that the page does not need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kne_easyedit.lab.guard import Guard, bare, hosts_of
from kne_easyedit.lab.page import build, require_gradio
from kne_easyedit.lab.session import LabSession

STYLE = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: auto}
.gradio-container .contain {width: 100%}
#switches .wrap {flex-direction: column}
#switches label {width: 100%; overflow-wrap: anywhere}
"""


@dataclass(frozen=True)
class Server:
    """A page that is served."""

    url: str
    blocks: Any

    def close(self) -> None:
        """Stops serving it."""
        self.blocks.close(verbose=False)


def serve(session: LabSession, about: str, host: str = "127.0.0.1", port: int | None = None) -> Server:
    """Serves the page from a thread of its own.

    Args:
        session: The model and the store.
        about: One line on both, shown on top.
        host: The address to listen on; one of IPv6 with or without its brackets.
        port: The port; None: the first free one from 7860 on.

    Raises:
        ImportError: Gradio is missing.
        OSError: The port is taken, or there is no such address.
    """
    gradio = require_gradio()
    from starlette.middleware import Middleware

    blocks = build(session, about)
    address = bare(host)
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    # Everything that an environment variable could switch on is switched off here.
    _, url, _ = blocks.queue(api_open=False, max_size=32).launch(
        server_name=f"[{address}]" if ":" in address else address,  # Gradio puts it into an address of its own
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        inbrowser=False,
        inline=False,
        share=False,
        debug=False,
        show_error=False,
        allowed_paths=[],
        max_file_size=1,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        root_path="",
        app_kwargs={"middleware": [Middleware(Guard, hosts=hosts_of(address))]},
        theme=gradio.themes.Default(font=sans, font_mono=mono),  # no fonts from elsewhere
        css=STYLE,
    )
    return Server(url, blocks)

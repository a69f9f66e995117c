"""Edits as things of their own: kept in a store, put on and taken off, saved as adapters that others serve.

What reads or writes finished edits belongs here. How they are computed does not: that is `editing`.
"""

from kne_easyedit.edits.adapter_files import LoraModule, read_adapter
from kne_easyedit.edits.adapters import AdapterReport, AnswersLost, save_adapter
from kne_easyedit.edits.gguf_adapter import adapter_to_gguf

__all__ = ["AdapterReport", "AnswersLost", "LoraModule", "adapter_to_gguf", "read_adapter", "save_adapter"]

"""Many edits of one model: a store with an order and a switch for each (`store`), a sum (`stack`), an adapter.

What knows several edits, or other forms of them, belongs here. Nothing here trains, or knows EasyEdit.
"""

from kne_easyedit.edits.adapter_files import LoraModule, read_adapter
from kne_easyedit.edits.adapters import AdapterReport, AnswersLost, save_adapter
from kne_easyedit.edits.gguf_adapter import adapter_to_gguf
from kne_easyedit.edits.kept_answers import KeptAnswer
from kne_easyedit.edits.stack import EditStack
from kne_easyedit.edits.store import Checked, EditStore, Entry

__all__ = [
    "AdapterReport",
    "AnswersLost",
    "Checked",
    "EditStack",
    "EditStore",
    "Entry",
    "KeptAnswer",
    "LoraModule",
    "adapter_to_gguf",
    "read_adapter",
    "save_adapter",
]

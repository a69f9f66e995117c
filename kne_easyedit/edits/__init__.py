"""Many edits of one model: a store with an order and a switch for each (`store`), taken together (`stack`).

What knows several edits, or other forms of them, belongs here. Nothing here trains, or knows EasyEdit.
"""

from kne_easyedit.edits.stack import EditStack
from kne_easyedit.edits.store import Checked, EditStore, Entry

__all__ = ["Checked", "EditStack", "EditStore", "Entry"]

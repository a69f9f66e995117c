"""Facts: read from files of many formats (`records`), checked, and encoded as token ids and batches (`encoding`).

Data formats and tokenisation belong here. Nothing here runs a model.
"""

from kne_easyedit.facts.encoding import Batch, Fact, collate, encode, encode_request
from kne_easyedit.facts.records import load_records, load_requests

__all__ = ["Batch", "Fact", "collate", "encode", "encode_request", "load_records", "load_requests"]

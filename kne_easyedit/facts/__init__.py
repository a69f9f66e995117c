"""Facts: read from any file (`records`), checked, and turned into token ids and batches (`encoding`).

What tells a data format, or calls a tokenizer, may enter. Nothing here runs a model.
"""

from kne_easyedit.facts.encoding import Batch, Fact, collate, encode, encode_request
from kne_easyedit.facts.records import load_records, load_requests

__all__ = ["Batch", "Fact", "collate", "encode", "encode_request", "load_records", "load_requests"]

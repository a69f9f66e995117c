"""A preflight check: what a planned run needs, what it lacks, and how long it will take.

Questions about a run that can be answered before it starts belong here. Nothing here keeps a result.
"""

from kne_easyedit.doctor.examination import examine
from kne_easyedit.doctor.findings import Finding
from kne_easyedit.doctor.memory import memory_needed

__all__ = ["Finding", "examine", "memory_needed"]

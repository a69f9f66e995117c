"""Records edited with several methods through EasyEdit, every figure kept (`store`), and reports made of them.

What runs, keeps, sums up or shows a comparison belongs here. Nothing here knows how a method works.
"""

from kne_easyedit.benchmark.job import MODES, Run
from kne_easyedit.benchmark.runner import run
from kne_easyedit.benchmark.summary import summarize

__all__ = ["MODES", "Run", "run", "summarize"]

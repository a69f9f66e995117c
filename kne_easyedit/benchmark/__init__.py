"""Edit records with several methods through EasyEdit, and keep everything that was measured."""

from kne_easyedit.benchmark.job import MODES, Run
from kne_easyedit.benchmark.runner import run
from kne_easyedit.benchmark.summary import METRICS, summarize

__all__ = ["METRICS", "MODES", "Run", "run", "summarize"]

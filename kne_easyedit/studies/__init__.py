"""The paper's four studies as jobs of the benchmark, and the report of their curves, findings and claims.

What knows a study's axis, series or claim belongs here. Nothing here edits or measures: the benchmark does.
"""

from kne_easyedit.studies.definitions import STUDIES
from kne_easyedit.studies.plan import plan_for
from kne_easyedit.studies.reading import read_studies
from kne_easyedit.studies.report import publish_studies

__all__ = ["STUDIES", "plan_for", "publish_studies", "read_studies"]

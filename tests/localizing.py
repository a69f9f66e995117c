"""What the tests of localising share: a record of what is attributed, and views of ensembles and folders."""

from dataclasses import replace

from conftest import FACTS

from kne_easyedit._util.claims import FILE
from kne_easyedit.attribution.engine import attribute_facts

REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in FACTS]


class Attributed(list):
    """What `attribute_facts` was called for: ({template: layers}, facts) a call."""

    @property
    def facts(self):
        return [fact for _, facts in self for fact in facts]

    def __call__(self, model, targets, facts, *args, **kwargs):
        self.append(({target.template: target.layers for target in targets}, list(facts)))
        return attribute_facts(model, targets, facts, *args, **kwargs)


def files(folder):
    """All files below a folder, sorted, but for the one that claims are made in."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)


def chosen(ensemble):
    """An ensemble without the time that it took."""
    return replace(ensemble, seconds=None)

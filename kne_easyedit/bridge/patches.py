"""Small fixes for faults of EasyEdit. Each has a name, is applied only if its fault is present, can be switched off.

A `SourcePatch` changes statements while a module is imported, a `RuntimePatch` changes what was imported; no file is
changed. ``KNE_PATCHES_OFF=name,name`` (or ``all``) switches patches off before the import; `report` lists their states.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

OFF = "KNE_PATCHES_OFF"
APPLIED, NOT_NEEDED, SWITCHED_OFF = "applied", "not needed", "switched off"


class CountingTransformer(ast.NodeTransformer):
    """A transformer that counts its changes: without any, the fault is not present."""

    def __init__(self) -> None:
        self.changes = 0

    def replaced(self, old: ast.AST, new: ast.AST) -> ast.AST:
        """``new`` at the place of ``old``, counted."""
        self.changes += 1
        return ast.copy_location(new, old)


@dataclass
class Patch:
    """One fix. ``state`` is None until EasyEdit is imported."""

    name: str
    fault: str
    """What goes wrong without it, and where."""
    state: str | None = None


@dataclass
class SourcePatch(Patch):
    """A change of statements, made while EasyEdit's modules are compiled."""

    transformer: type[CountingTransformer] = CountingTransformer
    modules: tuple[str, ...] = ()
    """Ends of the names of the modules that have the fault; empty: any."""

    def rewrite(self, tree: ast.Module, module: str) -> ast.Module:
        """The syntax tree of a module, changed if it has the fault."""
        if not wanted(self) or (self.modules and not module.endswith(self.modules)):
            return tree
        transformer = self.transformer()
        tree = transformer.visit(tree)
        if transformer.changes:
            self.state = APPLIED
        return tree


@dataclass
class RuntimePatch(Patch):
    """A change of imported objects. ``apply(easyeditor)`` returns whether the fault was there."""

    apply: Callable[[ModuleType], bool] = field(default=lambda easyeditor: False)


_PATCHES: dict[str, Patch] = {}


def add(patch: Patch) -> None:
    """Registers a patch. Raises ValueError if its name is in use."""
    if patch.name in _PATCHES:
        raise ValueError(f"patch {patch.name!r} is there already")
    _PATCHES[patch.name] = patch


def runtime_patch(name: str, fault: str) -> Callable[[Callable[[ModuleType], bool]], Callable[[ModuleType], bool]]:
    """Decorates the function that applies a `RuntimePatch`, and registers the patch.

    Args:
        name: What ``KNE_PATCHES_OFF`` calls it.
        fault: What goes wrong without it, and where.
    """

    def decorate(apply: Callable[[ModuleType], bool]) -> Callable[[ModuleType], bool]:
        add(RuntimePatch(name, fault, apply=apply))
        return apply

    return decorate


def switched_off() -> set[str]:
    """The names in ``KNE_PATCHES_OFF``. Raises ValueError, with the nearest name, for one that is no patch."""
    names = {name.strip() for name in os.environ.get(OFF, "").split(",") if name.strip()}
    if names == {"all"}:
        return set(_PATCHES)
    for name in names:
        if name not in _PATCHES:
            near = difflib.get_close_matches(name, _PATCHES, n=1, cutoff=0.3)
            raise ValueError(
                f"{OFF}: {name!r} is no patch; "
                + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_PATCHES)}")
            )
    return names


def wanted(patch: Patch) -> bool:
    """Whether a patch is not switched off."""
    return patch.name not in switched_off()


def rewrite(tree: ast.Module, module: str) -> ast.Module:
    """The syntax tree of one of EasyEdit's modules with every source patch applied."""
    for patch in _PATCHES.values():
        if isinstance(patch, SourcePatch):
            tree = patch.rewrite(tree, module)
    return tree


def apply_all(easyeditor: ModuleType) -> None:
    """Applies the runtime patches to an imported EasyEdit, once."""
    for patch in _PATCHES.values():
        if not wanted(patch):
            patch.state = SWITCHED_OFF
        elif isinstance(patch, RuntimePatch) and patch.state is None:
            patch.state = APPLIED if patch.apply(easyeditor) else NOT_NEEDED
        elif patch.state is None:
            patch.state = NOT_NEEDED


def reset() -> None:
    """Forgets what was applied: the modules that it was applied to are gone."""
    for patch in _PATCHES.values():
        patch.state = None


def report() -> list[Patch]:
    """All patches, in the order in which they were defined, with their states."""
    return list(_PATCHES.values())


def applied() -> list[str]:
    """Names of the patches that were applied."""
    return [patch.name for patch in _PATCHES.values() if patch.state == APPLIED]

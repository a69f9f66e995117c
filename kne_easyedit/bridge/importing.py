"""Imports EasyEdit as it is on disk, with the packages that text editing needs.

EasyEdit imports all of itself at once, dozens of multimodal and API packages included, and some of its statements
fail on current libraries. Both are handled while its modules are loaded, and only there:

* an import statement *inside* EasyEdit that fails because a package is missing, or because a library has dropped
  a name, yields a `Placeholder` that raises on use; ``sys.modules`` and every other importer never see it;
* statements that cannot work are changed while they are compiled; see `kne_easyedit.bridge.source_patches`.

No file of EasyEdit is changed, and no bytecode of changed source is left behind.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from kne_easyedit._util.digest import digest
from kne_easyedit.bridge import patches, source_patches  # noqa: F401  (defines the source patches)

PACKAGE = "easyeditor"
HOME = "EASYEDIT_HOME"


class EasyEditNotFound(ImportError):
    """EasyEdit is not installed and ``EASYEDIT_HOME`` names no checkout of it."""

    def __init__(self, why: str):
        super().__init__(
            f"EasyEdit: {why}. Get it by `git clone https://github.com/zjunlp/EasyEdit` and set {HOME} to that folder, "
            f"or install its PyPI release by `pip install --no-deps easyeditor==0.0.1.dev0`"
        )


class _PlaceholderType(type):
    """The metaclass of placeholders: any attribute and subscript is a placeholder again, any use raises."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(f"{cls.__name__}.{name}", cls._why)

    def __getitem__(cls, item):
        return cls

    def __or__(cls, other):
        return cls

    __ror__ = __or__

    def __call__(cls, *args, **kwargs):
        # A subclass that EasyEdit defines on top of a placeholder cannot work either.
        raise ImportError(f"{cls.__name__} is not available: {cls._why}")


def is_placeholder(value: object) -> bool:
    """Whether it stands for something that could not be imported; ``_why`` says why."""
    return isinstance(value, _PlaceholderType)


def placeholder(name: str, why: str) -> type:
    """A class that stands for something that could not be imported."""
    return _PlaceholderType(name, (), {"_why": why})


def locate() -> Path:
    """Finds EasyEdit: in ``EASYEDIT_HOME`` if that is set, else among the installed packages.

    Returns:
        The folder that contains the package ``easyeditor``.

    Raises:
        EasyEditNotFound: There is none.
    """
    home = os.environ.get(HOME)
    if home:
        root = Path(home).expanduser().resolve()
        if not (root / PACKAGE / "__init__.py").is_file():
            raise EasyEditNotFound(f"{HOME} is {home!r}, but there is no {PACKAGE}/__init__.py in it")
        return root
    spec = PathFinder.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise EasyEditNotFound("it is not installed")
    return Path(spec.origin).parents[1]


def load() -> ModuleType:
    """Imports EasyEdit, once, and applies the patches.

    Returns:
        The package ``easyeditor``.

    Raises:
        EasyEditNotFound: There is none.
        RuntimeError: Another copy was imported before.
    """
    root = locate()
    known = sys.modules.get(PACKAGE)
    if known is not None:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            raise RuntimeError(
                f"{PACKAGE} was imported before kne_easyedit.bridge; "
                f"import the bridge first, it makes EasyEdit importable"
            )
        loaded = Path(str(known.__file__)).parents[1].resolve()
        if loaded != root.resolve():
            raise RuntimeError(
                f"EasyEdit of {loaded} is in use, {root} is wanted; start a new process to change {HOME}"
            )
        return known
    finder = _Finder(root)
    sys.meta_path.insert(0, finder)
    try:
        with _no_side_effects():
            easyeditor = importlib.import_module(PACKAGE)
            patches.apply_all(easyeditor)
            return easyeditor
    except BaseException:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
            del sys.modules[name]
        patches.reset()
        raise


def describe() -> dict[str, str]:
    """Identifies this EasyEdit.

    Returns:
        ``kind`` (``checkout`` or ``installed``), ``version`` (of a checkout its commit), and ``sources``, a digest of
        its Python files: a folder may have no commit, or changes of one's own.
    """
    root = locate()
    if os.environ.get(HOME):
        return {"kind": "checkout", "version": _commit(root), "sources": _sources(root)}
    try:
        version = distribution(PACKAGE).version
    except PackageNotFoundError:
        version = "unknown"
    return {"kind": "installed", "version": version, "sources": _sources(root)}


@lru_cache(maxsize=4)
def _sources(root: Path) -> str:
    """What a process has imported does not change any more: read once."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    return digest([[str(file.relative_to(root)), file.read_bytes().hex()] for file in files])[:16]


def _commit(root: Path) -> str:
    """The commit of a git checkout, read from its files (git may be missing); ``unknown`` for a plain folder."""
    git = root / ".git"
    try:
        if git.is_file():  # of a submodule, or of another work tree
            git = root / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref, shared = head.removeprefix("ref: "), git / "commondir"
        common = git / shared.read_text().strip() if shared.is_file() else git
        if (common / ref).is_file():
            return (common / ref).read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return "unknown"


@contextmanager
def _no_side_effects() -> Iterator[None]:
    """Restores the generators, which EasyEdit seeds when it is imported, and root logging, which it configures."""
    import numpy
    import torch

    python, numeric, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numeric)
        torch.set_rng_state(torch_state)
        root.handlers[:] = handlers
        root.setLevel(level)


class _Finder:
    """Finds ``easyeditor`` and its modules in one folder, and nothing else."""

    def __init__(self, root: Path):
        self.root = root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(name, [str(self.root)] if path is None else path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Compiled in memory: the cached bytecode of a changed source would lie in EasyEdit's own folder.
        path = self.get_filename(fullname)
        tree: ast.Module = patches.rewrite(ast.parse(self.get_data(path), path), fullname)
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        # Import statements look __import__ up in the builtins of their own module.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _lenient_import}
        super().exec_module(module)


def script_builtins() -> dict:
    """Builtins for a script that uses EasyEdit: whatever its import statements lack becomes a placeholder."""
    return {**vars(builtins), "__import__": _import_or_placeholder}


def _lenient_import(name, globals=None, locals=None, fromlist=(), level=0):
    """``__import__`` for EasyEdit's modules: what other packages lack becomes a placeholder."""
    if name.partition(".")[0] == PACKAGE:
        return builtins.__import__(name, globals, locals, fromlist, level)
    return _import_or_placeholder(name, globals, locals, fromlist, level)


def _import_or_placeholder(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.partition(".")[0]
    if level:
        return builtins.__import__(name, globals, locals, fromlist, level)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return placeholder(name if fromlist else top, str(error))
    if not fromlist:
        return sys.modules[top]
    missing = {n: why for n in fromlist if n != "*" and (why := _why_missing(module, n))}
    if not missing:
        return module
    partial = ModuleType(module.__name__)  # never enters sys.modules: only this one statement reads it
    for wanted in fromlist:
        found = placeholder(f"{name}.{wanted}", missing[wanted]) if wanted in missing else getattr(module, wanted)
        setattr(partial, wanted, found)
    return partial


def _why_missing(module: ModuleType, name: str) -> str:
    """Why ``from module import name`` fails; empty if it does not."""
    try:
        if hasattr(module, name):
            return ""
        importlib.import_module(f"{module.__name__}.{name}")
        return ""
    except ImportError as error:
        return f"{module.__name__} {getattr(module, '__version__', '')} has no {name!r} ({error})"


def is_legacy(editor: type | None = None) -> bool:
    """Whether this EasyEdit is older than May 2024: there ``keep_original_weight=False`` lets edits accumulate.

    Args:
        editor: Its class ``BaseEditor``, if it is being imported.
    """
    kind: Any = editor or load().BaseEditor
    return "keep_original_weight" in inspect.signature(kind.edit).parameters


def module(name: str) -> Any:
    """A module of EasyEdit by its name below ``easyeditor``.

    Attributes of the package do not serve: after its import ``easyeditor.util``, for one, is another module.
    """
    return importlib.import_module(f"easyeditor.{name}")

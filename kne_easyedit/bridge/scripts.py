"""Runs an example script of EasyEdit as it is on disk, with any method of EasyEdit or with KNE.

The scripts choose hyperparameter classes in chains of ``if args.editing_method == 'FT'`` that end in an exception, or
in tables. Both are extended while the script is compiled, in memory: other names are looked up in the registry of
methods. Everything else runs as written, as ``__main__``, under the seed that importing EasyEdit sets.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import difflib
import functools
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from kne_easyedit.bridge.importing import script_builtins
from kne_easyedit.bridge.methods import NAME, traits_of
from kne_easyedit.bridge.registry import edits_handed_to, load_method, register, require_method
from kne_easyedit.bridge.script_patches import skip_bad_records
from kne_easyedit.bridge.script_syntax import METHOD_OPTION, OpenedMethods, constants_in, names_in
from kne_easyedit.bridge.text_source import TextSource, current_text_source, use_text_source
from kne_easyedit.bridge.unrelated import unrelated_prompts
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.metrics import read_results, summarize_metrics, table
from kne_easyedit.models.state import preserve_rng, seed_generators

HPARAMS_OPTIONS = ("--hparams_dir", "--hparams_path")
SEED = 42
"""The seed that EasyEdit sets when it is imported; the bridge undoes that, scripts rely on it."""


class ScriptError(ValueError):
    """A script has failed; the message names its line and the exception, which is the cause."""


def run_script(
    path: str | Path,
    arguments: list[str],
    *,
    skip_bad: bool = False,
    text_source: TextSource | None = None,
    on_trained: Callable[[KNEEdit], None] | None = None,
) -> int:
    """Runs a script of EasyEdit.

    Args:
        path: The script. It must take ``--editing_method``.
        arguments: Its command line.
        skip_bad: Leaves out the records of a KnowEditDataset whose subject is not in their prompt.
        text_source: The text for second moments. If it has no prompts, it gets such as have nothing to do with the
            script's first edit.
        on_trained: Is handed each edit that the script makes with KNE, once it is written.

    Returns:
        The script's exit code.

    Raises:
        ValueError: The file is no such script, or the method or the hyperparameter file is unknown. Nothing has run.
        ScriptError: The script has raised an exception.
    """
    path = Path(path).expanduser().absolute()
    tree = _parse(path)
    changes = OpenedMethods(tree)
    tree = changes.visit(tree)
    _check(path, tree, changes, arguments)
    if skip_bad and "KnowEditDataset" not in names_in(tree):
        raise ValueError(
            f"--skip-bad: {path.name} reads its records by itself, not by a KnowEditDataset; correct its data instead"
        )
    if on_trained is not None and _option(METHOD_OPTION, arguments) != NAME:
        raise ValueError(
            f"--keep-edits: keeps edits of {NAME}; give the script {METHOD_OPTION} {NAME}, or leave it out"
        )
    easyeditor = register()
    code = compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
    left_out = skip_bad_records(easyeditor) if skip_bad else contextlib.nullcontext()
    kept = contextlib.nullcontext() if on_trained is None else edits_handed_to(on_trained)
    source = text_source or current_text_source()
    with (
        left_out,
        kept,
        _text_after_prompts(easyeditor, source),
        preserve_rng(),
        _as_main(path, arguments) as namespace,
    ):
        seed_generators(SEED)
        try:
            exec(code, namespace)  # noqa: S102  (a file of the user's choice, as python itself would)
        except SystemExit as end:
            return _exit_code(end)
        except Exception as error:  # noqa: BLE001  (a script may raise anything; it is raised again, with its line)
            _explain(path, error)
    return 0


@contextlib.contextmanager
def _text_after_prompts(easyeditor: ModuleType, source: TextSource) -> Iterator[None]:
    """Inside, ``source`` is used; if it has no prompts, it gets such as have nothing to do with the first edit."""
    original = easyeditor.BaseEditor.edit

    with contextlib.ExitStack() as stack:
        stack.enter_context(use_text_source(source))

        @functools.wraps(original)
        def edit(self, prompts, *args, **kwargs):
            if not current_text_source().prompts:
                found = unrelated_prompts([{"prompts": prompts, **kwargs}])
                stack.enter_context(use_text_source(dataclasses.replace(source, prompts=found)))
            return original(self, prompts, *args, **kwargs)

        easyeditor.BaseEditor.edit = edit
        try:
            yield
        finally:
            easyeditor.BaseEditor.edit = original


def _parse(path: Path) -> ast.Module:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        raise ValueError(f"script {path}: there is no such file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ValueError(
            f"script {path}{where}: not Python ({error.args[0]}); give one of EasyEdit's examples/run_*.py"
        ) from error


def _check(path: Path, tree: ast.Module, changes: OpenedMethods, arguments: list[str]) -> None:
    """Raises ValueError for faults that can be found before the script runs."""
    if METHOD_OPTION not in constants_in(tree):
        others = sorted(
            p.name for p in path.parent.glob("*.py") if METHOD_OPTION in p.read_text(encoding="utf-8", errors="ignore")
        )
        raise ValueError(
            f"script {path.name} takes no {METHOD_OPTION}, so no method can be put in; "
            + (f"beside it, these do: {', '.join(others)}" if others else "run it by python itself")
        )
    method = _option(METHOD_OPTION, arguments)
    # A script may have names of its own: 'ICE' and 'PROMPT' are branches there, but no methods of EasyEdit.
    if method is not None and not {method, method.lower()} & changes.known:
        require_method(method)
        if changes.known and not changes.places:
            known = ", ".join(sorted(changes.known))
            raise ValueError(
                f"script {path.name} has code of its own for each of {known}, and no place for {method}; "
                f"choose one of them"
            )
    for option in HPARAMS_OPTIONS:
        file = _option(option, arguments)
        if file is not None and not any(Path(name).is_file() for name in (file, f"{file}.yaml")):
            folder = Path(file).parent
            near = difflib.get_close_matches(Path(file).name, [p.name for p in folder.glob("*.yaml")], n=2, cutoff=0.3)
            hint = (
                f"did you mean {' or '.join(str(folder / name) for name in near)}?"
                if near
                else f"relative paths start at {Path.cwd()}"
            )
            raise ValueError(f"{option}: {file} does not exist, with or without .yaml; {hint}")


def _option(name: str, arguments: list[str]) -> str | None:
    """The value of an option, given as ``--name value`` or ``--name=value``; the last one counts, as in argparse."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
    return value


# What the changed statements call


class _Labelled:
    """Stands for the hyperparameter class of a variant (FT-M, AdaLoRA): that class with the settings of its label."""

    def __init__(self, label: str) -> None:
        self.label = label

    def from_hparams(self, path: str | Path) -> Any:
        """As the class's own."""
        path = str(path)
        return load_method(self.label, path if ".yaml" in path else f"{path}.yaml")


def hyperparameters(method: str) -> type | _Labelled:
    """The hyperparameter class of a method, as the registry has it. Raises ValueError for an unknown one."""
    kind = require_method(method)
    return _Labelled(method) if traits_of(method).alg_name != method else kind


class _Table(dict):
    """A script's table of hyperparameter classes, extended to every other method."""

    def __missing__(self, method: str) -> type | _Labelled:
        return hyperparameters(method)

    def __contains__(self, method: Any) -> bool:
        with contextlib.suppress(ValueError):
            return super().__contains__(method) or bool(hyperparameters(method))
        return False


# Where the script runs


@contextlib.contextmanager
def _as_main(path: Path, arguments: list[str]) -> Iterator[dict]:
    """The namespace of a new ``__main__``; at the end the old one is restored, as are ``sys.argv`` and ``sys.path``.

    Modules beside the script are removed: another script's ``utils`` is another module.
    """
    main = ModuleType("__main__")
    given = {"kne_hyperparameters": hyperparameters, "kne_table": _Table, "open": _open}
    main.__dict__.update(__file__=str(path), __builtins__={**script_builtins(), **given})
    before, argv, search, known = sys.modules["__main__"], sys.argv, list(sys.path), set(sys.modules)
    sys.modules["__main__"], sys.argv = main, [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    try:
        yield main.__dict__
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = before, argv, search
        for name in set(sys.modules) - known:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == path.parent:
                del sys.modules[name]


@functools.wraps(builtins.open)
def _open(file, mode="r", *args, **kwargs):
    """``open`` that makes the folder of a file to be written: some scripts write their results into a missing one."""
    if isinstance(file, (str, Path)) and set(mode) & set("wax"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    return builtins.open(file, mode, *args, **kwargs)  # noqa: PTH123  (it is the script's own call)


def _exit_code(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return end.code or 0


def _explain(path: Path, error: Exception) -> None:
    """Explains a script's exception: nothing is lost, or a ScriptError with the script's line."""
    frames = [
        (frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)
    ]
    results = _closing_evaluation([frame for frame, _ in frames])
    if results is not None:
        figures = summarize_metrics([record["metrics"] for record in read_results(results)])
        print(
            f"{path.name}: the results are complete in {results}; "
            f"only the script's own closing eval() failed ({_one_line(error)})."
        )
        print(f"The figures are:\n\n{table({results.name: figures})}")
        return
    line = frames[-1][1]
    source = linecache.getline(str(path), line).strip()
    message = (
        f"{path.name}, line {line}: {_one_line(error) if str(error).strip() else f'{type(error).__name__}: {source}'}"
    )
    if isinstance(error, AssertionError) and "pre_edit" in source:
        message += "; the file of figures before the edit (pre_file) is of other records: delete it or move it away"
    raise ScriptError(message) from error


def _closing_evaluation(frames: list[FrameType]) -> Path | None:
    """The results file, if the script's ``eval(result_path)`` has failed: all edits are done and written by then."""
    for frame in frames:
        results = frame.f_locals.get("result_path")
        if frame.f_code.co_name == "eval" and results is not None and Path(results).is_file():
            with contextlib.suppress(ValueError):
                read_results(results)
                return Path(results)
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

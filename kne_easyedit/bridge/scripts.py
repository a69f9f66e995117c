"""Run an example script of EasyEdit as it is on disk, with any method that EasyEdit (KNE included) knows.

The scripts choose hyperparameter classes in chains of ``if args.editing_method == 'FT'`` that end in an exception, or
in tables. Both are opened while the script is compiled, in memory: names that they do not know go to the one registry
of methods. Everything else runs as written, as ``__main__``, under the seed that importing EasyEdit sets.
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
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType

from kne_easyedit.bridge.importing import script_builtins
from kne_easyedit.bridge.methods import METHODS
from kne_easyedit.bridge.registry import load_method, register, require_method
from kne_easyedit.bridge.script_patches import bad_records_left_out
from kne_easyedit.bridge.text_source import TextSource, current_text_source, use_text_source
from kne_easyedit.metrics import read_results, summarize_metrics, table
from kne_easyedit.models.state import preserve_rng, seed_generators

METHOD_OPTION = "--editing_method"
HPARAMS_OPTIONS = ("--hparams_dir", "--hparams_path")
SEED = 42
"""What EasyEdit seeds all generators with when it is imported; the bridge undoes that, scripts count on it."""


class ScriptError(ValueError):
    """A script has failed; the message names its line and the exception, which is the cause."""


def run_script(
    path: str | Path, arguments: list[str], *, skip_bad: bool = False, text_source: TextSource | None = None
) -> int:
    """Runs a script of EasyEdit with the command line ``arguments``; returns its exit code.

    ``skip_bad`` leaves out the records of a KnowEditDataset whose subject does not stand in their prompt.
    ``text_source``: the text for second moments; without prompts, those of the script's first edit are used, as in `kne run`.

    Raises ValueError before anything runs if the script is none, is not one that takes ``--editing_method``, or if
    the method or the hyperparameter file does not exist; ScriptError for an exception of the script.
    """
    path = Path(path).expanduser().absolute()
    tree = _parse(path)
    changes = _Opened(tree)
    tree = changes.visit(tree)
    _check(path, tree, changes, arguments)
    if skip_bad and "KnowEditDataset" not in _names(tree):
        raise ValueError(
            f"--skip-bad: {path.name} reads its records by itself, not by a KnowEditDataset; correct its data instead"
        )
    easyeditor = register()
    code = compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
    left_out = bad_records_left_out(easyeditor) if skip_bad else contextlib.nullcontext()
    source = text_source or current_text_source()
    with left_out, _text_after_prompts(easyeditor, source), preserve_rng(), _as_main(path, arguments) as namespace:
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
    """Inside, ``source`` is used; if it has no prompts, it gets those of the first edit."""
    original = easyeditor.BaseEditor.edit

    with contextlib.ExitStack() as stack:
        stack.enter_context(use_text_source(source))

        @functools.wraps(original)
        def edit(self, prompts, *args, **kwargs):
            if not current_text_source().prompts:
                given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
                stack.enter_context(use_text_source(dataclasses.replace(source, prompts=given)))
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


def _check(path: Path, tree: ast.Module, changes: _Opened, arguments: list[str]) -> None:
    """All that can be said before the script runs."""
    if METHOD_OPTION not in _constants(tree):
        others = sorted(
            p.name for p in path.parent.glob("*.py") if METHOD_OPTION in p.read_text(encoding="utf-8", errors="ignore")
        )
        raise ValueError(
            f"script {path.name} takes no {METHOD_OPTION}, so no method can be put in; "
            + (f"beside it, these do: {', '.join(others)}" if others else "run it by python itself")
        )
    method = _option(METHOD_OPTION, arguments)
    # Names that the script knows are its own business: 'ICE' and 'PROMPT' are no methods of EasyEdit, but branches there.
    if method is not None and not {method, method.lower()} & changes.known:
        require_method(method)
        if changes.known and not changes.places:
            known = ", ".join(sorted(changes.known))
            raise ValueError(
                f"script {path.name} has code of its own for each of {known}, and no place for {method}; choose one of them"
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


# What is changed in the script's statements


class _Opened(ast.NodeTransformer):
    """Opens the places at which a script chooses hyperparameter classes, for names that it does not know.

    ``if args.editing_method == 'FT': editing_hparams = FTHyperParams elif ... else: raise`` -> ``else:
    editing_hparams = kne_hyperparameters(args.editing_method)``; a table of classes -> ``kne_table({...})``;
    ``choices`` of ``--editing_method`` are dropped.
    """

    def __init__(self, tree: ast.Module):
        nodes = list(ast.walk(tree))
        looked_up = {name for node in nodes if (name := _looked_up(node))}
        tables = {n.targets[0].id: n for n in tree.body if _is_table(n) and n.targets[0].id in looked_up}
        self.tables = [node for node in tables.values() if all(map(_is_class, node.value.values))]
        self.places = 0
        """How many places take any method, once the script has been visited."""
        comparisons = [node for node in nodes if isinstance(node, ast.Compare) and _method(node.left) is not None]
        self.known: set[str] = {text for node in comparisons for text in _constants(node)}
        self.known |= {
            text for node in tables.values() for key in node.value.keys if key is not None for text in _constants(key)
        }
        """The names that the script itself compares the method with, or has in its tables."""

    def visit_If(self, node: ast.If):
        name = _assigned(node)
        if name is None:
            return self.generic_visit(node)
        last = _chain(node)[-1]
        method = ast.parse(ast.unparse(_method(node.test)), mode="eval").body
        chosen = ast.Assign([ast.Name(name, ast.Store())], _call("kne_hyperparameters", method))
        last.orelse = [ast.copy_location(chosen, last.orelse[0])]
        self.places += 1
        return node

    def visit_Assign(self, node: ast.Assign):
        if node in self.tables:
            node.value = ast.copy_location(_call("kne_table", node.value), node.value)
            self.places += 1
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call):
        adds_argument = isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        if adds_argument and any(METHOD_OPTION in _constants(argument) for argument in node.args):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "choices"]
        return self.generic_visit(node)


def _call(function: str, argument: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), [argument], [])


def _method(node: ast.AST) -> ast.expr | None:
    """The expression for the method (``args.editing_method``) in a test or a part of one."""
    for part in ast.walk(node):
        match part:
            case ast.Attribute(attr="editing_method") | ast.Name(id="editing_method"):
                return part
    return None


def _chain(node: ast.If) -> list[ast.If]:
    """``if``, ``elif``, ...; what the last one has in ``orelse`` is the ``else``."""
    chain = [node]
    while len(chain[-1].orelse) == 1 and isinstance(chain[-1].orelse[0], ast.If):
        chain.append(chain[-1].orelse[0])
    return chain


def _assigned(node: ast.If) -> str | None:
    """The one name that all branches of a chain about the method set to a hyperparameter class, if it ends in ``else: raise``."""
    chain = _chain(node)
    names = set()
    for branch in chain:
        match branch.body:
            case [ast.Assign(targets=[ast.Name(id=name)], value=value)] if _is_class(value) and _compares_method(
                branch.test
            ):
                names.add(name)
            case _:
                return None
    final = chain[-1].orelse
    return names.pop() if len(names) == 1 and final and isinstance(final[-1], ast.Raise) else None


def _compares_method(test: ast.expr) -> bool:
    match test:
        case ast.BoolOp(op=ast.Or(), values=values):
            return all(map(_compares_method, values))
        case ast.Compare(left=left, ops=[ast.Eq() | ast.In()], comparators=[other]):
            return _method(left) is not None and bool(_constants(other))
    return False


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node).lower().endswith(
        ("hyperparams", "hparams")
    )


def _is_table(node: ast.stmt) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name()], value=ast.Dict(keys=[_, *_])):
            return True
    return False


def _looked_up(node: ast.AST) -> str | None:
    """The name of a table in ``TABLE[args.editing_method]`` or ``args.editing_method in TABLE``."""
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=key) if _method(key) is not None:
            return name
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn()], comparators=[ast.Name(id=name)]) if (
            _method(left) is not None
        ):
            return name
    return None


def _constants(node: ast.AST) -> set[str]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


# What the changed statements call


class _Labelled:
    """Stands for a hyperparameter class where the method is a label of `METHODS`: that class with the label's settings."""

    def __init__(self, label: str):
        self.label = label

    def from_hparams(self, path: str | Path):
        path = str(path)
        return load_method(self.label, path if ".yaml" in path else f"{path}.yaml")


def hyperparameters(method: str) -> type | _Labelled:
    """The hyperparameter class of a method, as the registry has it. Raises ValueError for an unknown one."""
    kind = require_method(method)
    return _Labelled(method) if method in METHODS and METHODS[method].alg_name != method else kind


class _Table(dict):
    """A script's table of hyperparameter classes that knows every other method, too."""

    def __missing__(self, method: str):
        return hyperparameters(method)

    def __contains__(self, method) -> bool:
        with contextlib.suppress(ValueError):
            return super().__contains__(method) or bool(hyperparameters(method))
        return False


# Where the script runs


@contextlib.contextmanager
def _as_main(path: Path, arguments: list[str]) -> Iterator[dict]:
    """The namespace of a fresh ``__main__``; afterwards the old one is back, and so are ``sys.argv`` and ``sys.path``.

    Modules that lie beside the script are forgotten: another script's ``utils`` is another module.
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
    """``open`` that makes the folder of a file to be written: some scripts write their results into one that is not there."""
    if isinstance(file, (str, Path)) and set(mode) & set("wax"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    return open(file, mode, *args, **kwargs)


def _exit_code(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return end.code or 0


def _explain(path: Path, error: Exception) -> None:
    """Says what a script's exception means: nothing lost, or a ScriptError with the script's line."""
    frames = [
        (frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)
    ]
    results = _closing_evaluation([frame for frame, _ in frames])
    if results is not None:
        figures = summarize_metrics([record["metrics"] for record in read_results(results)])
        print(
            f"{path.name}: the results are complete in {results}; only the script's own closing eval() failed ({_one_line(error)})."
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
    """The results file, if it is the script's ``eval(result_path)`` that failed: all edits are done and written by then."""
    for frame in frames:
        results = frame.f_locals.get("result_path")
        if frame.f_code.co_name == "eval" and results is not None and Path(results).is_file():
            with contextlib.suppress(ValueError):
                read_results(results)
                return Path(results)
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

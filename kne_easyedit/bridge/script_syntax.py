"""The changes of an example script's statements by which it takes any method."""

from __future__ import annotations

import ast

METHOD_OPTION = "--editing_method"


class OpenedMethods(ast.NodeTransformer):
    """Extends the places at which a script chooses hyperparameter classes to names that it does not know.

    ``if args.editing_method == 'FT': editing_hparams = FTHyperParams elif ... else: raise`` -> ``else:
    editing_hparams = kne_hyperparameters(args.editing_method)``; a table of classes -> ``kne_table({...})``;
    ``choices`` of ``--editing_method`` are dropped.
    """

    def __init__(self, tree: ast.Module) -> None:
        nodes = list(ast.walk(tree))
        looked_up = {name for node in nodes if (name := _looked_up(node))}
        tables = {t[0]: t[1:] for node in tree.body if (t := _table(node)) and t[0] in looked_up}
        self.tables = [node for node, table in tables.values() if all(map(_is_class, table.values))]
        self.places = 0
        """How many places take any method, once the script has been visited."""
        comparisons = [node for node in nodes if isinstance(node, ast.Compare) and _method(node.left) is not None]
        self.known: set[str] = {text for node in comparisons for text in constants_in(node)}
        self.known |= {
            text for _, table in tables.values() for key in table.keys if key is not None for text in constants_in(key)
        }
        """The names that the script itself compares the method with, or has in its tables."""

    def visit_If(self, node: ast.If) -> ast.AST:
        """A chain about the method gets a last branch for every other method."""
        name, method = _assigned(node), _method(node.test)
        if name is None or method is None:
            return self.generic_visit(node)
        last = _chain(node)[-1]
        method = ast.parse(ast.unparse(method), mode="eval").body
        chosen = ast.Assign([ast.Name(name, ast.Store())], _call("kne_hyperparameters", method))
        last.orelse = [ast.copy_location(chosen, last.orelse[0])]
        self.places += 1
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """A table of classes gets entries for every other method."""
        if node in self.tables:
            node.value = ast.copy_location(_call("kne_table", node.value), node.value)
            self.places += 1
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The option's ``choices`` are dropped."""
        adds_argument = isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        if adds_argument and any(METHOD_OPTION in constants_in(argument) for argument in node.args):
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
    """The name that all branches of a chain set to a hyperparameter class, if the chain ends in ``else: raise``."""
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
            return _method(left) is not None and bool(constants_in(other))
    return False


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node).lower().endswith(
        ("hyperparams", "hparams")
    )


def _table(node: ast.stmt) -> tuple[str, ast.stmt, ast.Dict] | None:
    """``NAME = {key: ..., ...}``: the name, the statement and the dictionary."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=[_, *_]) as table):
            return name, node, table
    return None


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


def constants_in(node: ast.AST) -> set[str]:
    """All string constants below a node."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def names_in(tree: ast.AST) -> set[str]:
    """All names that are used below a node."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

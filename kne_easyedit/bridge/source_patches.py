"""Patches of EasyEdit's statements, made while its modules are compiled."""

from __future__ import annotations

import ast

from kne_easyedit.bridge.patches import SourcePatch, add


class _Counting(ast.NodeTransformer):
    def __init__(self) -> None:
        self.changes = 0

    def replaced(self, old: ast.AST, new: ast.AST) -> ast.AST:
        self.changes += 1
        return ast.copy_location(new, old)


def _call(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), list(arguments), [])


class _DeviceNames(_Counting):
    """``f"cuda:{x}"`` -> ``(f"cuda:{x}" if str(x).isdigit() else str(x))``."""

    def visit_JoinedStr(self, node: ast.JoinedStr):
        match node.values:
            case [ast.Constant(value="cuda:"), ast.FormattedValue(value=device, format_spec=None)]:
                name = _call("str", device)
                is_number = ast.Call(ast.Attribute(name, "isdigit", ast.Load()), [], [])
                return self.replaced(node, ast.IfExp(is_number, node, name))
        return self.generic_visit(node)


class _AdapterDeletion(_Counting):
    """``del model.peft_config`` -> ``if hasattr(model, "peft_config"): del model.peft_config``."""

    def visit_If(self, node: ast.If):
        return node if "peft_config" in ast.dump(node.test) else self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete):
        match node.targets:
            case [ast.Attribute(value=owner, attr="peft_config")]:
                owner = ast.parse(ast.unparse(owner), mode="eval").body
                return self.replaced(node, ast.If(_call("hasattr", owner, ast.Constant("peft_config")), [node], []))
        return node


class _AdapterPrinting(_Counting):
    """``model.print_trainable_parameters()`` only if there is such a method."""

    def visit_If(self, node: ast.If):
        return node if "print_trainable_parameters" in ast.dump(node.test) else self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr):
        match node.value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="print_trainable_parameters")):
                test = _call("hasattr", ast.Name(owner, ast.Load()), ast.Constant("print_trainable_parameters"))
                return self.replaced(node, ast.If(test, [node], []))
        return node


class _BatchMetrics(_Counting):
    """In ``batch_edit``: what a chunk's ``all_metrics`` holds is kept, and the metrics of all chunks are returned."""

    def visit_FunctionDef(self, node: ast.FunctionDef):
        if node.name != "batch_edit":
            return self.generic_visit(node)
        loops = [n for n in node.body if isinstance(n, ast.For) and any(_is_reset(statement) for statement in n.body)]
        for loop in loops:
            loop.body.append(ast.parse("_kne_all_metrics.extend(all_metrics)").body[0])
            node.body.insert(node.body.index(loop), ast.parse("_kne_all_metrics = []").body[0])
            for returned in (n for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None):
                _Rename().visit(returned)
            self.changes += 1
        return node


class _GenerationMask(_Counting):
    """In ``generate_fast``: the mask of all tokens so far, ``attention_mask[:, :c.stop]`` instead of ``attention_mask[:, c]``."""

    def visit_Subscript(self, node: ast.Subscript):
        match node:
            case ast.Subscript(
                value=ast.Name(id="attention_mask"),
                slice=ast.Tuple(elts=[ast.Slice(lower=None, upper=None) as rows, ast.Name(id=chunk)]),
            ):
                stop = ast.Attribute(ast.Name(chunk, ast.Load()), "stop", ast.Load())
                columns = ast.Tuple([rows, ast.Slice(None, stop, None)], ast.Load())
                return self.replaced(node, ast.Subscript(node.value, columns, ast.Load()))
        return self.generic_visit(node)


class _LastToken(_Counting):
    """In FT: ``mask.sum(dim=1) - 1`` -> ``mask.cumsum(dim=1).argmax(dim=1)``, the last token on whichever side the padding is."""

    def visit_BinOp(self, node: ast.BinOp):
        match node:
            case ast.BinOp(
                left=ast.Call(
                    func=ast.Attribute(
                        value=ast.Subscript(slice=ast.Constant(value="attention_mask")) as mask, attr="sum"
                    )
                ),
                op=ast.Sub(),
                right=ast.Constant(value=1),
            ):
                return self.replaced(
                    node, ast.parse(f"{ast.unparse(mask)}.cumsum(dim=1).argmax(dim=1)", mode="eval").body
                )
        return self.generic_visit(node)


class _Separator(_Counting):
    """In functions that know ``hparams``: ``prompt + ' ' + target`` -> ``prompt + getattr(hparams, 'separator', ' ') + target``."""

    def visit_FunctionDef(self, node: ast.FunctionDef):
        return self.generic_visit(node) if any(argument.arg == "hparams" for argument in node.args.args) else node

    def visit_BinOp(self, node: ast.BinOp):
        match node:
            case ast.BinOp(
                left=ast.BinOp(left=prompt, op=ast.Add(), right=ast.Constant(value=" ")), op=ast.Add(), right=target
            ):
                separator = _call(
                    "getattr", ast.Name("hparams", ast.Load()), ast.Constant("separator"), ast.Constant(" ")
                )
                return self.replaced(node, ast.BinOp(ast.BinOp(prompt, ast.Add(), separator), ast.Add(), target))
        return self.generic_visit(node)


def _is_reset(node: ast.AST) -> bool:
    match node:
        case ast.Assign(targets=[ast.Name(id="all_metrics")], value=ast.List(elts=[])):
            return True
    return False


class _Rename(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name):
        return ast.copy_location(ast.Name("_kne_all_metrics", node.ctx), node) if node.id == "all_metrics" else node


for patch in (
    SourcePatch(
        "device-names",
        "devices are written as cuda:N, so that nothing runs on a CPU (before 2026)",
        transformer=_DeviceNames,
    ),
    SourcePatch(
        "adapter-removal",
        "LoRA: after each edit peft_config is deleted, which current PEFT has done already: AttributeError (before 2026)",
        transformer=_AdapterDeletion,
        modules=("editors.editor",),
    ),
    SourcePatch(
        "adapter-printing",
        "LoRA: the second of a sequence of edits calls print_trainable_parameters on a plain model: AttributeError (2024)",
        transformer=_AdapterPrinting,
        modules=("lora.lora_main",),
    ),
    SourcePatch(
        "batch-metrics",
        "batch_edit returns the metrics of the last chunk only (2023, 2024)",
        transformer=_BatchMetrics,
        modules=("editors.editor",),
    ),
    SourcePatch(
        "generation-mask",
        "generate_fast masks the text so far, so that fluency and context templates are garbage for models not named llama (since 2025)",
        transformer=_GenerationMask,
        modules=("util.generate",),
    ),
    SourcePatch(
        "ft-last-token",
        "FT with prompt_last trains shorter prompts of a batch at a wrong position, for it counts from the left under left padding",
        transformer=_LastToken,
        modules=("ft.ft_main",),
    ),
    SourcePatch(
        "evaluation-separator",
        "evaluators join prompt and answer by a blank, whatever the separator of KNE's settings is",
        transformer=_Separator,
        modules=("evaluate.evaluate_utils",),
    ),
):
    add(patch)

"""Patches of EasyEdit's statements, made while its modules are compiled."""

from __future__ import annotations

import ast

from kne_easyedit.bridge.patches import CountingTransformer, SourcePatch, add


def _call(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), list(arguments), [])


class _DeviceNames(CountingTransformer):
    """``f"cuda:{x}"`` -> ``(f"cuda:{x}" if str(x).isdigit() else str(x))``."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        match node.values:
            case [ast.Constant(value="cuda:"), ast.FormattedValue(value=device, format_spec=None)]:
                name = _call("str", device)
                is_number = ast.Call(ast.Attribute(name, "isdigit", ast.Load()), [], [])
                return self.replaced(node, ast.IfExp(is_number, node, name))
        return self.generic_visit(node)


class _AdapterDeletion(CountingTransformer):
    """``del model.peft_config`` -> ``if hasattr(model, "peft_config"): del model.peft_config``."""

    def visit_If(self, node: ast.If) -> ast.AST:
        return node if "peft_config" in ast.dump(node.test) else self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> ast.AST:
        match node.targets:
            case [ast.Attribute(value=owner, attr="peft_config")]:
                owner = ast.parse(ast.unparse(owner), mode="eval").body
                return self.replaced(node, ast.If(_call("hasattr", owner, ast.Constant("peft_config")), [node], []))
        return node


class _AdapterPrinting(CountingTransformer):
    """``model.print_trainable_parameters()`` only if there is such a method."""

    def visit_If(self, node: ast.If) -> ast.AST:
        return node if "print_trainable_parameters" in ast.dump(node.test) else self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="print_trainable_parameters")):
                test = _call("hasattr", ast.Name(owner, ast.Load()), ast.Constant("print_trainable_parameters"))
                return self.replaced(node, ast.If(test, [node], []))
        return node


class _BatchMetrics(CountingTransformer):
    """In ``batch_edit``: what a chunk's ``all_metrics`` holds is kept, and the metrics of all chunks are returned."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
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


class _GenerationMask(CountingTransformer):
    """In ``generate_fast``: ``attention_mask[:, c]`` -> ``attention_mask[:, :c.stop]``: all tokens so far."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(
                value=ast.Name(id="attention_mask"),
                slice=ast.Tuple(elts=[ast.Slice(lower=None, upper=None) as rows, ast.Name(id=chunk)]),
            ):
                stop = ast.Attribute(ast.Name(chunk, ast.Load()), "stop", ast.Load())
                columns = ast.Tuple([rows, ast.Slice(None, stop, None)], ast.Load())
                return self.replaced(node, ast.Subscript(node.value, columns, ast.Load()))
        return self.generic_visit(node)


class _LastToken(CountingTransformer):
    """In FT: ``mask.sum(dim=1) - 1`` -> ``mask.cumsum(dim=1).argmax(dim=1)``: right for both padding sides."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
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


class _Separator(CountingTransformer):
    """In functions with ``hparams``: ``prompt + " " + target`` -> the separator of ``hparams`` if it has one."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self.generic_visit(node) if any(argument.arg == "hparams" for argument in node.args.args) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
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
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Name("_kne_all_metrics", node.ctx), node) if node.id == "all_metrics" else node


for patch in (
    SourcePatch(
        "device-names",
        "devices are written as cuda:N, so that nothing runs on a CPU (before 2026)",
        transformer=_DeviceNames,
    ),
    SourcePatch(
        "adapter-removal",
        "LoRA: after each edit peft_config is deleted, which current PEFT has done already: AttributeError "
        "(before 2026)",
        transformer=_AdapterDeletion,
        modules=("editors.editor",),
    ),
    SourcePatch(
        "adapter-printing",
        "LoRA: the second of a sequence of edits calls print_trainable_parameters on a plain model: AttributeError "
        "(2024)",
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
        "generate_fast masks the text so far, so that fluency and context templates are garbage for models not named "
        "llama (since 2025)",
        transformer=_GenerationMask,
        modules=("util.generate",),
    ),
    SourcePatch(
        "ft-last-token",
        "FT with prompt_last trains shorter prompts of a batch at a wrong position, for it counts from the left under "
        "left padding",
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

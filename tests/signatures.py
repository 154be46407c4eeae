"""Writes layerrl/trainer/ready.pyi, in which editors find the arguments of the masked trainers.

`make signatures` does, with the newest TRL. No annotation adds keywords to another function's
arguments, so that they have to be spelled out.
"""

import ast
import inspect
import sys
from textwrap import dedent
from typing import Any

from layerrl import LayerMaskedMixin
from layerrl.trainer import ready
from layerrl.trainer.arguments import behind

# TRL's alias accepts no function that is annotated to return list[float], and none that is async.
WIDER = {"RewardFunc": "str | PreTrainedModel | Callable[..., Any]"}
HEAD = '"""The arguments of TRL\'s trainers and of the mixin, written by `make signatures`."""'


def masked_trainers() -> list[type]:
    """The classes of the module, in its order."""
    found = [value for value in vars(ready).values() if inspect.isclass(value)]
    return [cls for cls in found if cls.__module__ == ready.__name__]


class _Plain(ast.NodeTransformer):
    """Annotations without quotes, which a stub does not need, that accept what TRL does."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(WIDER.get(node.id, node.id), mode="eval").body

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        is_literal = isinstance(node.value, ast.Name) and node.value.id == "Literal"
        return node if is_literal else self.generic_visit(node)  # pyright: ignore[reportReturnType]


def _arguments(cls: type) -> ast.arguments:
    """The arguments of a class's constructor, as its source has them."""
    function: Any = ast.parse(dedent(inspect.getsource(cls.__init__))).body[0]
    for argument in (*function.args.args, *function.args.kwonlyargs):
        if argument.annotation is not None:
            argument.annotation = _Plain().visit(argument.annotation)
    return function.args


def _names(arguments: ast.arguments) -> set[str]:
    return {node.id for node in ast.walk(arguments) if isinstance(node, ast.Name)}


def origins_of(module: Any, names: set[str]) -> dict[str, str]:
    """The modules that names of a module are to be imported from."""
    package = module.__name__.split(".")
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            above = ".".join(package[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            found |= {alias.name: origin for alias in node.names}
        elif isinstance(node, ast.Import):  # import torch.nn as nn
            whole = {alias.asname: alias.name.rpartition(".") for alias in node.names}
            found |= {name: origin for name, (origin, _, last) in whole.items() if name == last}
        elif isinstance(node, ast.Assign):
            defined = (target.id for target in node.targets if isinstance(target, ast.Name))
            found |= dict.fromkeys(defined, module.__name__)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = module.__name__
    return {name: found[name] for name in names & {*found}}


def stub() -> str:
    """The text of the stub, not yet formatted."""
    own = _arguments(LayerMaskedMixin)
    origins = {LayerMaskedMixin.__name__: LayerMaskedMixin.__module__}
    origins |= origins_of(sys.modules[LayerMaskedMixin.__module__], _names(own))
    classes = []
    for cls in masked_trainers():
        plain = behind(cls, LayerMaskedMixin)[0]
        taken, module = _arguments(plain), sys.modules[plain.__module__]
        origins = origins_of(module, _names(taken)) | origins | {plain.__name__: plain.__module__}
        taken.kwonlyargs += own.kwonlyargs
        taken.kw_defaults += own.kw_defaults
        parameters = ast.unparse(taken)
        classes.append(
            f"class {cls.__name__}({LayerMaskedMixin.__name__}, {plain.__name__}):\n"
            f"    def __init__({parameters}) -> None: ..."
        )
    imports = [f"from {origin} import {name}" for name, origin in origins.items()]
    return "\n".join([HEAD, "import torch", *sorted(imports), *classes]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(stub())

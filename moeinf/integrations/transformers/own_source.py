"""Forwards of the model with some of their statements replaced: all others stay the model's own.

A forward is served only where the replaced statements are, word by word, some that are known here.
So another version of the library, or a class that computes something else, keeps its own.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from moeinf.integrations.transformers.whole import class_of

Function = Callable[..., Any]
DECORATORS = ("deprecate_kwarg",)  # that may stand before such a forward; they stay
WRAPPERS = ("forward_with_checkpointing",)  # of classes; without gradients they do nothing


class OwnForward:
    """The forward of a class, as statements and their texts.

    Raises:
        ValueError: it has no source, or another form than a plain function.
    """

    def __init__(self, base: type):
        function: Any = base.forward  # type: ignore[attr-defined]
        wrappers = 0
        while hasattr(function, "__wrapped__"):
            wrappers += function.__code__.co_name not in WRAPPERS
            function = function.__wrapped__
        try:
            source, self.line = inspect.getsourcelines(function)
            (tree,) = ast.parse(textwrap.dedent("".join(source))).body
        except (OSError, TypeError, SyntaxError) as error:
            raise ValueError(f"{base.__name__}: {error}") from error
        if not isinstance(tree, ast.FunctionDef) or function.__closure__:
            raise ValueError(f"{base.__name__}: its forward is no plain function")
        decorators = tree.decorator_list
        known = all(_name_of(one) in DECORATORS for one in decorators)
        if len(decorators) != wrappers or not known:
            raise ValueError(f"{base.__name__}: its forward is wrapped")
        self.tree = tree
        self.globals = function.__globals__
        self.file = function.__code__.co_filename
        body = tree.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]  # its description
        self.body = body
        self.texts = [ast.unparse(statement) for statement in body]
        self.parameters = [one.arg for one in tree.args.args]

    def find(self, statements: Sequence[str]) -> int:
        """Where they stand one after another; -1: nowhere, or more than once."""
        count = len(statements)
        places = [
            at
            for at in range(len(self.texts) - count + 1)
            if self.texts[at : at + count] == list(statements)
        ]
        return places[0] if len(places) == 1 else -1

    def with_body(self, body: Sequence[ast.stmt | str], first: str = "") -> Function:
        """The forward with that body, in the module of the model; `first` is a parameter more,
        right after `self`."""
        arguments = copy.deepcopy(self.tree.args)
        for one in ast.walk(arguments):
            if isinstance(one, ast.arg):
                one.annotation = None
        if first:
            arguments.args.insert(1, ast.arg(first))
        tree = copy.copy(self.tree)
        tree.args, tree.returns = arguments, None
        tree.body = [ast.parse(one).body[0] if isinstance(one, str) else one for one in body]
        module = ast.fix_missing_locations(copy.deepcopy(ast.Module([tree], [])))
        ast.increment_lineno(module, self.line - 1)
        made: dict[str, Function] = {}
        exec(compile(module, self.file, "exec"), self.globals, made)
        return made[tree.name]


def served_class(first: type, base: Any, rest: Function) -> type:
    """A class of the name of `base`, with `first` before it; `rest` is made of the forward."""
    made: Any = class_of(first, base)
    made.moeinf_rest, made.moeinf_base, made.moeinf_own = rest, base, base.forward
    return made  # type: ignore[no-any-return]


def is_own(module: Any) -> bool:
    """Is the forward of the model's class still the one of which the rest was made?"""
    own: bool = module.moeinf_base.forward is type(module).moeinf_own
    return own


def _name_of(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.id if isinstance(called, ast.Name) else ""

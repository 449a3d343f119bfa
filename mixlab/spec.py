"""Objects from text: `"randaugment(magnitude=9) | one_of(mixup(alpha=0.8), cutmix())"`.

Configs and command lines name ops the way code does. The text is parsed with Python's `ast`;
only calls of names from a given vocabulary, literals, tuples, lists, dicts and `|` are accepted,
so nothing else can run.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def nearest(given: str, known: Any) -> str:
    """A phrase that lists the `known` names and points at the one nearest to `given`."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def slug(value: Any) -> str:
    """The letters, numbers, points and underscores of a value's text, for the name of a file."""
    kept = (c if c.isalnum() or c in "._" else " " for c in str(value))
    return "_".join("".join(kept).split())


def parse(
    text: str,
    vocabulary: Mapping[str, Callable[..., Any]],
    combine: Callable[..., Any] | None = None,
    *,
    what: str = "call",
) -> Any:
    """Builds the object that `text` describes.

    Args:
        text: `name`, `name(args, key=value)`, and, where `combine` is given, `a | b | c`. A bare
            name is a call without arguments. Arguments are literals or nested calls.
        vocabulary: the names that may be called.
        combine: called with the parts of an `a | b | c`.
        what: what the text should describe, for the error where it is a literal.

    Returns:
        What the called function returns.

    Raises:
        ValueError: the text does not parse, uses something other than the above, or names
            something unknown; the message shows the text and lists what is known.
        TypeError: a function was given an argument that it does not take.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot parse {text!r}: {error.msg} at column {error.offset}") from error

    def lookup(name: str) -> Callable[..., Any]:
        if name not in vocabulary:
            raise ValueError(f"unknown name {name!r} in {text!r}; {nearest(name, vocabulary)}")
        return vocabulary[name]

    def call(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        fn = lookup(name)
        try:
            inspect.signature(fn).bind(*args, **kwargs)
        except TypeError as error:
            parameters = inspect.signature(fn).parameters.values()
            accepted = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
            raise TypeError(f"{name} in {text!r}: {error}; it takes ({accepted})") from error
        return fn(*args, **kwargs)

    def build(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(op=ast.BitOr()) if combine is not None:
                return combine(*parts(node))
            case ast.Call(func=ast.Name(id=name)):
                if any(k.arg is None for k in node.keywords):
                    raise ValueError(f"** is not accepted in {text!r}")
                kwargs = {str(k.arg): build(k.value) for k in node.keywords}
                return call(name, [build(arg) for arg in node.args], kwargs)
            case ast.Name(id=name):
                return call(name, [], {})
            case ast.Tuple(elts=elts):
                return tuple(build(e) for e in elts)
            case ast.List(elts=elts):
                return [build(e) for e in elts]
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {build(k): build(v) for k, v in zip(keys, values, strict=True) if k}
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{ast.unparse(node)!r} in {text!r} is neither a literal nor a call of a known "
                f"name; {nearest(ast.unparse(node), vocabulary)}"
            ) from error

    def parts(node: ast.expr) -> list[Any]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return [*parts(node.left), *parts(node.right)]
        return [build(node)]

    if isinstance(tree, ast.Constant):
        raise ValueError(f"{text!r} is a literal, no {what}; {nearest(text, vocabulary)}")
    return build(tree)

"""Settings that change from one iteration to the next: `0.7 + 0.1*iter`, read and worked out here.

A string from a config file is parsed with Python's `ast` and walked by hand; nothing of it is ever
run. It may hold numbers, + - * / // % **, a minus sign, parentheses, min(…), max(…) and the one
name `iter`. Length, every value and every exponent are bounded, so that no text can cost more than
microseconds; anything else is one UserError that names the key. As in ms-swift's RFT.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

from rftt.types import UserError

Number = int | float

MAX_LENGTH, MAX_VALUE, MAX_EXPONENT = 100, 1e15, 64
"""Characters of an expression; size of every value on the way; exponent of **."""
BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
CALLS: dict[str, Callable[[list[Number]], Number]] = {"min": min, "max": max}


def value_at(key: str, text: str, iteration: int) -> Number:
    """The value of the expression `text`, set for `key`, when `iter` is `iteration`."""
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it is longer than {MAX_LENGTH} characters")
        return _value(ast.parse(text.strip(), mode="eval").body, iteration)
    except SyntaxError:
        reason = "it does not parse"
    except (ValueError, ArithmeticError) as error:
        reason = str(error)
    raise UserError(
        f"{key}: {text!r} is no number or expression of iter ({reason}); write numbers, "
        "+ - * / // % **, min(…), max(…) and iter, as in min(0.7 + 0.1*iter, 0.9)."
    )


def _value(node: ast.expr, iteration: int) -> Number:
    """Raises ValueError or ArithmeticError with the reason."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result = value
        case ast.Name(id="iter"):
            result = iteration
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_value(operand, iteration)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            a, b = _value(left, iteration), _value(right, iteration)
            if isinstance(op, ast.Pow) and not (abs(b) <= MAX_EXPONENT and (a > 0 or b == int(b))):
                raise ValueError(f"{a} ** {b} is out of bounds")
            result = BINARY[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in CALLS:
            result = CALLS[name]([_value(arg, iteration) for arg in args])
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is not allowed")
    if not (math.isfinite(result) and abs(result) <= MAX_VALUE):
        raise ValueError(f"{ast.unparse(node)!r} is too large")
    return result

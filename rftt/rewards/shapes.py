"""What kind of thing an answer is: a number, ordered, unordered, a name for something, a relation.

For rewards/grader.py. `x > 2` and (2, ∞), `x = 5` and 5, matrices and tuples, unions, lists and ±
come out alike, so that `equal` is one short recursion.
"""

from __future__ import annotations

import ast
import math
import re
import zlib
from fractions import Fraction
from typing import Any

from rftt.rewards.latex import Refused, TooBig
from rftt.rewards.values import POINTS, Undefined, Work, context, parts, show, value_of

MAX_ITEMS = 60
Shape = tuple[Any, ...]
"""("number", values) | ("ordered", brackets, *shapes) | ("unordered", *shapes) | ("base", value)
| ("named", name, shape, zero): `x = 5`, `x > 2` | ("zero", sign, values): another relation to 0."""

_INFINITE: tuple[Shape, Shape] = (("number", (-math.inf,)), ("number", (math.inf,)))


def is_name(node: ast.expr) -> bool:
    """Does this only name the answer, as in `x = 5`, `f(n) = …`, `AB = 4`, `(p, q) = …`?"""
    match node:
        case ast.Call(func=ast.Name(id="var"), args=[ast.Constant(name)]):
            return name not in ("pi", "e")
        case ast.Call(func=ast.Name(id="at")):
            return True
        case ast.Call(func=ast.Name(id="abs"), args=[inner]):
            return is_name(inner)
        case ast.Call(func=ast.Name(id="seq"), args=[ast.Constant("()" | "{}"), *members]):
            return all(map(is_name, members))
        case ast.BinOp(op=ast.Mult() | ast.Div(), left=left, right=right):  # AB, NO/BO, but not xy
            letters = "".join(re.findall(r"(?:var|at)\('(.)", ast.unparse(node)))
            return is_name(left) and is_name(right) and letters.isupper()
    return False


def shape_of(node: ast.expr, work: Work) -> Shape:
    """Inequalities become intervals; lists, sets and unions become unordered."""
    match node:
        case ast.Tuple(elts=members):
            return _unordered([shape_of(member, work) for member in members])
        case ast.Call(func=ast.Name(id="seq"), args=[ast.Constant(kind), *members]):
            shapes = [shape_of(member, work) for member in members]
            if len(members) == 1 and kind in ("()", "[]", "{}"):
                return shapes[0]
            if kind in ("⦃⦄", "{}"):
                return (
                    ("unordered", *shapes) if ("unordered",) in shapes else _unordered(shapes, True)
                )
            if not members or (kind in ("(]", "[)") and len(members) != 2):
                raise Refused
            return ("ordered", kind, *shapes)
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _unordered([shape_of(left, work), shape_of(right, work)])
        case ast.BinOp(op=ast.BitAnd(), left=left, right=right):
            line, holes = shape_of(left, work), shape_of(right, work)
            if line != ("ordered", "()", *_INFINITE) or holes[0] != "unordered":
                raise Refused
            return _line_without(*holes[1:])
        case ast.Compare(left=left, ops=ops, comparators=rest):
            return _relation([type(op) for op in ops], [left, *rest], work)
    return _number(node, work)


def _number(node: ast.expr, work: Work) -> Shape:
    """("number", values), None where undefined; a matrix becomes ordered rows, a ± unordered."""
    if isinstance(node, ast.Constant):
        places = len(str(node.value).partition(".")[2])
        return ("number", (value_of(node, work),), *([places] if places >= 12 else []))
    source = ast.unparse(node)
    if "pm" not in source:
        return _values(node, work, source)
    both = []
    for work.sign in (-1, 1):
        both.append(_values(node, work, source))
    return _unordered(both, True)


def _values(node: ast.expr, work: Work, source: str) -> Shape:
    free = bool(re.search(r"at\(|var\('(?!pi'|e'|i')", source))
    real, work.real = work.real, work.real and free
    values: list[Any] = []
    for work.point in range(POINTS if free else 1):
        try:
            values.append(value_of(node, work))
        except Undefined:
            values.append(None)
    work.real = real
    if isinstance(values[0], list):
        return _vector(values)
    if not free and values[0] is not None and work.mp.isinf(values[0]):
        return _INFINITE[int(values[0] > 0)]
    return ("number", tuple(values))


def _vector(values: list[Any]) -> Shape:
    """A matrix as ordered (¶) rows (&); a single row or column as one ordered shape."""
    if any(not isinstance(value, list) for value in values):
        raise Refused
    if not isinstance(values[0][0], list):
        return ("ordered", "&", *(("number", cells) for cells in zip(*values, strict=True)))
    rows = [_vector([value[i] for value in values]) for i in range(len(values[0]))]
    if len(rows) == 1:
        return rows[0]
    return ("ordered", "¶", *(row[2] if len(row) == 3 else row for row in rows))


def _unordered(shapes: list[Shape], distinct: bool = False) -> Shape:
    """Lists in lists are flattened; repetitions are dropped, but those of numbers in sets only."""
    kept: list[Shape] = []
    for shape in shapes:
        members = shape[1:] if shape[0] == "unordered" else (shape,)
        kept += [m for m in members if m not in kept or (m[0] == "number" and not distinct)]
    if len(kept) > MAX_ITEMS:
        raise TooBig
    return ("unordered", *kept)


def _line_without(*holes: Shape) -> Shape:
    ends = [_INFINITE[0], *holes, _INFINITE[1]]
    return ("unordered", *(("ordered", "()", *ends[i : i + 2]) for i in range(len(ends) - 1)))


def _relation(ops: list[type[ast.cmpop]], sides: list[ast.expr], work: Work) -> Shape:
    if ast.Is in ops:  # ≈: x = 1/3 ≈ 0.33 says 1/3, but x ≈ 11 says 11
        cut = ops.index(ast.Is) + (ops[0] is ast.Is and is_name(sides[0]))
        ops, sides = [ast.Eq if op is ast.Is else op for op in ops[:cut]], sides[: cut + 1]
        if not ops:
            return shape_of(sides[0], work)
    if set(ops) == {ast.Eq}:
        return _equation(sides[0], sides[-1], work)  # x = 5 + 6 = 11 says x = 11
    if ops in ([ast.In], [ast.NotEq]):
        shape = shape_of(sides[1], work)
        shape = shape if ops == [ast.In] else _line_without(shape)
        return ("named", ast.unparse(sides[0]), shape, None)
    if set(ops) <= {ast.Gt, ast.GtE}:
        sides, ops = sides[::-1], [ast.Lt if op is ast.Gt else ast.LtE for op in ops[::-1]]
    if not set(ops) <= {ast.Lt, ast.LtE}:
        raise Refused
    return _interval(["(["[op is ast.LtE] for op in ops], sides, work)


def _equation(left: ast.expr, right: ast.expr, work: Work) -> Shape:
    if not is_name(left):
        if not is_name(right):
            return _difference("=", left, right, work)
        left, right = right, left
    shape = shape_of(right, work)
    if shape[0] == "unordered" or parts(left) != [left]:
        return shape
    zero = _difference("=", left, right, work) if shape[0] == "number" else None
    return ("named", ast.unparse(left), shape, zero)


def _difference(sign: str, left: ast.expr, right: ast.expr, work: Work) -> Shape:
    """("zero", sign, values of left - right)"""
    kind, *values = _number(ast.BinOp(left=left, op=ast.Sub(), right=right), work)
    if kind != "number":
        raise Refused
    return ("zero", sign, values[0])


def _interval(opens: list[str], sides: list[ast.expr], work: Work) -> Shape:
    """`a < x ≤ b` as the named interval (a, b]; other inequalities as they stand."""
    close = {"(": ")", "[": "]"}[opens[-1]]
    match [is_name(side) and not ast.unparse(side).startswith("abs") for side in sides]:
        case [False, True, False]:
            inside = (
                "ordered",
                opens[0] + close,
                *(shape_of(s, work) for s in (sides[0], sides[2])),
            )
            return ("named", ast.unparse(sides[1]), inside, None)
        case [True, False]:
            inside, name = (
                ("ordered", "(" + close, _INFINITE[0], shape_of(sides[1], work)),
                sides[0],
            )
        case [False, True]:
            inside, name = (
                ("ordered", opens[0] + ")", shape_of(sides[0], work), _INFINITE[1]),
                sides[1],
            )
        case [_, _]:
            return _difference(opens[0], sides[1], sides[0], work)
        case _:  # f(2) < f(1) < f(4)
            return ("ordered", "".join(opens) + "<", *(shape_of(side, work) for side in sides))
    return ("named", ast.unparse(name), inside, _difference(opens[0], sides[1], sides[0], work))


# Comparing


def _close(x: Any, y: Any, mp: Any) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = mp.convert(x), mp.convert(y)
    if mp.isinf(x) or mp.isinf(y):
        return x == y
    return abs(x - y) <= mp.mpf(10) ** -100 * (max(abs(x), abs(y)) if x and y else 1)


def _same_number(a: Shape, b: Shape) -> bool:
    """Equal constants, or expressions equal at 4 points or more and different at none."""
    (xs, ys), mp = (a[1], b[1]), context()
    count = max(len(xs), len(ys))
    pairs = [(x, y) for x, y in zip(xs * (count // len(xs)), ys * (count // len(ys)), strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    for decimal, exact in (
        (a, ys[0]),
        (b, xs[0]),
    ):  # 12 or more places that write out a number without an end
        if len(decimal) == 3 and count == 1 and exact is not None:
            endless = not isinstance(exact, Fraction) or 10**400 % exact.denominator
            if (
                endless
                and abs(mp.convert(decimal[1][0]) - mp.convert(exact)) < mp.mpf(10) ** -decimal[2]
            ):
                return True
    return len(pairs) >= (4 if count > 1 else 1) and all(_close(x, y, mp) for x, y in pairs)


def _proportional(a: Shape, b: Shape, positive: bool = False) -> bool:
    """Is a = c·b for one constant c ≠ 0 (c > 0)? Then a = 0 and b = 0 are the same equation."""
    if len(a[2]) != len(b[2]) or any(bool(x) != bool(y) for x, y in zip(a[2], b[2], strict=True)):
        return False
    mp, pairs = context(), [(x, y) for x, y in zip(a[2], b[2], strict=True) if x and y]
    if len(pairs) < 4 or (positive and mp.re(pairs[0][0]) * mp.re(pairs[0][1]) < 0):
        return False
    return all(_close(pairs[0][0] * y, pairs[0][1] * x, mp) for x, y in pairs)


def _own_names(shape: Shape) -> list[str]:
    """The names in a list where every member has its own: AB = 4, CD = 5."""
    if shape[0] != "unordered":
        return []
    names = [part[1] for part in shape[1:] if part[0] == "named"]
    return names if 1 < len(names) == len(set(names)) == len(shape) - 1 else []


def _same_list(a: Shape, b: Shape) -> bool:
    """As sets; by name where all have names of their own; in order where only one side has."""
    names = _own_names(a), _own_names(b)
    if any(names) and all(shape[0] in ("unordered", "ordered") for shape in (a, b)):
        parts = [
            [p[2] if own else p for p in s[1 + (s[0] == "ordered") :]]
            for s, own in zip((a, b), names, strict=True)
        ]
        if all(names):
            if sorted(names[0]) != sorted(names[1]):
                return False
            parts = [
                [part for _, part in sorted(zip(own, p, strict=True), key=lambda x: x[0])]
                for own, p in zip(names, parts, strict=True)
            ]
        return len(parts[0]) == len(parts[1]) and all(
            equal(x, y) for x, y in zip(*parts, strict=True)
        )
    lists = [list(s[1:]) if s[0] == "unordered" else [s] for s in (a, b)]
    if len(lists[0]) != len(lists[1]):
        return False
    for part in lists[0]:
        found = next((i for i, other in enumerate(lists[1]) if equal(part, other)), None)
        if found is None:
            return False
        del lists[1][found]
    return True


def equal(a: Shape, b: Shape) -> bool:
    """Are two shapes the same answer?"""
    kinds = {a[0], b[0]}
    if a[0] == b[0] == "named":
        plain = all(re.fullmatch(r"var\('.'\)", shape[1]) for shape in (a, b))
        interval = "ordered" in (a[2][0], b[2][0])
        if (a[1] == b[1] or not (plain or interval)) and equal(a[2], b[2]):
            return True
        return bool(a[3] and b[3]) and equal(a[3], b[3])
    if kinds == {"named", "zero"}:
        named, zero = (a, b) if a[0] == "named" else (b, a)
        return bool(named[3]) and equal(named[3], zero)
    if "named" in kinds:
        return equal(a[2] if a[0] == "named" else a, b[2] if b[0] == "named" else b)
    if "unordered" in kinds:
        return _same_list(a, b)
    if a[0] != b[0]:
        return False
    if a[0] == "base":
        return a == b
    if a[0] == "zero":
        return a[1] == b[1] and _proportional(a, b, positive=a[1] != "=")
    if a[0] == "number":
        return _same_number(a, b)
    return (
        len(a) == len(b)
        and _same_brackets(a[1], b[1], len(a) == 4)
        and all(equal(x, y) for x, y in zip(a[2:], b[2:], strict=True))
    )


def _same_brackets(a: str, b: str, pair: bool) -> bool:
    """A vector may be written as a tuple, a row is no column, and a pair may be an interval."""
    if a == b or {a, b} & {"&", "¶"}:
        return a == b or {a, b} != {"&", "¶"}
    return not pair and "<" not in a + b


def scaled(shape: Shape, factor: Fraction | Any) -> Shape:
    if shape[0] != "number":
        return shape
    return ("number", tuple(None if x is None else x * factor for x in shape[1]))


def key_of(shape: Shape) -> str:
    match shape:
        case ("named", _, inner, _):
            return key_of(inner)
        case ("base", value):
            return f"{value} written in another base"
        case ("ordered", kind, *parts):
            opening, closing = "()" if kind in ("&", "¶") else (kind[0], kind[-1])
            return opening + ", ".join(map(key_of, parts)) + closing
        case ("unordered", *parts):
            return (
                "{" + ", ".join(sorted(map(key_of, parts))) + "}"
                if len(parts) != 1
                else key_of(parts[0])
            )
        case ("number", values, *_) if len(values) == 1:
            return show(values[0]) if values[0] is not None else "undefined"
    shown = " ".join(
        "-" if x is None else str(x) if isinstance(x, str) else show(x) for x in shape[-1]
    )
    return f"{shape[0]} #{zlib.crc32(shown.encode()):08x}"

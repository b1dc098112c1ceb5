"""What an expression is worth: a Fraction, an mpmath number, or lists of lists for a matrix.

For rewards/grader.py. Departures from computer algebra: nothing is simplified; constants are exact
fractions or 120-digit numbers, and an expression with variables is its values at 12 fixed points.
Every operation is paid for out of `MAX_WORK` and checked against `MAX_BITS`: no answer can hang.
"""

from __future__ import annotations

import ast
import math
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import mpmath

from rftt.rewards.latex import FUNCTIONS, Refused, TooBig

MAX_BITS, MAX_WORK, POINTS = 20_000, 40_000, 12


class Undefined(Refused):
    """No value at this point (0/0, log 0); another point may have one."""


_LOCAL = threading.local()  # an mpmath context carries its precision as state: each thread has one


def context() -> Any:
    """This thread's mpmath context."""
    if "mp" not in _LOCAL.__dict__:
        _LOCAL.mp = mpmath.MPContext()
        _LOCAL.mp.dps = 120
    return _LOCAL.mp


@dataclass
class Work:
    """One reading: where its variables stand and what it may still spend."""

    whole: bool = False
    """Are there factorials, floors or sums? Then n is a whole number."""
    real: bool = True
    """Is there no i? Then, with variables, the root or logarithm of a negative is undefined."""
    point: int = 0
    sign: int = 1
    """What ± stands for."""
    left: int = MAX_WORK
    bound: dict[str, Fraction] = field(default_factory=dict)
    mp: Any = field(default_factory=context)

    def pay(self, cost: int) -> None:
        self.left -= cost
        if self.left < 0:
            raise TooBig


def _checked(x: Any, work: Work) -> Any:
    """`x`, if it is a number within the bounds; what is real up to rounding becomes so."""
    if isinstance(x, Fraction):
        bits = x.numerator.bit_length() + x.denominator.bit_length()
        work.pay(1 + bits // 128)
        if bits > 4 * MAX_BITS:
            raise TooBig
        return x
    work.pay(2)
    if work.mp.isnan(x):
        raise Undefined
    if x and not work.mp.isinf(x) and work.mp.mag(x) > MAX_BITS:
        raise TooBig
    return x.real if x.imag and abs(x.imag) <= abs(x.real) * work.mp.mpf(10) ** -110 else x


def _add(work: Work, x: Any, y: Any) -> Any:
    if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
        return [_add(work, a, b) for a, b in zip(x, y, strict=True)]
    if isinstance(x, list) or isinstance(y, list):
        raise Refused
    return _checked(x + y, work)


def _times(work: Work, x: Any, y: Any) -> Any:
    if isinstance(x, list) and isinstance(y, list):
        if len(x[0]) != len(y):
            raise Refused
        columns = list(zip(*y, strict=True))
        return [[_dot(work, row, column) for column in columns] for row in x]
    if isinstance(x, list) or isinstance(y, list):
        cells, factor = (x, y) if isinstance(x, list) else (y, x)
        return [_times(work, cell, factor) for cell in cells]
    return _checked(x * y, work)


def _dot(work: Work, xs: Any, ys: Any) -> Any:
    total: Any = Fraction(0)
    for x, y in zip(xs, ys, strict=True):
        total = _add(work, total, _times(work, x, y))
    return total


def _power(work: Work, x: Any, y: Any) -> Any:
    """Exact where it can be; an odd root of a negative number is the real one."""
    if isinstance(x, list) and y in (2, 3):
        return _times(work, x, _power(work, x, y - 1) if y == 3 else x)
    mp = work.mp
    if isinstance(x, list) or isinstance(y, list) or mp.isinf(y) or mp.isinf(x):
        raise Undefined
    if x == 0:
        if not mp.re(y) > 0:
            raise Undefined
        return Fraction(0)
    if (
        isinstance(x, Fraction)
        and isinstance(y, Fraction)
        and (root := _root(x, y.denominator, mp))
    ):
        if max(root.numerator.bit_length(), root.denominator.bit_length()) * abs(y) > MAX_BITS:
            raise TooBig
        return _checked(root**y.numerator, work)
    if mp.im(x) == 0 and mp.re(x) < 0:
        if isinstance(y, Fraction) and y.denominator % 2:
            return _times(work, Fraction(-1) ** y.numerator, _power(work, -x, y))
        if work.real:
            raise Undefined
    work.pay(30)
    base, raised = mp.convert(x), mp.convert(y)
    if abs(raised) * (abs(mp.mag(base)) + 1) > MAX_BITS:
        raise TooBig
    return _checked(base**raised, work)


def _root(x: Fraction, degree: int, mp: Any) -> Fraction | None:
    """The exact root, if there is one."""
    if degree == 1:
        return x
    if x < 0 or degree > 50:
        return None
    root = Fraction(*(int(mp.nint(mp.root(n, degree))) for n in (x.numerator, x.denominator)))
    return root if root**degree == x else None


def _divide(work: Work, x: Any, y: Any) -> Any:
    return _times(work, x, _power(work, y, Fraction(-1)))


def _finite(x: Any, work: Work) -> Any:
    """`x`, if it is real and of modest size."""
    if isinstance(x, list) or x.imag or work.mp.isinf(x) or work.mp.mag(work.mp.convert(x)) > 300:
        raise Undefined
    return x.real


def _whole(x: Any, work: Work, limit: int = 5000) -> int:
    n = x if isinstance(x, Fraction) else Fraction(int(work.mp.nint(_finite(x, work))))
    if n.denominator != 1 or (n != x and abs(x - int(n)) > 1e-25):
        raise Undefined
    if abs(n) > limit:
        raise TooBig
    return int(n)


def _floor(work: Work, x: Any) -> Fraction:
    if isinstance(x, Fraction):
        return Fraction(math.floor(x))
    nearest = work.mp.nint(_finite(x, work))
    return Fraction(int(nearest if abs(x - nearest) < 1e-25 else work.mp.floor(x)))


def _factorial(work: Work, x: Any) -> Fraction:
    if (n := _whole(x, work)) < 0:
        raise Undefined
    work.pay(n)
    return Fraction(math.factorial(n))


def _binomial(work: Work, x: Any, y: Any) -> Fraction:
    n, k = _whole(x, work), _whole(y, work)
    if n < 0:
        raise Undefined
    work.pay(n)
    return Fraction(math.comb(n, k) if k >= 0 else 0)


def _function(work: Work, name: str, x: Any) -> Any:
    """A function of mpmath, for arguments of modest size."""
    mp = work.mp
    work.pay(40)
    if isinstance(x, list) or mp.isinf(x) or (name == "ln" and x == 0):
        raise Undefined
    if x and name != "ln" and mp.mag(mp.convert(x)) > 40:
        raise Undefined
    try:
        value = _checked(getattr(mp, name)(mp.convert(x)), work)
    except ZeroDivisionError as error:
        raise Undefined from error
    if work.real and value.imag:
        raise Undefined
    return value


def _log(work: Work, x: Any, base: Any) -> Any:
    return _divide(work, _function(work, "ln", x), _function(work, "ln", base))


def _rows(_: Work, *rows: list[Any]) -> list[list[Any]]:
    kept = [row for row in rows if row]
    if len({len(row) for row in kept}) != 1:
        raise Refused
    return kept


def _over_integers(function: Callable[..., int]) -> Callable[..., Fraction]:
    return lambda work, *xs: Fraction(function(*(_whole(x, work, 10**30) for x in xs)))


def _extreme(pick: Callable[..., Any]) -> Callable[..., Any]:
    return lambda work, *xs: pick(xs, key=lambda x: work.mp.convert(_finite(x, work)))


_OPERATIONS: dict[str, Callable[..., Any]] = {  # of a call that the reader has written
    "root": lambda work, x, n: _power(work, x, _divide(work, Fraction(1), n)),
    "log": _log,
    "binom": _binomial,
    "abs": lambda work, x: _checked(abs(_scalar(x)), work),
    "floor": _floor,
    "ceil": lambda work, x: -_floor(work, -_scalar(x)),
    "gcd": _over_integers(math.gcd),
    "lcm": _over_integers(math.lcm),
    "min": _extreme(min),
    "max": _extreme(max),
    "rows": _rows,
    "row": lambda _, *cells: list(cells),
    "oo": lambda work: work.mp.inf,
    "deg": lambda work: work.mp.pi / 180,
}
_BINARY: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: _add,
    ast.Sub: lambda work, x, y: _add(work, x, _times(work, Fraction(-1), y)),
    ast.Mult: _times,
    ast.Div: _divide,
    ast.Pow: _power,
}


def _scalar(x: Any) -> Any:
    if isinstance(x, list):
        raise Refused
    return x


def _at_point(name: str, work: Work) -> Any:
    """A number for each name and point, the same in every process."""
    if name in work.bound:
        return work.bound[name]
    if name in ("pi", "e", "i"):
        return {"pi": +work.mp.pi, "e": +work.mp.e, "i": work.mp.j}[name]
    drawn = zlib.crc32(f"{name}|{work.point}".encode())
    if work.whole and name[0] not in "xyzt":
        return Fraction(1 + drawn % 19)
    negative = work.point >= POINTS * 2 // 3 and drawn >> 12 & 1
    return Fraction(drawn % 1999 + 7, -307 if negative else 307)


def _series(work: Work, product: bool, low: ast.expr, high: ast.expr, body: ast.expr) -> Any:
    """A finite sum or product, term by term."""
    match parts(low):
        case [ast.Compare(left=ast.Call(args=[name]), ops=[ast.Eq()], comparators=[start])]:
            first, last = _whole(value_of(start, work), work), _whole(value_of(high, work), work)
        case _:
            raise Refused
    total, outer = Fraction(product), work.bound
    for k in range(first, last + 1):
        work.bound = {**outer, ast.literal_eval(name): Fraction(k)}
        total = (_times if product else _add)(work, total, value_of(body, work))
    work.bound = outer
    return total


def value_of(node: ast.expr, work: Work) -> Any:
    """The value of an expression at `work.point`."""
    work.pay(1)
    match node:
        case ast.Constant(value=str() as digits):
            return Fraction(digits)
        case ast.Name(id="pm"):
            return Fraction(work.sign)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return _times(work, Fraction(-1), value_of(inner, work))
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return value_of(inner, work)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Call(func=ast.Name(id="fact"))):
            return _factorial(work, value_of(left, work))
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Call(args=[ast.Constant("T")])) if (
            isinstance(matrix := value_of(left, work), list)
        ):
            return [list(row) for row in zip(*matrix, strict=True)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](work, value_of(left, work), value_of(right, work))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _called(name, args, work)
    raise Refused


def _called(name: str, args: list[ast.expr], work: Work) -> Any:
    match name, args:
        case "var", [ast.Constant(value=str() as letter)]:
            return _at_point(letter, work)
        case "seq", [ast.Constant(value="()" | "[]" | "{}"), inner]:
            return value_of(inner, work)
        case (("sum_" | "prod_"), [low, high, body]):
            return _series(work, name == "prod_", low, high, body)
        case "seq", _:
            raise Refused
        case "at", [ast.Constant(value=str() as called), *rest]:
            inner = ",".join(show(value_of(p, work)) for arg in rest for p in parts(arg))
            return _at_point(f"{called}({inner})", work)
    values = [value_of(part, work) for arg in args for part in parts(arg)]
    if not values and name not in ("oo", "deg", "row"):
        raise Refused
    try:
        if name in _OPERATIONS:
            return _OPERATIONS[name](work, *values)
        if name in FUNCTIONS:
            return _function(work, FUNCTIONS[name], *values)
    except TypeError as error:  # the wrong number of arguments
        raise Refused from error
    raise Refused


def parts(node: ast.expr) -> list[ast.expr]:
    """The members of a bracket; otherwise just `node`."""
    match node:
        case ast.Call(func=ast.Name(id="seq"), args=[_, *members]):
            return members
    return [node]


def show(x: Any) -> str:
    """A value as text: exact if short, else 40 digits."""
    if isinstance(x, list):
        return f"[{', '.join(map(show, x))}]"
    if not isinstance(x, Fraction) or x.numerator.bit_length() + x.denominator.bit_length() > 400:
        return context().nstr(context().convert(x), 40)
    return str(x)

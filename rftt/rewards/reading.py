"""What an answer is worth: its tokens, read by recursive descent and worked out (see grader.py).

`world` puts numbers for variables and units, `Reader` reads fractions, 120-digit numbers and Groups
of them. Departures from computer algebra: nothing is simplified, the same tokens are read again in
other worlds; and every step is bounded. OverflowError says "beyond a bound", SyntaxError and
TypeError "no mathematics", any other ArithmeticError or ValueError "no value in this world".
"""

import itertools
import math
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np

from rftt.rewards.spelling import FUNCTIONS, KINDS, NAME, NO_UNIT, UNITS

MAX_DEPTH, MAX_ITEMS, MAX_BITS, MAX_STEPS, POINTS = 40, 60, 20_000, 5_000, 12
MP = mpmath.MPContext()
MP.dps = 120  # set once: what is called below only reads it, and so may run in any thread
EPS, _INEXACT, _NUMBERS = MP.mpf(10) ** -105, (MP.mpf, MP.mpc), (Fraction, MP.mpf, MP.mpc)
for _constant in (MP.pi, MP.e, MP.ln2, MP.ln10):
    _constant(prec=4000)  # kept by mpmath: no thread will replace digits that another is reading

# 1. Worlds


def _drawn(name: str, point: int, whole: bool = False) -> Fraction:
    """A value for a name at a point, the same in every process; the last four may be negative."""
    drawn = zlib.crc32(f"{name}|{point}".encode())
    if whole and name[0] not in "xyzt":
        return Fraction(1 + drawn % 19)
    sign = -1 if point >= POINTS - 4 and drawn & 1 else 1
    return sign * ((drawn >> 1) % 7 + Fraction(1 + (drawn >> 4) % 306, 307))


def _unit(token: str) -> tuple[str, Any]:
    """(what it measures, how much of it); a word that is no known unit measures itself."""
    word = token.strip('"')
    name = re.sub("s$", "", word.lower())
    return UNITS.get(word) or UNITS.get(name) or (name, Fraction(1))


def world(
    found: tuple[str, ...], marks: set[str], point: int, bare: bool, sign: str = "+"
) -> list[Any]:
    """The tokens with numbers for variables and units (1 if `bare`), and `sign` for ±.

    `marks` are the tokens of both answers: with factorials, floors or sums, n is a whole number.
    """
    whole = bool(marks & {*"!⌊⌈ΣΠ", "binom", "(-1)^"})
    bound = {index for t, index in zip(found, found[3:], strict=False) if t in "ΣΠ"}
    made: list[Any] = []
    for token, before in zip(found, ("", *found), strict=False):
        if token[0] == '"' or token in "%°":
            kind, size = _unit(token)
            money = kind in ("dollar", "euro", "pound", "yen")
            known = kind in KINDS or (len(token) > 5 and kind not in NO_UNIT)
            if not known or not (money or re.search(r'[\w)}⦄⟧"°%/|⌋⌉]$', before)):
                raise SyntaxError
            base = {"": 1, "%": 1, "°": MP.pi / 180}.get(kind) or _drawn(f"unit {kind}", point)
            made.append(Fraction(1) if bare and kind else size * base)
        elif token in bound:
            made.append(token)
        elif token in _CONSTANTS:
            made.append(_CONSTANTS[token])
        elif NAME.fullmatch(token):
            made.append(_drawn(re.sub("[{}]", "", token), point, whole))
        else:
            made.append({"±": sign, "∓": "+" if sign == "-" else "-"}.get(token, token))
    return made


# 2. Reading


@dataclass(frozen=True)
class Group:
    """Anything but a number. It can be scaled; other arithmetic with it is a TypeError."""

    kind: str  # '{}' in any order; '()' … '[]', & row, ¶ column; '<<<' rising; a relation's sign
    parts: tuple[Any, ...]  # of a relation: what it says of `name`, for x > 2 the interval (2, ∞)
    name: str = ""
    difference: Any = None  # of the sides, over that at the first point: x = 2 is then 2x = 4

    def __mul__(self, factor: Any) -> "Group":
        return Group(self.kind, tuple(part * factor for part in self.parts))


def unordered(shapes: list[Any], distinct: bool = False) -> Group:
    """Lists in lists are flattened; repetitions are dropped, but those of numbers in sets only."""
    kept: list[Any] = []
    for shape in shapes:
        inner = isinstance(shape, Group) and shape.kind == "{}" and shape.parts
        new = distinct or isinstance(shape, Group)
        kept += [part for part in inner or [shape] if part not in kept or not new]
    if len(kept) > MAX_ITEMS:
        raise OverflowError
    return Group("{}", tuple(kept))


def _whole(x: Any) -> int:
    if not isinstance(x, Fraction) or x.denominator > 1:
        raise ValueError
    if abs(x) > 5000:
        raise OverflowError
    return int(x)


_FUNCTIONS: dict[str, Any] = {
    "sin": MP.sin, "cos": MP.cos, "tan": MP.tan, "sinh": MP.sinh, "cosh": MP.cosh, "tanh": MP.tanh,
    "exp": MP.exp, "ln": MP.ln, "arcsin": MP.asin, "arccos": MP.acos, "arctan": MP.atan,
    "cot": lambda x: 1 / MP.tan(x), "sec": lambda x: 1 / MP.cos(x), "csc": lambda x: 1 / MP.sin(x),
    "log": lambda x, base=10: MP.ln(x) / MP.ln(base), "lg": lambda x: MP.ln(x) / MP.ln(10),
    "gcd": lambda *n: math.gcd(*map(_whole, n)), "lcm": lambda *n: math.lcm(*map(_whole, n)),
    "!": lambda n: math.factorial(_whole(n)), "binom": lambda n, k: math.comb(_whole(n), _whole(k)),
    "⌊": lambda x: int(MP.floor(x)), "⌈": lambda x: int(MP.ceil(x)),
    "|": abs, "min": min, "max": max, "frac": lambda x, y: x * (1 / y),
}  # fmt: skip
_CONSTANTS = {
    "π": +MP.pi, "e": +MP.e, "i": MP.j, "∞": MP.inf,
    "∅": Group("{}", ()), "ℝ": Group("()", (-MP.inf, MP.inf)),
}  # fmt: skip
_CLOSERS = {"(": ")]", "[": ")]", "{": "}", "⦃": "⦄", "|": "|", "⌊": "⌋", "⌈": "⌉", "⟦": "⟧"}
_RANK = {  # how tightly an operator, or the lack of one before this token, binds; 0 ends an operand
    **dict.fromkeys([*")]}⦄⌋⌉⟧,;&¶=<>≤≥≠∈∖_'.:", ""], 0), **dict.fromkeys("+-±∓", 2),
    **dict.fromkeys([*"·/(", *FUNCTIONS], 3), **dict.fromkeys("^!", 5),
}  # fmt: skip
_OPENS, _CLOSES = {"<": "(", "≤": "["}, {"<": ")", "≤": "]"}


@dataclass
class Reader:
    """Each method reads one thing and returns what it is worth."""

    text: tuple[str, ...]
    tokens: list[Any]  # `world` of the text
    real: bool  # is there no i? Then roots and logarithms of negatives are undefined
    scales: dict[int, Any]  # differences of the sides of relations, at the first point
    closing: str = ""
    at: int = 0
    depth: int = 0
    steps: int = 0

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        self.at += 1
        if not token or (wanted and token not in wanted):
            raise SyntaxError
        return token

    def cells(self, row: str, cell: str) -> list[Any]:
        """Items up to a closing token. 1;2;3 and 1,2,3 are cells, 1,2;3,4 two pairs."""
        rows: list[list[Any]] = [[]]
        while self.peek() and self.peek() not in self.closing:
            if self.peek() not in (row, cell):
                rows[-1].append(self.item())
                if self.peek() not in (row, cell, "", *self.closing):
                    raise SyntaxError
            elif self.take() == row:
                rows.append([])
        rows = [cells for cells in rows if cells]
        if row == "¶" or (len(rows) > 1 and any(len(cells) > 1 for cells in rows)):
            return [Group("()", tuple(cells)) for cells in rows]
        return [cell for cells in rows for cell in cells]

    def item(self) -> Any:
        """A sum, or a chain of relations between sums."""
        sides, names, signs = [], [], ""
        while True:
            start, side = self.at, self.expression()
            if isinstance(side, np.ndarray) and self.peek() not in (")", "}"):
                rows = [Group("&", tuple(row)) if len(row) > 1 else row[0] for row in side]
                side = rows[0] if len(rows) == 1 else Group("¶", tuple(rows))
            name = "".join(self.text[start : self.at])
            sides.append(side)
            names.append(name if NAME.fullmatch(name) and name not in _CONSTANTS else "")
            if self.peek() == "" or self.peek() not in "=<>≤≥≠∈∖":
                return self.related(signs, sides, names) if signs else side
            signs += self.take()

    def related(self, signs: str, sides: list[Any], names: list[str]) -> Group:
        """x = 5 says 5, x > 2 the interval (2, ∞); other relations are only equal to relations."""
        if set(signs) <= set(">≥"):  # turned round
            signs = signs[::-1].translate(str.maketrans(">≥", "<≤"))
            sides, names = sides[::-1], names[::-1]
        left, right, name = sides[0], sides[-1], names[0] or names[-1]
        if signs in ("∈", "≠", "∖"):
            holes = right.parts if isinstance(right, Group) and right.kind == "{}" else (right,)
            ends = itertools.pairwise([-MP.inf, *holes, MP.inf])
            value = right if signs == "∈" else unordered([Group("()", pair) for pair in ends])
            return Group(signs, (value,), name)
        if set(signs) not in ({"="}, {"<"}, {"≤"}, {"<", "≤"}):
            raise SyntaxError
        equation, difference, value = signs[0] == "=", None, None
        plain = not any(isinstance(side, Group) for side in (left, right))
        if plain and (equation or len(sides) == 2):
            difference = right + left * -1
            scale = self.scales[self.at] = self.scales.get(self.at) or difference
            difference = difference * (1 / (scale if equation else abs(scale)))
        if equation:
            value = right if names[0] else left if name else None
        elif len(sides) == 2 and name and "|" not in name:  # x > 2 is 2 < x < ∞
            low = (_OPENS[signs], left) if names[1] else ("(", -MP.inf)
            high = (_CLOSES[signs], right) if names[0] else (")", MP.inf)
            value = Group(low[0] + high[0], (low[1], high[1]))
        elif len(sides) == 3 and not name and names[1]:
            value = Group(_OPENS[signs[0]] + _CLOSES[signs[1]], (left, right))
        elif len(sides) > 2:  # f(2) < f(1) < f(4)
            return Group(f"{signs}<", tuple(sides))
        return Group("=" if equation else signs, (value,), name, difference)

    def expression(self, above: int = 0) -> Any:
        """Operators that bind tighter than `above`; without one between them, operands multiply."""
        left = self.operand()
        while _RANK.get(token := self.peek(), 4) > above and token not in self.closing:
            sign, self.at = self.tokens[self.at], self.at + (token in "+-±∓·/^!")
            if token in "+-±∓":
                right = self.expression(2)
                left = left + (-right if sign == "-" else right)
            elif token == "!":
                left = _FUNCTIONS["!"](left)
            elif token == "^" and self.peek() == "T" and isinstance(left, np.ndarray):
                self.at, left = self.at + 1, left.T
            elif token == "^":
                left = self.power(left, self.operand())
            elif token[0].isdigit() and self.text[self.at - 1][-1].isdigit():
                raise SyntaxError  # 7 8
            else:
                right: Any = self.expression(4)
                right = 1 / right if token == "/" else right
                left, right = (right, left) if isinstance(right, Group) else (left, right)
                both = isinstance(left, np.ndarray) and isinstance(right, np.ndarray)
                left = left @ right if both else left * right
            left = self.checked(left)
        return left

    def operand(self) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise OverflowError
        x = self.checked(self.symbol(self.take(), self.tokens[self.at - 1]))
        self.depth -= 1
        return x

    def symbol(self, token: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if re.match(r"\.?\d", token):
            return Fraction(token)
        if token in _CLOSERS:
            return self.bracket(token)
        if value in "+-":
            return -self.expression(4) if value == "-" else self.expression(4)
        if token in "ΣΠ":
            return self.series(token)
        if token in ("frac", "binom"):
            return _FUNCTIONS[token](self.operand(), self.operand())
        if token == "√":
            degree = self.bracket(self.take()) if self.peek() == "[" else 2
            return self.power(self.operand(), 1 / Fraction(degree))
        if token in _FUNCTIONS:
            return self.function(token)
        raise SyntaxError

    def bracket(self, opening: str) -> Any:
        outer, self.closing = self.closing, _CLOSERS[opening]
        cells = self.cells(*("¶&" if opening == "⟦" else ";,"))
        kind, self.closing = opening + self.take(self.closing), outer
        if opening == "⟦":
            if len({len(row.parts) for row in cells}) != 1:
                raise SyntaxError
            return np.array([row.parts for row in cells], dtype=object)
        if opening in _FUNCTIONS:
            return _FUNCTIONS[opening](*cells)
        if opening == "⦃" or (opening == "{" and len(cells) != 1):
            return unordered(cells, True)
        if len(cells) == 1 and kind not in ("(]", "[)"):
            return cells[0]
        if len(cells) < 2 or (kind in ("(]", "[)") and len(cells) > 2):
            raise SyntaxError
        return Group(kind if len(cells) == 2 else "()", tuple(cells))

    def function(self, name: str) -> Any:
        power, base = Fraction(1), []
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                power = self.operand()
            else:
                base = [self.operand()]
        inside = self.operand() if self.peek() in ("(", "[", "{") else self.expression(3)
        if power == -1 and f"arc{name}" in _FUNCTIONS:
            name, power = f"arc{name}", Fraction(1)
        values = [*(inside.parts if isinstance(inside, Group) else [inside]), *base]
        if any(MP.mag(MP.convert(x)) > 1000 for x in values):
            raise ValueError
        self.steps += 20
        return self.power(self.checked(_FUNCTIONS[name](*values)), power)

    def series(self, token: str) -> Any:
        """A finite sum or product, term by term: its body is read again for every index."""
        _, _ = self.take("_"), self.take("{")
        index, _, low = self.take(), self.take("="), _whole(self.expression())
        _, _, high = self.take("}"), self.take("^"), _whole(self.operand())
        start, total = self.at, Fraction(token == "Π")
        for k in range(low, max(low, high) + 1):
            made = zip(self.text, self.tokens, strict=True)
            self.at, self.tokens = start, [Fraction(k) if t == index else x for t, x in made]
            term = self.expression(2)
            if k <= high:
                total = self.checked(total * term if token == "Π" else total + term)
        return total

    def checked(self, x: Any) -> Any:
        """`x`, if it is within the bounds; what is real up to rounding becomes so."""
        self.steps, bits = self.steps + 1, 0
        x = Fraction(x) if isinstance(x, int) else x
        if isinstance(x, Fraction):
            bits = x.numerator.bit_length() + x.denominator.bit_length()
        elif isinstance(x, _INEXACT):
            self.steps += 10
            x = x.real if abs(x.imag) <= abs(x.real) * EPS else x
            if MP.isnan(x) or (x.imag and self.real):
                raise ValueError
            bits = 4 * abs(MP.mag(x)) if x and not MP.isinf(x) else 0
        elif isinstance(x, np.ndarray):
            x = np.vectorize(self.checked, otypes=[object])(x)
        self.steps += bits // 512
        if self.steps > MAX_STEPS or bits > 4 * MAX_BITS:
            raise OverflowError
        return x

    def power(self, x: Any, y: Any) -> Any:
        """Exact where it can be; an odd root of a negative number is the real one."""
        if isinstance(x, np.ndarray) and y in range(1, 10):
            return np.linalg.matrix_power(x, int(y))
        if not (isinstance(x, _NUMBERS) and isinstance(y, _NUMBERS)):
            raise TypeError
        if x == 0:
            return Fraction(0) if MP.re(y) > 0 else 1 / Fraction(0)
        if isinstance(x, Fraction) and isinstance(y, Fraction) and y.denominator == 1:
            if (x.numerator.bit_length() + x.denominator.bit_length()) * abs(y) > MAX_BITS:
                raise OverflowError
            return x ** int(y)
        if not x.imag and x < 0:
            if isinstance(y, Fraction) and y.denominator % 2:
                return (-1) ** y.numerator * self.power(-x, y)
            if self.real:
                raise ValueError
        x, y = MP.convert(x), MP.convert(y)
        if MP.isinf(x) or MP.isinf(y) or abs(y) * (abs(MP.mag(x)) + 1) > MAX_BITS:
            raise OverflowError
        return x**y


def read(found: tuple[str, ...], marks: set[str], point: int, bare: bool, scales: Any) -> Any:
    """Everything, as one shape; with ±, what it is with + and what with -."""
    shapes: list[Any] = []
    for sign in "+-" if {*found} & {*"±∓"} else "+":
        made, scale = world(found, marks, point, bare, sign), scales.setdefault(sign, {})
        reader = Reader(found, made, "i" not in marks, scale)
        cells = reader.cells(";", ",")
        if reader.peek() or not cells:
            raise SyntaxError
        shapes.append(cells[0] if len(cells) == 1 else unordered(cells))
    return shapes[0] if len(shapes) == 1 else unordered(shapes, True)

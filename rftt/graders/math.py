r"""The grader: is a response's final answer the gold one? (the paper's rule-based outcome reward)

`extract` finds the answer, `tokens` gives it one spelling, `parse` takes it apart, a `World` works
it out with numbers for names and units: two answers are the same if they are at 12 fixed points.
Departures from other graders: nothing is simplified, and every step is bounded, so it is called
inline, with no worker and no time-out; a verdict depends on nothing but its arguments.
"""

import ast
import functools
import math
import operator
import re
import zlib
from typing import Any, NamedTuple

import mpmath

from rftt.graders.latex import MAX_CHARS, NAME, NAMES, UNIT, pointed, tokens, words
from rftt.types import UserError

MAX_DEPTH, MAX_ITEMS, MAX_STEPS, MAX_BITS, POINTS = 150, 60, 5_000, 2_150, 12
MP = mpmath.MPContext()
MP.dps = 700  # what can be written out is exact; set once and only read, so threads may share it
EPS = MP.mpf(10) ** -650
_NO_MATHS = (SyntaxError, TypeError, ValueError, LookupError, AssertionError, AttributeError)
for _constant in (MP.pi, MP.e, MP.ln2, MP.ln10):
    _constant(prec=8_000)  # kept by mpmath: no thread will replace digits that another is reading


class Verdict(NamedTuple):
    correct: bool
    extracted: str | None
    answer_form: str  # `canonical` form of the extracted answer, and of the gold answer
    gold_form: str
    rule: str  # same text, value, words, time, copied, too big, no answer or no gold


# 1. Finding the answer

_INSIDE = r"(?:[^{}\\]|\\.)*+"
for _ in range(12):  # braces within braces
    _INSIDE = rf"(?:[^{{}}\\]|\\.|\{{{_INSIDE}\}})*+"
_HEAD = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BOX = rf"(?:{_HEAD.pattern}(?:\{{({_INSIDE})\}}|([\w.,+-]*\w)))"
_FILL = r"(?:[\s$]|\\[()\[\],;!]|\\q?quad|\b[A-Za-z](?:_\w)?\s*=)*+"  # also x =
_JOINT = rf"{_FILL}(?:,|;|and|or|\\text\s*\{{\s*(?:and|or)\s*\}}){_FILL}"
_RUN = re.compile(rf"(?s){_BOX}(?:{_JOINT}{_BOX})*+")
_SAID = re.compile(r"(?i)answer(?:.*\bis\b|[^:\n]*:)[*\s:]*(\S.*?)(?:\.\s|\.?$|\s*<[|/])", re.M)
_LAST = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def _boxed(text: str) -> str | None:
    """The last box, if it is finished; boxes joined by a comma, `and` or `or` are one list."""
    runs = [*_RUN.finditer(text)]
    if not runs or _HEAD.search(text, runs[-1].end()):
        return None
    parts = [(box[1] or box[2] or "").strip() for box in re.finditer(f"(?s){_BOX}", runs[-1][0])]
    return ", ".join(_boxed(part) or part for part in parts) if all(parts) else None


def extract(response: str, answer_format: str = "boxed") -> str | None:
    """The final answer after the last `<output>`; an unfinished box is no answer in any format.

    `auto` takes a box, else `#### 18`, else "the answer is 18", else the last formula or number.
    """
    if answer_format not in ("boxed", "gsm8k", "auto"):
        raise UserError(f"answer_format={answer_format!r}: use boxed, gsm8k or auto")
    text = re.sub(r"I hope it is correct\.?", "", response.rsplit("<output>", 1)[-1])
    if answer_format == "boxed" or (answer_format == "auto" and _HEAD.search(text)):
        return _boxed(text)
    if "####" in text or answer_format == "gsm8k":
        return (text.split("####")[1:] or [""])[-1].strip().split("\n")[0] or None
    last = text[-4 * MAX_CHARS :].strip().rpartition("\n")[2]
    found = _SAID.findall(text[-4 * MAX_CHARS :])
    return (found or ([last] if " " not in last else _LAST.findall(last)) or [""])[-1] or None


def parse_gold(gold: str) -> str | None:
    """Final answer of a gold field: a final answer, a solution with a box, or GSM8K's `#### 18`."""
    return _boxed(gold) or (extract(gold, "gsm8k") if "####" in gold else gold.strip() or None)


# 2. What is known


def _whole(x: Any) -> int:
    if x != MP.floor(x) or abs(x) > 5000:
        raise OverflowError
    return int(x)


def _power(x: Any, y: Any) -> Any:
    if abs(y) > MAX_BITS:
        raise OverflowError
    if isinstance(x, MP.matrix):
        return x ** _whole(y)
    root = 1 / y if y else y
    odd = abs(root - MP.nint(root)) < EPS and MP.nint(root) % 2
    return -((-x) ** y) if odd and not x.imag and x < 0 else x**y  # the real odd root


# fmt: off
_SIZES = {"%": MP.mpf(1) / 100, "°": MP.pi / 180, '"unit"': MP.mpf(1)}
_BASES = {  # 3.5 kg are 3500 g
    '"kg"': ('"g"', 1000), '"km"': ('"m"', 1000), '"cm"': ('"m"', MP.mpf(1) / 100),
    '"mm"': ('"m"', MP.mpf(1) / 1000), '"h"': ('"s"', 3600), '"min"': ('"s"', 60),
    '"day"': ('"s"', 86400), '"ft"': ('"in"', 12), '"cent"': ('"dollar"', MP.mpf(1) / 100),
}
_CONSTANTS: dict[str, Any] = {"π": +MP.pi, "e": +MP.e, "i": MP.j, "∞": MP.inf,
                              "10^6": MP.mpf(10**6), "∅": ("{}", [])}
_DOES: dict[Any, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: _power,
    ast.Div: operator.truediv, ast.USub: operator.neg, ast.UAdd: operator.pos,
    **{
        name: getattr(MP, name.replace("arc", "a"))
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin",
                     "arccos", "arctan", "exp", "ln")
    },
    "log": lambda *x: MP.ln(x[-1]) / MP.ln([10, *x][-2]), "lg": MP.log10,
    "gcd": lambda *n: math.gcd(*map(_whole, n)), "lcm": lambda *n: math.lcm(*map(_whole, n)),
    "min": min, "max": max, "||": abs, "⌊⌋": MP.floor, "⌈⌉": MP.ceil, "frac": operator.truediv,
    "√": lambda *x: _power(x[-1], 1 / MP.mpf([2, *x][-2])),
    "binom": lambda n, k: math.comb(_whole(n), _whole(k)), "!": lambda n: math.factorial(_whole(n)),
    "_": lambda n, base: ("_", [MP.mpf(int(str(int(n)), int(base)))]),  # 52_8 is not 42
    "⦃⦄": lambda *x: _union(x, distinct=True),
}


# 3. Taking it apart

_KEY, _FLAT = r"[a-z]\d+", r"[^([{⦃⟦⌊⌈)\]}⦄⟧⌋⌉|]*"  # what has been read; text without brackets
_POWER = rf"(?: \^ {_KEY})?+"
_REDUCTIONS = [  # each becomes a key, from inside to outside, until none is left
    rf"(?P<kind>frac|binom) (?P<a>{_KEY}) (?P<b>{_KEY})",
    r"(?P<kind>√) (?P<a>s\d+)? ?(?P<b>[a-rt-z]\d+)",
    rf"(?P<a>{_KEY}) (?P<kind>!)",
    rf"(?P<kind>{NAMES})(?P<power> \^ {_KEY})?(?: _ (?P<a>{_KEY}))?"
    rf" (?P<b>[bw]\d+|{_KEY}{_POWER}(?: {_KEY}{_POWER})*+(?! \^))",  # sin (x), or sin 2 x ^ 2
    rf"(?P<kind>[ΣΠ]) _ (?P<a>b\d+) \^ (?P<b>{_KEY}) (?P<c>[^-+,=<>≤≥([{{⦃⟦|⌊⌈]++)(?![([{{⦃⟦|⌊⌈])",
    rf"(?P<a>{_KEY}) (?P<kind>_) (?P<b>{_KEY})",
    rf"(?P<open>[(\[{{⦃⟦⌊⌈])(?P<rows>{_FLAT})(?P<close>[)\]}}⦄⟧⌋⌉])",
    rf"(?P<open>\|)(?P<rows>{_FLAT})(?P<close>\|)",
]
_SIGNS = {*"([{⦃⟦⌊⌈)]}⦄⟧⌋⌉|+-·/^!=<>≤≥,&¶_√ΣΠ", "frac", "binom", *NAMES.split("|")}
_NAMED = re.compile(r"[ ,]*[vw]\d+(?:[ ,*/]+[vw]\d+)*[ ,]*")  # x, AB, A/B, (p, q) may explain
# fmt: on


def _rows(text: str) -> list[list[list[str]]]:
    """Rows of cells of a text without brackets; x = 5 is a cell of three texts, 2 x is 2 · x."""
    text = re.sub(r"(?<=\d) (?=[a-z])", " * ", text).replace("·", "*").replace("^", "**")
    rows = [re.split("[,&]", row) for row in text.split("¶") if row.strip()]
    return [[re.split("([=<>≤≥])", cell) for cell in row if cell.strip()] for row in rows]


@functools.lru_cache(1000)
def parse(found: tuple[str, ...]) -> tuple[list[list[list[str]]], dict[str, tuple[str, Any]]]:
    """Cells, and what the keys in them stand for: a number, name, unit, bracket or function."""
    parts: dict[str, tuple[str, Any]] = {}

    def key(letter: str, kind: str, of: Any) -> str:
        parts[name := f"{letter}{len(parts)}"] = (kind, of)
        return name

    keys = {token: token for token in _SIGNS}
    for before, token in zip(("", *found), found, strict=False):
        if token in _CONSTANTS or token[0] in ".0123456789":
            keys[token] = key("n", "number", _CONSTANTS.get(token) or MP.mpf(token))
        elif UNIT.fullmatch(token) and (
            token in '"dollar""euro""pound"' or re.search(r'[\w)}⦄⟧"°%/|]$', before)
        ):
            keys[token] = key("u", "unit", token)
        elif token not in keys and NAME.fullmatch(token):
            keys[token] = key("v", "name", token)
        elif token not in keys:
            raise SyntaxError
    text = " ".join(keys[token] for token in found)
    while m := next(filter(None, (re.search(pattern, text) for pattern in _REDUCTIONS)), None):
        part = m.groupdict("")
        if "open" in part:
            letter = "s" if m["open"] == "[" else "w" if _NAMED.fullmatch(m["rows"]) else "b"
            new = key(letter, m["open"] + m["close"], _rows(m["rows"]))
        else:
            new = key("f", m["kind"], [_rows(part[name])[0] for name in "abc" if part.get(name)])
        text = text[: m.start()] + new + part.get("power", "") + text[m.end() :]
    return _rows(text), parts


# 4. Working it out


def _opened(shape: Any) -> tuple[str, list[Any]]:
    """A shape is a number, a matrix or this: (kind, parts), {} in any order, = of an equation."""
    if isinstance(shape, MP.matrix):
        return "()" if shape.cols == 1 else f"{shape.rows}", [*shape]
    return shape if isinstance(shape, tuple) else ("", [shape])


def _union(shapes: Any, distinct: bool) -> Any:
    """Sets in lists are flattened; repeated numbers are dropped from sets only."""
    kept: list[Any] = []
    for kind, parts in map(_opened, shapes):
        inner = parts if kind == "" or (kind == "{}" and parts) else [(kind, parts)]
        kept += [part for part in inner if part not in kept or not (kind or distinct)]
    if len(kept) > MAX_ITEMS:
        raise OverflowError
    return "{}", kept


class World:
    """What an answer is worth when its names and units are numbers."""

    def __init__(self, found: tuple[str, ...], marks: set[str], bare: bool) -> None:
        self.rows, self.parts = parse(found)
        self.marks, self.bare = marks, bare  # tokens of both answers; are units worth 1?
        self.scales, self.bound = {}, {}  # differences at the first point; indices of sums
        self.varied = False  # has a name been met, so that points differ?

    def read(self, point: int) -> Any:
        """The whole answer as one shape."""
        self.point, self.depth, self.steps = point, 0, 0
        shapes = [self.said(cell) for row in self.rows for cell in row]
        if not shapes:
            raise SyntaxError
        return shapes[0] if len(shapes) == 1 else _union(shapes, distinct=False)

    def said(self, cell: list[str]) -> Any:
        """x = 5 says 5, x > 2 the interval (2, ∞); other equations are only equal to equations."""
        sides = [self.worth(ast.parse(side.strip(), mode="eval").body) for side in cell[::2]]
        named, signs = [_NAMED.fullmatch(side) for side in cell[::2]], "".join(cell[1::2])
        if not signs:
            return sides[0]
        if set(signs) == {"="}:
            value = sides[-1] if named[0] else sides[0] if named[-1] else None
            if not all(isinstance(side, MP.mpf | MP.mpc) for side in sides):
                return "=", [value, None]
            difference = sides[-1] - sides[0]
            return "=", [value, difference / self.scales.setdefault(id(cell), difference)]
        if signs[0] in ">≥":  # turned round
            signs = signs[::-1].translate(str.maketrans(">≥<≤", "<≤>≥"))
            sides, named = sides[::-1], named[::-1]
        if len(sides) == 2:  # x < 2 is -∞ < x < 2
            sides = [-MP.inf, *sides] if named[0] else [*sides, MP.inf]
            signs, named = ("<" + signs, [None, *named]) if named[0] else (signs + "<", named)
        if len(sides) != 3 or not named[1] or not set(signs) <= {*"<≤"}:
            raise SyntaxError
        return "(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"], [sides[0], sides[2]]

    def worth(self, tree: ast.AST) -> Any:
        """Within bounds; what is real up to rounding becomes so."""
        self.steps, self.depth = self.steps + 1, self.depth + 1
        if self.steps > MAX_STEPS or self.depth > MAX_DEPTH:
            raise OverflowError
        match tree:
            case ast.Name(key) if key in self.parts:
                x = self.bound[key] if key in self.bound else self.part(*self.parts[key])
            case ast.UnaryOp(op, operand) if type(op) in _DOES:
                x = _DOES[type(op)](self.worth(operand))
            case ast.BinOp(left, op, right) if type(op) in _DOES:
                x = _DOES[type(op)](self.worth(left), self.worth(right))
            case _:
                raise SyntaxError
        self.depth -= 1
        if isinstance(x, tuple | MP.matrix):
            return x
        x = MP.convert(x)
        x = x.real if abs(x.imag) <= abs(x.real) * EPS else x
        if MP.isnan(x) or (x.imag and "i" not in self.marks):
            raise ValueError
        if x and not MP.isinf(x) and abs(MP.mag(x)) > MAX_BITS:
            raise OverflowError
        return x

    def part(self, kind: str, of: Any) -> Any:
        if kind in ("number", "name", "unit"):
            return of if kind == "number" else self.drawn(kind, of)
        if kind in "ΣΠ":  # term by term
            [[[index, _, first]]], ([_], last, body) = self.parts[of[0][0][0]][1], of
            low, high, total = self.said([first]), self.said(*last), MP.mpf(kind == "Π")
            for k in range(_whole(low), _whole(high) + 1):
                self.bound[index.strip()] = MP.mpf(k)
                total = _DOES[ast.Mult if kind == "Π" else ast.Add](total, self.said(*body))
            return total
        rows = [[self.said(cell) for cell in row] for row in of]
        cells = [x for row in rows for x in row]
        if kind == "⟦⟧":
            return MP.matrix(rows)
        if kind in ("()", "[]", "{}", "(]", "[)"):
            kind = "()" if len(cells) > 2 and kind == "[]" else kind
            return cells[0] if len(cells) == 1 else (kind, cells)
        if kind in NAMES.split("|"):
            self.steps += 10
            cells = [y for x in cells for y in (x[1] if isinstance(x, tuple) else [x])]
            if any(abs(x) > 10**300 for x in cells):
                raise OverflowError
        return _DOES[kind](*cells)

    def drawn(self, kind: str, token: str) -> Any:
        """A number for a name or unit, the same in every process; the last four may be negative."""
        if kind == "unit" and (self.bare or token in _SIZES):
            return MP.mpf(1) if self.bare else _SIZES[token]
        self.varied, (token, size) = True, _BASES.get(token, (token, 1))
        drawn = zlib.crc32(f"{re.sub('[{}]', '', token)}|{self.point}".encode())
        if token[0] in "kmn" or (self.marks & {*"!⌊⌈ΣΠ", "binom"} and token[0] not in "xyzt"):
            return MP.mpf(1 + drawn % 19)  # whole
        sign = -1 if self.point >= POINTS - 4 and drawn & 1 else 1
        return sign * MP.mpf(1 + drawn // 2 % 1800) / 256 * size


# 5. Comparing


def equal(a: Any, b: Any) -> bool:
    """Are two shapes the same answer, as far as one point can tell?"""
    (kind, parts), (other, others) = _opened(a), _opened(b)
    if "=" in (kind, other):  # what is said, or of two equations the differences
        both = kind == other
        return equal(parts[both] if kind == "=" else a, others[both] if other == "=" else b)
    if "{}" in (kind, other):
        rest = [*others] if other == "{}" else [b]
        for part in parts if kind == "{}" else [a]:
            if (at := next((i for i, one in enumerate(rest) if equal(part, one)), -1)) < 0:
                return False
            del rest[at]
        return not rest
    if kind or other:
        return kind == other and len(parts) == len(others) and all(map(equal, parts, others))
    if a is None or b is None:
        return False
    return a == b or abs(a - b) < EPS * ((a and b and max(abs(a), abs(b))) or 1)


def _agree(a: tuple[str, ...], b: tuple[str, ...], bare: bool) -> bool:
    """Are two answers equal at every point where both have a value?"""
    worlds, agreed = [World(found, {*a, *b}, bare) for found in (a, b)], 0
    for point in range(POINTS):
        try:
            x, y = (world.read(point) for world in worlds)
        except (ZeroDivisionError, ValueError):
            continue
        if not equal(x, y):
            return False
        if not any(world.varied for world in worlds):
            return True
        agreed += 1
    return agreed >= 4


def _compare(a: str, b: str) -> tuple[bool, str]:
    """(the same answer?, the rule that decided)"""
    try:
        found = tokens(pointed(a, b)), tokens(pointed(b, a))
        if found[0] == found[1]:
            return found[0] != (), "same text"
        if all(re.fullmatch(r"\s*\d?\d:[0-5]\d\D*", text) for text in (a, b)):
            return False, "time"  # 2:30 is not 1:15
        units = [any(map(UNIT.fullmatch, text)) for text in found]  # 5 cm is 5, but not 5 m
        return _agree(*found, False) or (units[0] != units[1] and _agree(*found, True)), "value"
    except OverflowError:
        return a.strip() == b.strip() != "", "too big"
    except _NO_MATHS:  # the last two are of mpmath's matrices
        return words(a) == words(b) != "", "words"


def same_answer(a: str, b: str) -> bool:
    """Do two extracted answers agree? (for voting)"""
    return _compare(a, b)[0]


def canonical(answer: str) -> str:
    """A key that equal answers share where possible: 40 digits at the first point, or words."""
    try:
        kind, parts = _opened(World(tokens(answer), {*tokens(answer)}, True).read(0))
        forms = [str(MP.nstr(part, 40)) for part in parts]
        return f"{kind}{sorted(forms)}" if kind == "{}" else forms[0] if kind in "=" else f"{forms}"
    except (ArithmeticError, *_NO_MATHS):
        return words(answer)


def grade(
    response: str, gold: str, question: str | None = None, answer_format: str = "boxed"
) -> Verdict:
    """Is the response's final answer the gold answer? A formula of the question is no answer."""
    wanted, found = parse_gold(gold), extract(response, answer_format)
    if wanted is None or found is None:
        return Verdict(False, found, "", "", "no gold" if wanted is None else "no answer")
    same, rule = _compare(found, wanted)
    drop = re.compile(r"\s|\\[,;!]|\\left|\\right|\$|\.$")
    shown, other, asked = (drop.sub("", text) for text in (found, wanted, question or ""))
    own = shown == other or re.fullmatch(r"-?\d+|[A-Za-z]+", shown)
    if same and not own and re.search(rf"(?<![0-9.]){re.escape(shown)}(?![0-9])", asked):
        same, rule = False, "copied"
    return Verdict(same, found, canonical(found), canonical(wanted), rule)


if __name__ == "__main__":
    from rftt.graders.audit import main

    main()

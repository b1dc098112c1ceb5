r"""Grade answers by rules: the outcome reward of arXiv 2502.13389.

1. `extract` finds the final answer of a response.
2. `tokens` (latex.py) gives every notation one spelling.
3. `parse` replaces brackets, functions and sums by keys, from inside to outside. Python's `ast`
   parses the sums, products and powers that remain. No text is ever executed.
4. `Evaluator` computes an answer with numbers in place of its names and units.
5. `compare` evaluates both answers at 12 fixed points. Equal answers agree wherever both have a
   value.

Nothing is simplified symbolically and every step is bounded. The grader therefore needs no worker
and no timeout, and a verdict depends on nothing but its arguments.
"""

import ast
import functools
import math
import operator
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mpmath

from rftt.graders.latex import (
    FUNCTION,
    FUNCTIONS,
    MAX_CHARS,
    NAME,
    UNIT,
    decimal_point,
    tokens,
    words,
)
from rftt.types import UserError

# ---- Bounds: beyond one of them, only equal text is equal ----

MAX_DEPTH = 100  # of nested expressions. A level takes at most seven frames of Python's stack.
MAX_ITEMS = 60  # of a set
MAX_STEPS = 5_000  # operations per evaluation
MAX_BITS = 2_150  # of a number, and the largest exponent
MAX_WHOLE = 5_000  # for factorials, binomial coefficients and the limits of a sum
POINTS = 12
MIN_AGREED = 4  # points at which both answers must have a value

# 700 digits represent every whole number within MAX_BITS exactly. The context is never changed
# after this line, so threads may share it.
MP = mpmath.MPContext()
MP.dps = 700
TOLERANCE = MP.mpf(10) ** -650
for _constant in (MP.pi, MP.e, MP.ln2, MP.ln10):
    _constant(prec=8_000)  # mpmath caches constants; compute them before any thread starts

# Exceptions that parsing or evaluating raises for a text that is not mathematics.
_NOT_MATHS = (SyntaxError, TypeError, ValueError, LookupError, AssertionError, AttributeError)


class Verdict(NamedTuple):
    """The result of grading one response."""

    correct: bool
    extracted: str | None
    """Final answer of the response, as written. None if there is none."""
    answer_form: str
    """Canonical form of the extracted answer."""
    gold_form: str
    """Canonical form of the gold answer."""
    rule: str
    """Rule that decided: same text, value, words, time, copied, too big, no answer or no gold."""


# ---- 1. Find the answer ----

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"(?s)\\.|[{}]")  # an escaped brace is part of the answer
_UNBRACED = re.compile(r"[\w.,+-]{0,40}\w")
_FILLER = r"(?:[\s$]|\\[()\[\],;!]|\\q?quad|\b[A-Za-z](?:_\w)?\s*=)*+"  # layout and "x ="
_JOINT = re.compile(rf"\A{_FILLER}(?:,|;|and|or|\\text\s*\{{\s*(?:and|or)\s*\}}){_FILLER}")
_MAX_JOINT = 200  # characters between two boxes of one list
_ANSWER = re.compile(r"(?i)answer")
_IS = re.compile(r"(?i)\bis\b")
_SENTENCE_END = re.compile(r"\.\s|\n|<[|/]")
_FORMULA_OR_NUMBER = re.compile(
    r"\$[^$]+\$"
    r"|\\\((?:(?!\\[()]).)+\\\)"
    r"|\\\[(?:(?!\\[\[\]]).)+\\\]"
    r"|-?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
)


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def _closing_braces(text: str) -> dict[int, int]:
    """Map the position of every opening brace to that of its partner."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            opened.append(found.start())
        elif found[0] == "}" and opened:
            closing[opened.pop()] = found.start()
    return closing


def _finished_boxes(text: str) -> list[_Box]:
    """Return the boxes that have content and an end. A box within a box is part of its content."""
    closing = _closing_braces(text)
    boxes: list[_Box] = []
    for head in _BOX.finditer(text):
        start, inside = head.span()
        if boxes and start < boxes[-1].end:
            continue
        if inside in closing:
            end = closing[inside]
            boxes.append(_Box(start, end + 1, text[inside + 1 : end].strip()))
        elif unbraced := _UNBRACED.match(text, inside):  # \boxed 7
            boxes.append(_Box(start, unbraced.end(), unbraced[0]))
    return boxes


def _boxed(text: str) -> str | None:
    r"""Return the content of the last box, or of the last boxes if they form a list.

    >>> _boxed(r"\boxed{5} is wrong, so \boxed{7} or $\boxed{8}$")
    '7, 8'
    >>> _boxed(r"\boxed{7}, no: \boxed{8")
    """
    boxes = _finished_boxes(text)
    if not boxes or _BOX.search(text, boxes[-1].end):
        return None
    contents = [boxes[-1].content]
    for box, following in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[box.end : following.start]
        if len(between) > _MAX_JOINT or not _JOINT.fullmatch(between):
            break
        contents.insert(0, box.content)
    if not all(contents):
        return None
    return ", ".join(_innermost(content) for content in contents)


def _innermost(content: str) -> str:
    # A longer content is beyond the bounds anyway, and this bounds the recursion.
    return (len(content) <= MAX_CHARS and _boxed(content)) or content


def _after_hashes(text: str) -> str | None:
    """Return the line after the last `####`, GSM8K's mark.

    >>> _after_hashes("so 18\\n#### 1,018")
    '1,018'
    """
    _, mark, rest = text.rpartition("####")
    return (rest.strip().split("\n")[0] or None) if mark else None


def _after_answer_is(text: str) -> str | None:
    """Return what the last sentence with `answer … is` or `answer …:` states.

    >>> _after_answer_is("The answer is $3.5$. We checked it.")
    '$3.5$'
    """
    for found in reversed(list(_ANSWER.finditer(text))):
        line = text[found.end() :].split("\n", 1)[0]
        verbs = list(_IS.finditer(line))
        colon = line.find(":") + 1
        if not verbs and not colon:
            continue
        start = found.end() + (verbs[-1].end() if verbs else colon)
        statement = text[start:].lstrip("*: \t\n")
        statement = _SENTENCE_END.split(statement, maxsplit=1)[0].rstrip().removesuffix(".")
        if statement:
            return statement
    return None


def extract(response: str, answer_format: str = "boxed") -> str | None:
    """Return the final answer after the last `<output>`, or None.

    `boxed` reads the last box and `gsm8k` what follows `####`. `auto` reads a box if there is one,
    else `####`, else "the answer is 18", else the last formula or number. An unfinished box is not
    an answer in any format.
    """
    if answer_format not in ("boxed", "gsm8k", "auto"):
        raise UserError(f"`answer_format` must be boxed, gsm8k or auto, got {answer_format!r}.")
    text = response.rpartition("<output>")[2]
    text = text.replace("I hope it is correct.", "").replace("I hope it is correct", "")
    if answer_format == "boxed" or (answer_format == "auto" and _BOX.search(text)):
        return _boxed(text)
    if answer_format == "gsm8k" or "####" in text:
        return _after_hashes(text)
    end = text[-4 * MAX_CHARS :]
    if stated := _after_answer_is(end):
        return stated
    last_line = end.strip().rpartition("\n")[2]
    if " " not in last_line:
        return last_line or None
    candidates = _FORMULA_OR_NUMBER.findall(last_line)
    return candidates[-1] if candidates else None


def parse_gold(gold: str) -> str | None:
    """Return the answer in a gold field: an answer, a solution with a box, or GSM8K's `#### 18`."""
    return _boxed(gold) or (extract(gold, "gsm8k") if "####" in gold else gold.strip() or None)


# ---- Values ----

Number = Any  # a real or complex number of mpmath
Value = Any  # a number, a matrix of mpmath, or one of the classes below


@dataclass(frozen=True)
class Tuple:
    """Values in order: a point, a vector, an interval, or a matrix, which has rows as items."""

    items: tuple[Value, ...]
    brackets: str = "()"
    """What surrounds them: "[]", "[)" or "(]" of an interval, "⟦⟧" of a matrix, else "()". An open
    interval is spelled like a pair. A matrix of one column is a vector."""


@dataclass(frozen=True)
class Set:
    """Values in any order: a set, or answers that are separated by commas."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class Numeral:
    """A number in a stated base: 52_8 is not the answer 42."""

    value: int


@dataclass(frozen=True)
class Equation:
    """An equation, which may state the value of a name."""

    value: Value | None
    """The side opposite a name: x = 5 has the value 5. So has 2 + 3 = 5, which is true."""
    difference: Number | None
    """Right side minus left side, relative to the first point: 2x = 2y is the equation x = y."""


_STRUCTURES = (Tuple, Set, Numeral, Equation, MP.matrix)


def _is_number(value: Value) -> bool:
    return isinstance(value, MP.mpf | MP.mpc)


def _settled(value: Value) -> Value:
    """Return a matrix of mpmath, which is for arithmetic, as a value to compare."""
    if not isinstance(value, MP.matrix):
        return value
    if value.cols == 1:
        return Tuple(tuple(value))
    return Tuple(tuple(Tuple(tuple(row)) for row in value.tolist()), "⟦⟧")


def _union(values: Sequence[Value], distinct_numbers: bool) -> Set:
    """Collect values and the elements of sets among them; drop repeated ones.

    Repeated numbers stay in a list that is not a set: the roots -2, -2 are not -2.
    """
    kept: list[Value] = []
    for value in map(_settled, values):
        elements = value.items if isinstance(value, Set) and value.items else (value,)
        repeatable = _is_number(value) and not distinct_numbers
        kept += [element for element in elements if repeatable or element not in kept]
    if len(kept) > MAX_ITEMS:
        raise OverflowError(f"a set may have {MAX_ITEMS} items")
    return Set(tuple(kept))


# ---- Arithmetic ----


def _whole(x: Number) -> int:
    if x != MP.floor(x) or abs(x) > MAX_WHOLE:
        raise OverflowError(f"not a whole number up to {MAX_WHOLE}")
    return int(x)


def _power(x: Value, y: Number) -> Value:
    """Return x**y. An odd root of a negative number is the real one: (-8)^(1/3) = -2."""
    if abs(y) > MAX_BITS:
        raise OverflowError(f"an exponent may be {MAX_BITS}")
    if isinstance(x, MP.matrix):
        return x ** _whole(y)
    if y and not x.imag and x < 0:
        degree = 1 / y
        nearest = MP.nint(degree)
        if abs(degree - nearest) < TOLERANCE and nearest % 2:
            return -((-x) ** y)
    return x**y


def _root(radicand: Value, degree: Number = 2) -> Value:
    return _power(radicand, 1 / MP.mpf(degree))


def _log(x: Number, base: Number = 10) -> Number:
    return MP.ln(x) / MP.ln(base)


def _numeral(digits: Number, base: Number) -> Numeral:
    return Numeral(int(str(int(digits)), int(base)))


_OPERATORS: dict[type[ast.AST], Callable[..., Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Value]] = {
    **{
        name: getattr(MP, name)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "ln")
    },
    "arcsin": MP.asin,
    "arccos": MP.acos,
    "arctan": MP.atan,
    "log": _log,
    "lg": MP.log10,
    "min": min,
    "max": max,
    "gcd": lambda *numbers: math.gcd(*map(_whole, numbers)),
    "lcm": lambda *numbers: math.lcm(*map(_whole, numbers)),
    # Notation that is parsed like a function
    "frac": operator.truediv,
    "binom": lambda n, k: math.comb(_whole(n), _whole(k)),
    "√": _root,
    "!": lambda n: math.factorial(_whole(n)),
    "_": _numeral,
    "||": abs,
    "⌊⌋": MP.floor,
    "⌈⌉": MP.ceil,
}
_CONSTANTS: dict[str, Value] = {
    "π": +MP.pi,
    "e": +MP.e,
    "i": MP.j,
    "∞": MP.inf,
    "10^6": MP.mpf(10**6),
    "∅": Set(()),
}
_UNIT_VALUES = {"%": MP.mpf(1) / 100, "°": MP.pi / 180, '"unit"': MP.mpf(1)}
_BASE_UNITS: dict[str, tuple[str, Number]] = {
    # unit: (base unit, how many), so that 3.5 kg are 3500 g
    '"kg"': ('"g"', 1000),
    '"km"': ('"m"', 1000),
    '"cm"': ('"m"', MP.mpf(1) / 100),
    '"mm"': ('"m"', MP.mpf(1) / 1000),
    '"day"': ('"s"', 86400),
    '"h"': ('"s"', 3600),
    '"min"': ('"s"', 60),
    '"ft"': ('"in"', 12),
    '"cent"': ('"dollar"', MP.mpf(1) / 100),
}

# ---- 3. Parse (2 is in latex.py) ----


@dataclass(frozen=True)
class Cell:
    """The text between two commas: an expression, an equation or an inequality."""

    sides: tuple[ast.expr, ...]
    signs: str
    """The relations between the sides: "" for an expression, "<≤" for 1 < x ≤ 2."""
    named: tuple[bool, ...]
    """Whether a side consists of names only, so that the opposite side is its value."""


Rows = tuple[tuple[Cell, ...], ...]  # only a matrix has more than one row


@dataclass(frozen=True)
class Constant:
    """A numeral or a named constant, such as π."""

    token: str
    value: Value


@dataclass(frozen=True)
class Name:
    """A variable, for which numbers are drawn."""

    token: str


@dataclass(frozen=True)
class Unit:
    """A unit, such as a quoted word or %."""

    token: str


@dataclass(frozen=True)
class Bracket:
    """A pair of brackets and its contents."""

    brackets: str
    """The opening and the closing bracket: "()", "[)", "||", or "⟦⟧" of a matrix."""
    rows: Rows


@dataclass(frozen=True)
class Call:
    """A function with its arguments."""

    function: str
    """A name such as "sin", or notation that is parsed like a function, such as "frac" or "!"."""
    arguments: tuple[ast.expr, ...]
    """The main argument comes first: the radicand of a root, the number of a logarithm."""


Part = Constant | Name | Unit | Bracket | Call


class Parsed(NamedTuple):
    """A parsed answer: expressions over keys, and the meaning of every key."""

    rows: Rows
    parts: dict[str, Part]
    """Key in the expressions -> the part that it replaces."""


# The first letter of a key is its kind: n number, v name, u unit, f call, b bracket, s square
# bracket, w bracket of names.
_KEY = r"[a-z]\d++"
_FACTOR = rf"{_KEY}(?: \^ {_KEY})?+"
_OPEN = r"(\[{⦃⟦⌊⌈"
_CLOSE = r")\]}⦄⟧⌋⌉"
_FLAT = rf"(?P<rows>[^{_OPEN}{_CLOSE}|]*)"
_REDUCTIONS = tuple(
    re.compile(pattern)
    for pattern in (
        # Each match becomes one key. Groups a, b and c are the arguments of a call.
        rf"(?P<function>frac|binom) (?P<a>{_KEY}) (?P<b>{_KEY})",
        r"(?P<function>√) (?P<b>s\d++)? ?(?P<a>[a-rt-z]\d++)",  # √ [3] 8
        rf"(?P<a>{_KEY}) (?P<function>!)",
        # sin (x) ends at the bracket; sin 2 x ^ 2 ends with the product; sin ^ 2 x is a square.
        rf"(?P<function>{FUNCTION})(?P<power> \^ {_KEY})?(?: _ (?P<b>{_KEY}))?"
        rf" (?P<a>[bw]\d++|{_FACTOR}(?: {_FACTOR})*+(?! \^))",
        # Σ _ (k = 1) ^ n, up to the next sum or relation, once that has no brackets
        rf"(?P<function>[ΣΠ]) _ (?P<a>b\d++) \^ (?P<b>{_KEY})"
        rf" (?P<c>[^-+,=<>≤≥ΣΠ|{_OPEN}]++)(?![|ΣΠ{_OPEN}])",
        rf"(?P<a>{_KEY}) (?P<function>_) (?P<b>{_KEY})",  # 52_8
        rf"(?P<open>[{_OPEN}]){_FLAT}(?P<close>[{_CLOSE}])",
        rf"(?P<open>\|){_FLAT}(?P<close>\|)",
    )
)
_SIGNS = frozenset({*"([{⦃⟦⌊⌈)]}⦄⟧⌋⌉|+-·/^!=<>≤≥,&¶_√ΣΠ", "frac", "binom", *FUNCTIONS})
_PRODUCT = re.compile(r"(?<=\d) (?=[a-z])")
_SEPARATOR = re.compile("[,&]")
_RELATION = re.compile("([=<>≤≥])")
_BEFORE_UNIT = re.compile(r'[\w)}⦄⟧"°%/|]$')
_CURRENCIES = ('"dollar"', '"euro"', '"pound"')


def _expression(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def _only_names(text: str) -> bool:
    keys = text.replace(",", " ").replace("*", " ").replace("/", " ").split()
    return bool(keys) and all(key[0] in "vw" for key in keys)


def _cell(text: str) -> Cell:
    pieces = _RELATION.split(text)
    sides = pieces[::2]
    return Cell(
        sides=tuple(_expression(side) for side in sides),
        signs="".join(pieces[1::2]),
        named=tuple(_only_names(side) for side in sides),
    )


def _rows(text: str) -> Rows:
    """Parse a text without brackets; 2 x is 2 * x."""
    python = _PRODUCT.sub(" * ", text).replace("·", "*").replace("^", "**")
    rows = [_SEPARATOR.split(row) for row in python.split("¶") if row.strip()]
    return tuple(tuple(_cell(text) for text in row if text.strip()) for row in rows)


def _leaf(token: str, before: str) -> tuple[str, Part]:
    """Return the first letter of the key and the part of a token that follows `before`."""
    if token in _CONSTANTS:
        return "n", Constant(token, _CONSTANTS[token])
    if token[0] in ".0123456789":
        return "n", Constant(token, MP.mpf(token))
    if UNIT.fullmatch(token) and (token in _CURRENCIES or _BEFORE_UNIT.search(before)):
        return "u", Unit(token)
    if NAME.fullmatch(token):
        return "v", Name(token)
    raise SyntaxError(f"not a number, name or unit: {token}")


def _innermost_part(text: str) -> re.Match[str] | None:
    """Return the next text to replace by a key. It contains only keys and no unparsed text."""
    for pattern in _REDUCTIONS:
        if found := pattern.search(text):
            return found
    return None


@functools.lru_cache(1000)
def parse(answer: tuple[str, ...]) -> Parsed:
    """Parse tokens from inside to outside.

    \\frac{x + 1}{2} is "frac { v0 + n1 } { n2 }", then "frac b3 b4", then "f5".
    """
    parts: dict[str, Part] = {}

    def add(letter: str, part: Part) -> str:
        key = f"{letter}{len(parts)}"
        parts[key] = part
        return key

    keys: dict[str, str] = {}
    before = ""
    for token in answer:
        if token not in _SIGNS and token not in keys:
            keys[token] = add(*_leaf(token, before))
        before = token
    text = " ".join(keys.get(token, token) for token in answer)
    while found := _innermost_part(text):
        groups = found.groupdict("")
        if "rows" in groups:
            letter = "b"
            if groups["open"] == "[":
                letter = "s"
            elif _only_names(groups["rows"]):
                letter = "w"
            key = add(letter, Bracket(groups["open"] + groups["close"], _rows(groups["rows"])))
        else:
            arguments = [groups[name] for name in "abc" if groups.get(name)]
            key = add("f", Call(groups["function"], tuple(map(_argument, arguments))))
        text = text[: found.start()] + key + groups.get("power", "") + text[found.end() :]
    return Parsed(_rows(text), parts)


def _argument(text: str) -> ast.expr:
    ((cell,),) = _rows(text)
    return cell.sides[0]


# ---- 4. Evaluate ----

_WHOLE_MARKS = frozenset({*"!⌊⌈ΣΠ", "binom"})  # an answer with one is about whole numbers


class Evaluator:
    """Evaluates one answer with fixed numbers in place of its names and units."""

    def __init__(self, answer: tuple[str, ...], marks: set[str], units_are_one: bool) -> None:
        self.rows, self.parts = parse(answer)
        # Properties of both answers that are compared
        self.may_be_complex = "i" in marks
        self.about_whole_numbers = not marks.isdisjoint(_WHOLE_MARKS)
        self.units_are_one = units_are_one
        self.varies = False  # whether a number was drawn, so that points differ
        self.scales: dict[int, Number] = {}  # differences of equations at the first point
        self.indices: dict[str, Number] = {}  # the current indices of sums and products
        self.point = self.depth = self.steps = 0

    def at(self, point: int) -> Value:
        """Return the value of the whole answer. Cells that commas separate form a set."""
        self.point = point
        self.depth = self.steps = 0
        self.indices = {}
        values = [self._cell(cell) for row in self.rows for cell in row]
        if not values:
            raise SyntaxError("an answer has no cells")
        return values[0] if len(values) == 1 else _union(values, distinct_numbers=False)

    def _cell(self, cell: Cell) -> Value:
        sides = [self._value(side) for side in cell.sides]
        if not cell.signs:
            return sides[0]
        if set(cell.signs) == {"="}:
            return self._equation(cell, sides)
        return _inequality(cell, sides)

    def _equation(self, cell: Cell, sides: list[Value]) -> Equation:
        value = None
        if cell.named[0]:
            value = sides[-1]
        elif cell.named[-1]:
            value = sides[0]
        if not all(map(_is_number, sides)):
            return Equation(value, None)
        last = sides[-1]
        if value is None and all(abs(side - last) <= abs(last) * TOLERANCE for side in sides):
            return Equation(last, None)  # 24 + 40 = 64 is a calculation of 64
        difference = sides[-1] - sides[0]
        return Equation(value, difference / self.scales.setdefault(id(cell), difference))

    def _value(self, tree: ast.expr) -> Value:
        """Evaluate a sum, product or power of parts, within the bounds."""
        self.steps += 1
        self.depth += 1
        if self.steps > MAX_STEPS or self.depth > MAX_DEPTH:
            raise OverflowError("too many operations")
        match tree:
            case ast.Name(key) if key in self.indices:
                value = self.indices[key]
            case ast.Name(key) if key in self.parts:
                value = self._part(self.parts[key])
            case ast.UnaryOp(sign, operand) if type(sign) in _OPERATORS:
                value = _OPERATORS[type(sign)](self._value(operand))
            case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
                value = _OPERATORS[type(sign)](self._value(left), self._value(right))
            case _:
                raise SyntaxError("not a sum, product or power")
        self.depth -= 1
        return value if isinstance(value, _STRUCTURES) else self._bounded(MP.convert(value))

    def _bounded(self, number: Number) -> Number:
        """Round a negligible imaginary part away; reject what has no value or is too large."""
        if isinstance(number, MP.mpc):
            if abs(number.imag) <= abs(number.real) * TOLERANCE:
                number = number.real
            elif not self.may_be_complex:
                raise ValueError("no real value")
        if MP.isnan(number):
            raise ValueError("no value")
        if number and not MP.isinf(number) and abs(MP.mag(number)) > MAX_BITS:
            raise OverflowError(f"a number may have {MAX_BITS} bits")
        return number

    def _part(self, part: Part) -> Value:
        match part:
            case Constant(_, value):
                return value
            case Name(token):
                return self._drawn(token)
            case Unit(token):
                return self._unit(token)
            case Bracket():
                return self._bracket(part)
            case Call("Σ" | "Π"):
                return self._sum(part)
            case Call():
                return self._call(part)

    def _bracket(self, part: Bracket) -> Value:
        rows = []
        for row in part.rows:
            rows.append([self._cell(cell) for cell in row])
        if part.brackets == "⟦⟧":
            return MP.matrix(rows)
        values = [value for row in rows for value in row]
        if part.brackets == "⦃⦄":
            return _union(values, distinct_numbers=True)
        if part.brackets in ("||", "⌊⌋", "⌈⌉"):
            return _FUNCTIONS[part.brackets](*values)
        return _listed(part.brackets, values)

    def _call(self, call: Call) -> Value:
        values = [self._value(argument) for argument in call.arguments]
        if call.function in FUNCTIONS:
            self.steps += 10
            values = _flattened(values)  # gcd(12, 18) has one argument, which is a pair
            if any(abs(value) > 10**300 for value in values):
                raise OverflowError("the argument of a function may be 10**300")
        return _FUNCTIONS[call.function](*values)

    def _sum(self, call: Call) -> Value:
        """Return a sum or product over an index, term by term."""
        lower, last, body = call.arguments
        index, first = index_and_first(self.parts, lower)
        start = _whole(self._value(first))
        stop = _whole(self._value(last))
        outer = self.indices
        total, combine = MP.mpf(0), operator.add
        if call.function == "Π":
            total, combine = MP.mpf(1), operator.mul
        for k in range(start, stop + 1):
            self.indices = {**outer, index: MP.mpf(k)}
            total = combine(total, self._value(body))
        self.indices = outer
        return total

    def _unit(self, token: str) -> Number:
        if self.units_are_one:
            return MP.mpf(1)
        if token in _UNIT_VALUES:
            return _UNIT_VALUES[token]
        base, size = _BASE_UNITS.get(token, (token, 1))
        # Within ⌊…⌋ or a binomial coefficient a unit must be whole, so a cm is not a part of a m.
        return self._drawn(base) if self.about_whole_numbers else self._drawn(base) * size

    def _drawn(self, token: str) -> Number:
        """Draw a number for a name or unit, the same one in every process."""
        self.varies = True
        name = token.replace("{", "").replace("}", "")  # x_{1} is x_1
        drawn = zlib.crc32(f"{name}|{self.point}".encode())
        # k, m and n are usually whole; x, y, z and t are usually not.
        if token[0] in "kmn" or (self.about_whole_numbers and token[0] not in "xyzt"):
            return MP.mpf(1 + drawn % 19)
        # Only the last four points may be negative. At positive points √(x^2) has the value x.
        negative = self.point >= POINTS - 4 and drawn % 2 == 1
        magnitude = MP.mpf(1 + drawn // 2 % 1800) / 256
        return -magnitude if negative else magnitude


def _flattened(values: list[Value]) -> list[Value]:
    flat: list[Value] = []
    for value in values:
        if isinstance(value, Tuple | Set):
            flat += value.items
        else:
            flat.append(value)
    return flat


def _listed(brackets: str, values: list[Value]) -> Value:
    """Return the value of cells in round, square or curly brackets."""
    if brackets not in ("()", "[]", "{}", "[)", "(]"):
        raise SyntaxError(f"brackets do not match: {brackets}")
    if len(values) == 1:
        return values[0]
    if brackets == "{}":
        return Set(tuple(values))
    if brackets == "()" or (brackets == "[]" and len(values) > 2):
        return Tuple(tuple(values))
    if len(values) != 2:
        raise SyntaxError("an interval has two ends")
    return Tuple(tuple(values), brackets)


def index_and_first(parts: dict[str, Part], lower: ast.expr) -> tuple[str, ast.expr]:
    """Return the key of the index and the first value from the bracket (k = 1) below a sum."""
    match parts[ast.unparse(lower)]:
        case Bracket(_, ((Cell((ast.Name(index), first), "="),),)):
            return index, first
    raise SyntaxError("a sum needs an index and a first value")


def _inequality(cell: Cell, sides: list[Value]) -> Value:
    """Return the interval of a named value: x > 2 is (2, ∞)."""
    signs, named = cell.signs, list(cell.named)
    if signs[0] in ">≥":  # 3 > x ≥ 1 is 1 ≤ x < 3
        signs = signs[::-1].translate(str.maketrans(">≥<≤", "<≤>≥"))
        sides = sides[::-1]
        named = named[::-1]
    if len(sides) == 2 and named[0]:  # x < 2 is -∞ < x < 2
        signs = "<" + signs
        sides = [-MP.inf, *sides]
        named = [False, *named]
    elif len(sides) == 2:  # 2 < x is 2 < x < ∞
        signs = signs + "<"
        sides = [*sides, MP.inf]
    if len(sides) != 3 or not named[1] or not set(signs) <= {"<", "≤"}:
        raise SyntaxError("not an inequality for one name")
    left = "[" if signs[0] == "≤" else "("
    right = "]" if signs[1] == "≤" else ")"
    return Tuple((sides[0], sides[2]), left + right)


# ---- 5. Compare ----


def equal(a: Value, b: Value) -> bool:
    """Return whether two values are equal, as far as one point can decide."""
    a, b = _settled(a), _settled(b)
    if isinstance(a, Equation) and isinstance(b, Equation):
        return equal(a.difference, b.difference)
    if isinstance(a, Equation):  # x = 5 is 5
        return equal(a.value, b)
    if isinstance(b, Equation):
        return equal(a, b.value)
    if a is None or b is None:
        return False
    if isinstance(a, Set) or isinstance(b, Set):
        return _same_items(a, b)
    if _is_number(a) and _is_number(b):
        return a == b or abs(a - b) < TOLERANCE * (max(abs(a), abs(b)) if a and b else 1)
    if isinstance(a, Tuple) and isinstance(b, Tuple):
        alike = a.brackets == b.brackets and len(a.items) == len(b.items)
        return alike and all(map(equal, a.items, b.items))
    return isinstance(a, Numeral) and a == b


def _same_items(a: Value, b: Value) -> bool:
    """Pair the items of two sets in any order. A single value is a set of one."""
    unpaired = list(b.items) if isinstance(b, Set) else [b]
    for item in a.items if isinstance(a, Set) else [a]:
        partner = next((i for i, other in enumerate(unpaired) if equal(item, other)), None)
        if partner is None:
            return False
        del unpaired[partner]
    return not unpaired


def _agree(a: tuple[str, ...], b: tuple[str, ...], units_are_one: bool) -> bool:
    """Return whether two answers are equal at every point where both have a value."""
    marks = {*a, *b}
    left = Evaluator(a, marks, units_are_one)
    right = Evaluator(b, marks, units_are_one)
    agreed = 0
    for point in range(POINTS):
        try:
            values = left.at(point), right.at(point)
        except (ZeroDivisionError, ValueError):
            continue
        if not equal(*values):
            return False
        if not (left.varies or right.varies):
            return True
        agreed += 1
    return agreed >= MIN_AGREED


_TIME = re.compile(r"\A\s*\d?\d:[0-5]\d\D*")


def compare(a: str, b: str) -> tuple[bool, str]:
    """Return whether two answers are the same, and the rule that decided."""
    try:
        left = tokens(decimal_point(a, b))
        right = tokens(decimal_point(b, a))
        if left == right:
            return left != (), "same text"
        if _TIME.fullmatch(a) and _TIME.fullmatch(b):
            return False, "time"  # as a ratio, 2:30 is 1:15
        if _agree(left, right, units_are_one=False):
            return True, "value"
        # 5 cm is 5, but not 5 m.
        one_has_units = _has_units(left) != _has_units(right)
        return one_has_units and _agree(left, right, units_are_one=True), "value"
    except OverflowError:
        return a.strip() == b.strip() != "", "too big"
    except _NOT_MATHS:
        return words(a) == words(b) != "", "words"


def _has_units(answer: tuple[str, ...]) -> bool:
    return any(map(UNIT.fullmatch, answer))


def same_answer(a: str, b: str) -> bool:
    """Return whether two extracted answers agree, for voting."""
    return compare(a, b)[0]


def canonical(answer: str) -> str:
    """Return a key that equal answers share where possible: 40 digits, or words.

    >>> canonical("1/4"), canonical("x = 0.25"), canonical("two cats")
    ('0.25', '0.25', '2cat')
    """
    try:
        found = tokens(answer)
        evaluator = Evaluator(found, {*found}, units_are_one=True)
        value = evaluator.at(0)
        if evaluator.scales:  # the first point only sets the scale of an equation
            value = evaluator.at(1)
        return _key_of(value)
    except (ArithmeticError, *_NOT_MATHS):
        return words(answer)


def _key_of(value: Value) -> str:
    value = _settled(value)
    match value:
        case Equation(None, difference):
            return f"= {_key_of(difference)}"
        case Equation(stated, _):
            return _key_of(stated)
        case Set((item,)):
            return _key_of(item)
        case Set(items):
            return "{" + ", ".join(sorted(map(_key_of, items))) + "}"
        case Tuple(items, brackets):
            return brackets[0] + ", ".join(map(_key_of, items)) + brackets[1]
        case Numeral(number):
            return f"numeral {number}"
    return str(MP.nstr(value, 40))


# ---- Grade ----

_LAYOUT = re.compile(r"\s|\\[,;!]|\\left|\\right|\$|\.$")
_PLAIN_ANSWER = re.compile(r"-?\d+|[A-Za-z]+")


def _is_copied(found: str, gold: str, question: str) -> bool:
    """Return whether an answer is a formula of the question and not the gold answer's text."""
    shown, wanted, asked = (_LAYOUT.sub("", text) for text in (found, gold, question))
    if shown == wanted or _PLAIN_ANSWER.fullmatch(shown):
        return False
    # The text before and after must not continue a number.
    start = asked.find(shown)
    while start >= 0:
        before, after = asked[:start][-1:], asked[start + len(shown) :][:1]
        if before not in tuple("0123456789.") and after not in tuple("0123456789"):
            return True
        start = asked.find(shown, start + 1)
    return False


def grade(
    response: str, gold: str, question: str | None = None, answer_format: str = "boxed"
) -> Verdict:
    """Grade a response against the gold answer. A formula of the question is not an answer."""
    wanted, found = parse_gold(gold), extract(response, answer_format)
    if wanted is None or found is None:
        return Verdict(False, found, "", "", "no gold" if wanted is None else "no answer")
    correct, rule = compare(found, wanted)
    if correct and question and _is_copied(found, wanted, question):
        correct, rule = False, "copied"
    return Verdict(correct, found, canonical(found), canonical(wanted), rule)


if __name__ == "__main__":
    from rftt.graders.audit import main

    main()

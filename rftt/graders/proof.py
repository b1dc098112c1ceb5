"""Prove with sympy that two answers are equal, as the second judge of the audit.

The grader computes with numbers and never simplifies. It therefore treats answers beyond its
bounds, such as infinite sums, as different. Sympy simplifies, but it can hang or exhaust memory, so
`audit.py:prove_equal` runs this module in a subprocess with limits. It is a tool for people who
audit a data set. No reward depends on it.
"""

import ast
import json
import resource
import signal
import sys
from types import FrameType
from typing import Any

import sympy

from rftt.graders.latex import tokens
from rftt.graders.math import Bracket, Call, Cell, Constant, Name, index_and_first, parse

PROOF_SECONDS = 5  # of CPU time per pair
_PROOF_BYTES = 4 << 30  # of address space
_MAX_PROOF_STEPS = 100  # parts and operations of one answer
_MAX_PROOF_BITS = 100_000  # of a power of two whole numbers
_MAX_PROOF_FACTORIAL = 5_000
_SYMPY_NAMES = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "exp": "exp",
    "ln": "log",
}


def _prove_lines() -> None:
    """Read pairs from stdin and print one line for each, for `audit.py:prove_equal`."""
    pairs = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (_PROOF_BYTES, _PROOF_BYTES))
    cpu_seconds = 30 + PROOF_SECONDS * len(pairs)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    signal.signal(signal.SIGVTALRM, _out_of_time)
    for a, b in pairs:
        # The timer repeats every second, because sympy may catch the first exception.
        signal.setitimer(signal.ITIMER_VIRTUAL, PROOF_SECONDS, 1)
        try:
            proved = _proves(a, b)
        except (ArithmeticError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError):
            proved = False  # not mathematics, not supported, or out of time
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.write(f"{proved}\n")
        sys.stdout.flush()


def _out_of_time(_signal: int, _frame: FrameType | None) -> None:
    raise RuntimeError("a proof took too long")


def _proves(a: str, b: str) -> bool:
    left, right = _Symbolic(a).expressions(), _Symbolic(b).expressions()
    if not left or len(left) != len(right):
        return False
    return all(sympy.simplify(x - y) == 0 for x, y in zip(left, right, strict=True))


class _Symbolic:
    """An answer as sympy expressions, built from the parts that the grader has parsed."""

    def __init__(self, answer: str) -> None:
        self.parsed = parse(tokens(answer))
        self.steps = 0
        self.indices: dict[str, Any] = {}  # the index of the sum around a part

    def expressions(self) -> list[Any]:
        """Return one expression per cell. A cell x = 5 has the value 5."""
        found = []
        for cell in (cell for row in self.parsed.rows for cell in row):
            if cell.signs == "=" and cell.named[0]:
                found.append(self._expression(cell.sides[1]))
            elif not cell.signs:
                found.append(self._expression(cell.sides[0]))
            else:
                raise SyntaxError("only values can be proved equal")
        return found

    def _expression(self, tree: ast.expr) -> Any:
        self.steps += 1
        if self.steps > _MAX_PROOF_STEPS:
            raise OverflowError("too many operations")
        match tree:
            case ast.Name(key) if key in self.indices:
                return self.indices[key]
            case ast.Name(key):
                return self._part(self.parsed.parts[key])
            case ast.UnaryOp(ast.USub(), operand):
                return -self._expression(operand)
            case ast.BinOp(left, ast.Add(), right):
                return self._expression(left) + self._expression(right)
            case ast.BinOp(left, ast.Sub(), right):
                return self._expression(left) - self._expression(right)
            case ast.BinOp(left, ast.Mult(), right):
                return self._expression(left) * self._expression(right)
            case ast.BinOp(left, ast.Div(), right):
                return self._expression(left) / self._expression(right)
            case ast.BinOp(left, ast.Pow(), right):
                return self._power(self._expression(left), self._expression(right))
        raise SyntaxError("not a sum, product or power")

    def _power(self, base: Any, exponent: Any) -> Any:
        """Return a power. Raises OverflowError if its digits would take sympy hours."""
        if base.is_Rational and exponent.is_Rational:
            bits = base.p.bit_length() + base.q.bit_length()
            if bits * abs(exponent) > _MAX_PROOF_BITS:
                raise OverflowError("a number is too large to prove anything about")
        return base**exponent

    def _part(self, part: Any) -> Any:
        match part:
            case Constant(token):
                named = {"π": sympy.pi, "e": sympy.E, "i": sympy.I, "∞": sympy.oo}
                return named[token] if token in named else sympy.Rational(token)
            case Name(token):
                return sympy.Symbol(token, real=True)
            case Bracket("||" | "⌊⌋" | "⌈⌉" as brackets, ((Cell((side,), ""),),)):
                around = {"||": sympy.Abs, "⌊⌋": sympy.floor, "⌈⌉": sympy.ceiling}
                return around[brackets](self._expression(side))
            case Bracket("()" | "{}" | "[]", ((Cell((side,), ""),),)):
                return self._expression(side)
            case Call("Σ" | "Π"):
                return self._sum(part)
            case Call():
                return self._call(part)
        raise SyntaxError("only expressions can be proved equal")

    def _sum(self, call: Call) -> Any:
        """Return a sum or product; unlike the grader's, it may be infinite."""
        lower, last, body = call.arguments
        index, first = index_and_first(self.parsed.parts, lower)
        limits = (self._expression(first), self._expression(last))
        outer = self.indices
        self.indices = {**outer, index: sympy.Symbol(index, integer=True)}
        term = self._expression(body)
        combine = sympy.Sum if call.function == "Σ" else sympy.Product
        result = combine(term, (self.indices[index], *limits)).doit()
        self.indices = outer
        return result

    def _call(self, call: Call) -> Any:
        values = [self._expression(argument) for argument in call.arguments]
        match call.function, values:
            case "frac", (top, bottom):
                return top / bottom
            case "binom", (n, k):
                return sympy.binomial(n, k)
            case "√", (radicand, *degree):
                return sympy.root(radicand, *(degree or [2]))
            case "!", (n,):
                if n.is_number and n > _MAX_PROOF_FACTORIAL:
                    raise OverflowError("a factorial is too large")
                return sympy.factorial(n)
            case "log" | "lg", (x, *base):
                return sympy.log(x, *(base or [10]))
            case function, (x,) if function in _SYMPY_NAMES:
                return getattr(sympy, _SYMPY_NAMES[function])(x)
        raise SyntaxError(f"not supported: {call.function}")


if __name__ == "__main__":
    _prove_lines()

"""An answer's text in one spelling, its unit, and its expression in Python syntax (never run).

Reads LaTeX, unicode and plain text alike, for rewards/grader.py. Departures from LaTeX parsers: no
grammar of LaTeX, but a table of rewritings and one pass that writes every multiplication, bracket
and argument out, so that `ast.parse` does the reading. At most 500 characters and 400 tokens, and
every pattern is linear or bounded: no text can make it hang.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from typing import Any

MAX_CHARS, MAX_TOKENS, MAX_DEPTH = 500, 400, 100


class Refused(Exception):
    """Not readable as mathematics: compared as words."""


class TooBig(Exception):
    """Beyond a bound: equal only to the same text."""


# 1. One spelling for each thing

_NAMES = {
    "function": "sin cos tan cot sec csc sinh cosh tanh exp ln asin acos atan gcd lcm min "
                "max log lg",
    "greek": "pi alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi "
             "rho sigma tau phi varphi chi psi omega ell Gamma Delta Theta Lambda Phi Psi Omega",
    "never a unit": "not is are maybe if unless except than least most about to from only wrong",
    "base": "two three four five six seven eight nine ten",
}  # fmt: skip
FUNCTIONS = {name: name for name in _NAMES["function"].split()} | {
    f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan")
}
"""As written: as mpmath calls it."""
_GREEK, _NO_UNIT = set(_NAMES["greek"].split()), set(_NAMES["never a unit"].split())
_BASES = {word: str(base) for base, word in enumerate(_NAMES["base"].split(), 2)}
_COMMANDS = {  # LaTeX command: the one symbol that stands for it
    name: symbol
    for symbol, names in {
        "≤": "le leq leqslant leqq", "≥": "ge geq geqslant geqq", "<": "lt", ">": "gt",
        "≠": "ne neq", "=": "equiv", "≈": "approx simeq", "∈": "in", "∪": "cup bigcup",
        "∖": "setminus backslash", "±": "pm", "∓": "mp", "·": "cdot times ast", "/": "div",
        "∞": "infty", "∅": "emptyset varnothing", "|": "lvert rvert vert mid", "⌊": "lfloor",
        "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "°": "degree circ", "(": "langle lparen",
        ")": "rangle rparen", "[": "lbrack", "]": "rbrack", "⦃": "lbrace", "⦄": "rbrace",
        '"euro"': "euro", '"pound"': "pounds", r"\frac ": "dfrac tfrac cfrac",
        r"\binom ": "dbinom tbinom",
        " ": "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits angle"
             " triangle rm bf it vec overrightarrow bar hat operatorname overline underline",
    }.items()
    for name in names.split()
}  # fmt: skip
_CHARS = {
    ord(old): new
    for new, olds in {
        "-": "−–—‐", "·": "×⋅∙•∗*", "/": "÷", "≤": "⩽", "≥": "⩾", "°": "º˚", r"\pi ": "π",
        r"\R ": "ℝ", "(": "⟨〈", ")": "⟩〉", '"pound"': "£", '"euro"': "€", '"yen"': "¥",
        "'": "’′", "|": "∣", "∅": "⌀", "=": "≡",
    }.items()
    for old in olds
}  # fmt: skip
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|tt|cal)|boldsymbol|"
    r"operatorname|bm|emph)\s*\{([^{}]*)\}"
)


def _repeating(found: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, period = found.groups()
    top = int(whole + fixed + period) - int(whole + fixed or 0)
    return rf"\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"


_REWRITES: list[tuple[re.Pattern[str], Any]] = [  # in this order
    (re.compile(pattern), new)
    for pattern, new in [
        (r"[²³¹⁰⁴-⁹⁺⁻ⁿ]+", lambda m: "^{" + _nfkc(m[0]) + "}"),
        (r"[₀-₉]+", lambda m: "_{" + _nfkc(m[0]) + "}"),
        (r"[¼-¾⅐-⅞]", lambda m: r" \frac" + "".join(f"{{{n}}}" for n in _nfkc(m[0]).split("⁄"))),
        (r"\\\\(?:\[[^\]]*\])?|\\cr\b", "¶"),  # the end of a matrix row
        (r"\\\$|\\textdollar", ' "dollar" '),  # an escaped $ is money, a bare one only a delimiter
        (r"\$|\\[()\[\]]|\\[hv]space\{[^}]*\}|\\(?:left|right)\s*\.", " "),
        (r"\\begin\{array\}\s*\{[^}]*\}|\\begin\{(?:[pbB]|small)?matrix\}", "⟦"),
        (r"\\end\{(?:array|(?:[pbB]|small)?matrix)\}", "⟧"),
        (
            r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ | |,\s*\\!)\s*(?=\d{3}(?![\d/]|\s*\\?/))",
            "",
        ),  # 10{,}080 or 10 080
        (r"(?<=\d)\{,\}(?=\d)", "."),  # 3{,}5 is the continental 3.5
        (r"\\(?:[,;:!>\s]|$)|\\q?quad|~|\s+", " "),
        (r"\\\{", "⦃"),
        (r"\\\}", "⦄"),
        (r"\\?%|\bpercent(?:age)?\b|\bpct\b", "%"),
        (r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?|\"?\bdegrees?\b\"?", "°"),
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating),
        (r"(\d*)\.(\d{0,9}?)(\d{1,9}?)\3{2,}(?:\.\.\.|\\[lc]?dots)", _repeating),
        (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\(?\s*\\?[pb]?mod\s*\{?\s*(\w+)\s*\}?\s*\)?", r' "modulo\1"'),
        (r"\\mathbb\s*\{?R\}?|(?:\"?all\"?\s+)?\"?real\"?\s+\"?numbers\"?", r"\\R "),
        (r"<=|=<", "≤"),
        (r">=", "≥"),
        (r"(?<=\s)!=|/=", "≠"),
        (r"··", "^"),  # ** of a programmer
        (r"√\s*(\d+)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"_\s*\{?\s*\\?\"?(?:max|min)\"?\s*\}?", ""),
        (
            r"_\s*\{?\s*\"?([a-z]+)\"?\s*\}?",
            lambda m: "_" + _BASES[m[1]] if m[1] in _BASES else m[0],
        ),
        (r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0] + " ")),
        (r"(\\(?:frac|binom|sqrt))\s*(\d)", r"\1{\2}"),
        (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"(?<=\d) (\d+)\s*/\s*(\d+)", r"\\frac{\1}{\2}"),  # 1 4/5
        (r"(?<![\d.^])(\d+)\s*(\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})", r"(\1+\2)"),  # 1\frac45
        (
            r"^[^()\[\]⦃;]*,[^()\[\]⦃]*;[^()\[\]⦃;]*,[^()\[\]⦃]*$",
            lambda m: f"({m[0].replace(';', '),(')})",
        ),  # p=5,q=2;p=7,q=2
        (r"[\"]?\b(?:and|or)\b[\"]?|;", ","),
        (r",(?:\s*,)+", ","),
        (
            r"\b(?:sq(?:uare)?|cubic)\b\"?\s*\"?([a-z]+)\"?",
            lambda m: f'"{m[1]}"^{3 if m[0][0] == "c" else 2}',
        ),
        (r"^(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)$", r"\1·10^{\2}"),
        (r"(^|,)\s*([A-Za-z])(\([^()]*\)\s*[=<≤])", r'\1"\2"\3'),  # P(A) = … is no product
        (r"⦃\s*[A-Za-z]\s*(?:∈\s*\\R\s*)?[|:](?=.*[<>=≤≥≠∈])", "⦃"),  # {x | x > 3} says x > 3
    ]
]


def _nfkc(text: str) -> str:
    """Full-width, raised and styled characters made plain; invisible ones dropped."""
    plain = unicodedata.normalize("NFKC", text).replace("−", "-")
    return "".join(c for c in plain if c.isspace() or unicodedata.category(c)[0] != "C")


def _quote(match: re.Match[str]) -> str:
    """Words in \\text{…} are quoted: m in `3\\text{ m}` is a metre. (C), 17 and e come out bare."""
    inside = match[1].strip()
    if inside in FUNCTIONS.keys() - _UNITS.keys():
        return f" \\{inside} "
    if inside in _UNITS or re.search("[A-Za-z]{2}", inside):
        return " " + re.sub(r"[A-Za-z]+", r'"\g<0>"', inside) + " "
    return f" {inside} "


def clean(text: str) -> str:
    """`text` in one spelling: LaTeX, unicode and plain ways of writing a thing become the same."""
    if len(text) > MAX_CHARS:
        raise TooBig
    if re.fullmatch(r"-?[0-9]+", text):
        return text
    for pattern, new in _REWRITES[:3]:  # before NFKC makes x² into x2
        text = pattern.sub(new, text)
    text = _nfkc(text.translate(_CHARS)).strip().strip("·")
    for _ in range(3):
        text = _WRAPPED.sub(_quote, text)
    for pattern, new in _REWRITES[3:]:
        text = pattern.sub(new, text)
    return re.sub(r"[\s.,:]+$", "", text.strip(), count=1)


def words(text: str) -> str:
    """For answers in words: no case, articles, plural or punctuation; lists in any order."""
    text = re.sub(r"\b(?:the|a|an)\b", " ", text.lower())
    parts = [re.findall(r"[^\s\".;!?]+", part) for part in text.split(",")]
    parts = [[re.sub(r"(?<=[a-z]{3})s$", "", word) for word in part] for part in parts]
    return ", ".join(sorted(" ".join(part) for part in parts))


_UNITS: dict[str, tuple[str, Fraction]] = {  # word: (what it measures, how many base units)
    word: (kind, Fraction(size))
    for kind, sizes in {
        "length": {"1/1000": "mm millimeter", "1/100": "cm centimeter", "1/10": "dm",
                   "1": "m meter metre", "1000": "km kilometer kilometre",
                   "127/5000": "in inch inche",
                   "381/1250": "ft feet foot", "1143/1250": "yd yard", "201168/125": "mi mile"},
        "mass": {"1/1000": "mg milligram", "1": "g gram", "1000": "kg kilogram"},
        "time": {"1": "s sec second", "60": "min minute", "3600": "h hr hour", "86400": "day",
                 "604800": "week"},
        "volume": {"1/1000": "ml mL milliliter", "1": "l L liter litre"},
        "dollar": {"1": "dollar usd", "1/100": "cent"}, "euro": {"1": "euro"},
        "pound": {"1": "pound"}, "yen": {"1": "yen"}, "angle": {"1": "°"},
        "percent": {"1/100": "%"},
        "": {"1": "unit", "1000": "thousand", "1000000": "million", "1000000000": "billion"},
    }.items()
    for size, words in sizes.items()
    for word in words.split()
}  # fmt: skip
_UNIT = re.compile(r'(/|\bper\b)|([A-Za-z]\w*|[°%])"?\s*(?:\^\s*\{?\s*(\d))?')
_MEASURE = re.compile(  # words, with powers, that end an item; possessive and therefore linear
    r'(?:(?<=[\d)}])|(?<=\s))\s*+((?:(?:/|"?per\b"?)?+\s*+(?:"\w++"\.?|[A-Za-z]{2,}+|(?<=/)[a-z]\b)'
    r'(?:\s*+\^\s*\{?\s*[23]\s*\}?)?+\s*+)++)(?=,|$)|([°%])|"(dollar|euro|pound|yen)"'
)
_TRIGONOMETRY = re.compile("sin|cos|tan|cot|sec|csc")
Kinds = tuple[tuple[str, int], ...]
"""What a unit measures: (("length", 1), ("time", -1))."""


def _unit(text: str) -> tuple[Fraction, Kinds] | None:
    """(size in base units, kinds) of `km/h`, or None if a word cannot be a unit."""
    kinds: Counter[str] = Counter()
    size, side = Fraction(1), 1
    for per, word, power in _UNIT.findall(text):
        name = word if word in _UNITS else re.sub("s$", "", word.lower())
        if per:
            side = -1
            continue
        if name not in _UNITS and (len(word) < 4 or name in _NO_UNIT | FUNCTIONS.keys() | _GREEK):
            return None
        kind, base = _UNITS.get(name, (name, Fraction(1)))
        exponent, side = side * int(power or 1), 1
        kinds[kind] += exponent
        size *= base**exponent
    return size, tuple(sorted(kinds.items()))


def measured(text: str) -> tuple[str, Fraction, Kinds]:
    """(text without its unit, the unit's size and kinds). The members of a list share one unit."""
    found: list[tuple[Fraction, Kinds]] = []

    def read(match: re.Match[str]) -> str:
        unit = None if match[0] == "°" and _TRIGONOMETRY.search(text) else _unit(match[0])
        if unit is None:
            return match[0]
        found.append(unit)
        return " "

    rest = _MEASURE.sub(read, text)
    if len(set(found)) > 1:
        raise Refused
    size, kinds = found[0] if found else (Fraction(1), ())
    if dict(kinds).keys() <= {""}:  # 2 million
        return f"({rest})·{size}" if size != 1 else rest, Fraction(1), ()
    return rest, size, kinds


# 2. Rewriting as a Python expression, which is parsed and never run

_TOKEN = re.compile(r'\d+(?:\.\d*)?|\.\d+|\\?[A-Za-z]+|"[A-Za-z]"|\S', re.ASCII)
_INFIX = {
    "+": "+", "-": "-", "·": "*", "/": "/", ":": "/", ",": ",", "&": ",", "¶": "),row(", "=": "==",
    "<": "<", ">": ">", "≤": "<=", "≥": ">=", "≠": "!=", "≈": " is ", "∈": " in ", "∪": "|",
    "∖": "&", "±": "+pm*", "∓": "-pm*",
}  # fmt: skip
_CLOSERS = {"(": ")]", "[": ")]", "{": "}", "⦃": "⦄", "|": "|", "⌊": "⌋", "⌈": "⌉", "⟦": "⟧"}
_WORD = re.compile("(?=.*[a-z]).{4,}|.[eiou].|..[eiou]|no|No|[yY]es")  # not mn, RC, abc
_CALLS = {"|": "abs({})", "⌊": "floor({})", "⌈": "ceil({})", "⟦": "rows(row({}))"}
_POSTFIX = {"!": "**fact()", "°": "*deg()"}
_TEN = "'10'"  # the base of a bare \\log
_STOP = {")", "]", "}", "⦄", "⌋", "⌉", "⟧", ""}
_LOOSE = _STOP | _INFIX.keys() - {"·", "/"}  # where the body of a sum ends
_TIGHT = _LOOSE | {"·", "/", "("}  # where the argument of `sin` ends, written without brackets


class _Writer:
    """One pass over the tokens; writes every multiplication, bracket and argument out."""

    def __init__(self, text: str) -> None:
        self.tokens, self.at = [*_TOKEN.findall(text), ""], 0
        if len(self.tokens) > MAX_TOKENS:
            raise TooBig

    def take(self) -> str:
        self.at += 1
        if not (token := self.tokens[self.at - 1]):
            raise Refused
        return token

    def peek(self) -> str:
        return self.tokens[self.at]

    def run(self, stop: set[str], functions: bool = True) -> str:
        """Source up to a token in `stop`, or (functions=False) up to the next function."""
        out: list[str] = []
        while self.peek() not in stop and (functions or self.peek().lstrip("\\") not in FUNCTIONS):
            token, joined = self.peek(), out[-1:] != [] and out[-1][-1] in "')"
            if token in _INFIX:
                sign = _INFIX[self.take()]
                out.append("pm*" if token == "±" and not joined else sign)
            elif token in _POSTFIX and joined:
                out.append(_POSTFIX[self.take()])
            elif token == "^" and joined:
                self.at += 1
                out.append(f"**{self.script()}")
            else:
                piece = self.operand()
                if joined and (out[-1] + piece[:1]).count("'") == 3 and out[-1][0] == "'":
                    raise Refused  # 7 8
                out += ["*", piece] if joined else [piece]
        return "".join(out)

    def script(self) -> str:
        """What ^, _, \\frac or \\sqrt applies to: a group or one symbol, with its sign."""
        sign = self.take() if self.peek() == "-" else ""
        return f"({sign}{self.operand()})"

    def operand(self) -> str:
        token = self.take()
        if re.match(r"\.?[0-9]", token):
            return f"'{token.rstrip('.')}'"
        if token in _CLOSERS:
            return self.bracket(token)
        if token == "∞":
            return "oo()"
        if token == "∅":
            return "seq('⦃⦄')"
        name = token.strip('\\"')
        if token in ("\\frac", "\\binom"):
            top, bottom = self.script(), self.script()
            return f"({top}/{bottom})" if token == "\\frac" else f"binom({top},{bottom})"
        if name == "sqrt":
            root = self.bracket(self.take()) if self.peek() == "[" else "'2'"
            return f"root({self.script()},{root})"
        if token in ("\\sum", "\\prod"):
            if self.take() != "_":
                raise Refused
            low = self.script()
            if self.take() != "^":
                raise Refused
            return f"{name}_({low},{self.script()},{self.run(_LOOSE)})"
        if name in FUNCTIONS:
            return self.function(name)
        if token == "\\R":
            return "seq('()',-oo(),oo())"
        return self.letter(token, name)

    def bracket(self, opening: str) -> str:
        inside = self.run(_STOP | ({"|"} if opening == "|" else set()))
        closing = self.take()
        if closing not in _CLOSERS[opening]:
            raise Refused
        if opening in _CALLS:
            return _CALLS[opening].format(inside)
        return f"seq('{opening}{closing}',{inside})" if inside else f"seq('{opening}{closing}')"

    def function(self, name: str) -> str:
        power = base = ""
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                power = self.script()
            else:
                base = self.script()
        bracketed = self.peek() in ("(", "[", "{", "⦃")
        sign = self.take() if self.peek() == "-" else ""
        inside = self.operand() if bracketed else sign + self.run(_TIGHT, functions=False)
        if re.fullmatch(r"\((?:seq\('\{\}',)?-'1'\)+", power) and f"arc{name}" in FUNCTIONS:
            return f"arc{name}({inside})"
        call = f"log({inside},{base or _TEN})" if name in ("log", "lg") else f"{name}({inside})"
        return f"({call})**{power}" if power else call

    def letter(self, token: str, name: str) -> str:
        """A variable with its index, f(x), or the first of a run of letters."""
        if name in ("infty", "infinity", "inf"):
            return "oo()"
        if token[0] != "\\" and name != "pi" and len(name) > 1:
            if _WORD.fullmatch(name):
                raise Refused
            self.tokens[self.at - 1 : self.at] = list(name)
            name = name[0]
        elif not (name in _GREEK or (len(name) == 1 and name.isalpha() and name.isascii())):
            raise Refused
        while self.peek() == "'":
            name += self.take().replace("'", "′")
        if self.peek() == "_":
            self.at += 1
            return f"at('{name}',{self.script()})"
        if self.peek() == "(" and (token[0] == '"' or name[0] in "fg"):
            return f"at('{name}',{self.operand()})"
        return f"var('{name}')"


def parse(text: str) -> ast.expr:
    """The syntax tree of cleaned text without its unit; only trees of harmless depth."""
    writer = _Writer(text)
    source = writer.run({""})
    try:
        tree = ast.parse(source.strip(" ,"), mode="eval").body
    except SyntaxError as error:
        raise Refused from error
    except (RecursionError, MemoryError) as error:
        raise TooBig from error
    level: list[ast.AST] = [tree] if len(writer.tokens) > MAX_DEPTH else []
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise TooBig
    return tree

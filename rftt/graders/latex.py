r"""Normalize answers: LaTeX, unicode and plain text become one sequence of tokens.

1. `normalize` applies the rewrites below in order. A rewrite is a pattern that changes one notation
   of several tokens. Each has one worked example.
2. `tokens` splits the text and replaces every token by the first spelling in `SPELLINGS`.

This is not a grammar of LaTeX. Every pattern runs in linear time, and `tokens` reads at most 500
characters, so no text can make the grader hang.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

MAX_CHARS = 500

# ---- Tables ----

FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos"),
    *("arctan", "exp", "log", "ln", "lg", "min", "max", "gcd", "lcm"),
)
# In a pattern, `sinh` must be tried before `sin`.
FUNCTION = "|".join(sorted(FUNCTIONS, key=len, reverse=True))

# fmt: off
SPELLINGS: dict[str, str] = {
    # The token that the parser reads: other spellings of it. A plural "s" is removed first.
    # Relations
    "=": r"\equiv ≡", "<": r"\lt", ">": r"\gt",
    "≤": r"\le \leq \leqslant \leqq ⩽ <= =<",
    "≥": r"\ge \geq \geqslant \geqq ⩾ >=",
    # Operators and functions
    "±": r"\pm", "∓": r"\mp", "-": "− – — ‐", "^": "**", "'": "’ ′",
    "·": r"\cdot \times × ⋅ ∙ • *",
    "/": r"\div ÷ ⁄ : per",
    "√": r"\sqrt", "Σ": r"\sum", "Π": r"\prod",
    "frac": r"\frac \dfrac \tfrac \cfrac",
    "binom": r"\binom \dbinom \tbinom",
    **{name: f"\\{name}" for name in FUNCTIONS},
    # Brackets and separators: ⦃⦄ surround a set, ¶ ends a row of a matrix.
    "(": r"\langle ⟨", ")": r"\rangle ⟩", "[": r"\lbrack", "]": r"\rbrack",
    "⦃": r"\{ \lbrace", "⦄": r"\} \rbrace",
    "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil",
    "|": r"\lvert \rvert \vert \mid",
    ",": r"; and or ∪ \cup \bigcup",
    "¶": r"\\ \cr",
    # Constants and numerals
    "π": r"\pi pi", "∞": r"\infty infinity inf", "∅": r"\emptyset \varnothing",
    "1": "one", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven",
    "8": "eight", "9": "nine", "10^6": "million",
    # Units are quoted, so that "m" is a metre and m a name.
    "%": r"\% percent pct percentage",
    "°": r"\circ \degree degree",
    '"dollar"': r"\$ dollar", '"pound"': r"£ \pounds", '"euro"': "€",
    '"m"': "meter", '"cm"': "centimeter", '"km"': "kilometer",
    '"in"': "inch inche", '"ft"': "foot feet",
    '"g"': "gram", '"kg"': "kilogram", '"min"': "minute", '"h"': "hour hr",
    # Layout has no meaning.
    "": r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \textstyle \limits
        \angle \triangle \rm \bf \it \vec \overrightarrow \bar \hat \overline \underline
        $ ~ \, \; \: \! \> \( \) \[ \]""",
}
# fmt: on
_TOKEN_OF = {other: token for token, others in SPELLINGS.items() for other in others.split()}

# ---- Rewrites ----


class Rewrite(NamedTuple):
    """A pattern, what replaces it, and a worked example that the doctest below checks."""

    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]
    example: tuple[str, str]
    """A text and what it becomes."""

    def __call__(self, text: str) -> str:
        """Return the text with every match replaced."""
        return self.pattern.sub(self.replacement, text)


def _repeating(found: re.Match[str]) -> str:
    """Write a repeating decimal as a geometric series."""
    whole, start, period = found.groups()
    shifted = "0" * len(start) + period
    return f"({whole}.{start}0+.{shifted}/(1-.1^{len(period)}))"


_TEXT_WORD = re.compile(r"\b(?:[A-Za-z]{2,}|[mgshlL])\b")


def _quoted_words(found: re.Match[str]) -> str:
    """Return the content of a text command with its words in quotes."""
    return _TEXT_WORD.sub(r'"\g<0>"', f" {found[1]} ")


_TEXT_COMMAND = Rewrite(
    re.compile(r"\\(?:text\w*|[mh]box|math\w+|boldsymbol|bm|emph|operatorname)\s*\{([^{}]*)\}"),
    _quoted_words,
    (r"3\text{ m and x}", '3  "m" "and" x '),
)

CHARACTERS = (
    # Characters and commands that print nothing
    Rewrite(re.compile(r"[\u200b-\u200f\u2060\ufeff\xad]|\\displaystyle"), "", ("7\u200b", "7")),
    # Raised digits are an exponent and lowered digits a subscript. NFKC makes them plain later.
    Rewrite(re.compile("[²³¹⁰⁴-⁹⁺⁻ⁿ]+"), r"^{\g<0>}", ("x²", "x^{²}")),
    Rewrite(re.compile("[₀-₉]+"), r"_{\g<0>}", ("x₁", "x_{₁}")),
    # A whole number before a fraction character is the first term of a sum.
    Rewrite(re.compile(r"(?<!\d)(\d*)([¼-¾⅐-⅞])"), r"(0\1+\2)", ("1½", "(01+½)")),
    Rewrite(
        re.compile(r"ℝ|\\mathbb\s*\{?R\}?|(?:all\s+)?real\s+numbers"),
        "(-∞,∞)",
        (r"x \in \mathbb{R}", r"x \in (-∞,∞)"),
    ),
    # A raised circle is a degree sign.
    Rewrite(
        re.compile(r"\^\s*(?:\{\s*)?(?:\\circ|\\degree|°)\s*\}?|[º˚]"), "°", (r"30^{\circ}", "30°")
    ),
)

ENVIRONMENTS = (
    *(_TEXT_COMMAND, _TEXT_COMMAND, _TEXT_COMMAND),  # \text{\textbf{…}}
    # A matrix is a pair of brackets.
    Rewrite(
        re.compile(r"\\begin\s*\{(?:array|\w*matrix)\}(?:\s*\{[clr|\s]+\})?"),
        "⟦",
        (r"\begin{array}{cc}1&2", "⟦1&2"),
    ),
    Rewrite(re.compile(r"\\end\s*\{(?:array|\w*matrix)\}"), "⟧", (r"1&2\end{pmatrix}", "1&2⟧")),
)

NUMBERS = (
    # Separators between groups of three digits. (1,000) is a pair.
    Rewrite(
        re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ | |,\s*\\!)\s*(?=\d{3}(?![\d/]|\s*\\?/))"),
        "",
        (r"10{,}080", "10080"),
    ),
    Rewrite(
        re.compile(r"(?<![\d,.(\[{])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)"),
        lambda found: found[0].replace(",", ""),
        ("1,000,000", "1000000"),
    ),
    # Repeating decimals: at least three times before an ellipsis, or overlined. The bounds on
    # digits keep both patterns linear.
    Rewrite(
        re.compile(r"(?<!\d)(\d*)\.(\d{0,20}?)(\d{1,10}?)\3{2,20}(?:\.{3}|\\[lc]?dots)"),
        _repeating,
        ("0.333...", "(0.0+.3/(1-.1^1))"),
    ),
    Rewrite(
        re.compile(r"(?<!\d)(\d*)\.(\d{0,20}?)\\overline\s*\{?(\d{1,20})\}?"),
        _repeating,
        (r"0.1\overline{6}", "(0.10+.06/(1-.1^1))"),
    ),
)

FUNCTIONS_AND_SETS = (
    # Wide spaces
    Rewrite(re.compile(r"(?<!\\)\\(?:\s|$|q?quad)"), " ", (r"7 \quad", "7  ")),
    # The inverse of a trigonometric function has a name.
    Rewrite(
        re.compile(r"\\?(sin|cos|tan)\s*\^\s*(?:\{\s*-\s*1\s*\}|-1)"),
        r"\\arc\1 ",
        (r"\tan^{-1} x", r"\arctan  x"),
    ),
    # Only the condition of a set counts. It follows the bar.
    Rewrite(
        re.compile(
            r"\\\{\s*[a-z]\s*(?:\\in\s*\(-∞,∞\)\s*)?(?:\||:|\\mid)"
            r"(?=.{0,100}?(?:[<>=≤≥≠∈]|\\[gln][et]))"
        ),
        r"\\{",
        (r"\{x \mid x > 3\}", r"\{ x > 3\}"),
    ),
    # The real numbers without one are two intervals.
    Rewrite(
        re.compile(r"\(-∞,∞\)\s*(?:\\setminus|\\backslash|∖)\s*\\?\{([^,{}\\]*)\\?\}"),
        r"(-∞,\1)∪(\1,∞)",
        (r"(-∞,∞) \setminus \{3\}", "(-∞,3)∪(3,∞)"),
    ),
    Rewrite(
        re.compile(r"\{(?=[^{}]*+\})([^{}]*)\\choose([^{}]*)\}"),
        r"\\binom{\1}{\2}",
        (r"{5\choose 2}", r"\binom{5}{ 2}"),
    ),
)

ARGUMENTS = (
    # A digit can be an argument without braces.
    Rewrite(
        re.compile(r"\\([dtc]?frac|sqrt|[dt]?binom)\s*(\d)"),
        r"\\\1{\2}",
        (r"\frac12", r"\frac{1}2"),
    ),
    Rewrite(
        re.compile(r"\\([dtc]?(?:frac|binom)\s*\{[^{}]*\})\s*(\d)"),
        r"\\\1{\2}",
        (r"\frac{1}2", r"\frac{1}{2}"),
    ),
    # A mixed number is a sum.
    Rewrite(
        re.compile(r"(?<=\d) (\d+)\s*/\s*(\d+)"), r"\\frac{\1}{\2}", ("1 4/5", r"1\frac{4}{5}")
    ),
    Rewrite(
        re.compile(r"(?<![\d.^_])(\d+)\s*(\\[dtc]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})"),
        r"(\1+\2)",
        (r"1\frac{4}{5}", r"(1+\frac{4}{5})"),
    ),
    # The parser rejects `#`, because 7 8 is not 56.
    Rewrite(re.compile(r"(?<=\d)(?<![_^]\d)\s+(?=\.?\d)"), "#", ("7 8", "7#8")),
)

RELATIONS = (
    # The name of an element does not count.
    Rewrite(re.compile(r"^([\s$]*)\w\s*(?:∈|\\in(?![a-z]))"), r"\1", (r"x \in [2, 7]", " [2, 7]")),
    # One excluded number leaves two intervals.
    Rewrite(
        re.compile(r"^[\s$]*\w\s*(?:≠|!=|\\neq?(?![a-z]))((?:.*[^.$\s])?)[.$\s]*$"),
        r"(-∞,\1)∪(\1,∞)",
        (r"x \ne 3.", "(-∞, 3)∪( 3,∞)"),
    ),
)

UNITS = (
    # A word that follows a number is a unit. So is one that divides a unit.
    Rewrite(
        re.compile(
            r"(?<=[\d)}\"])(?:\s|\\[,;:!])*"
            r"((?:[ckm]m|k?g|m[lg]|min|hr|in|ft)\b|[A-Za-z]{4,})(?![\"\w(])"
        ),
        r' "\1"',
        ("5 pens", '5 "pens"'),
    ),
    Rewrite(
        re.compile(r"(?<=\")\s*(?:/|per\b)\s*([a-z]+)\b(?!\")"),
        r'/"\1"',
        ('60 "km" per hour', '60 "km"/"hour"'),
    ),
)

APPROXIMATIONS = (
    # An approximation is the answer unless it follows an exact one.
    Rewrite(re.compile(r"^(\s*+\$*+\w*+)\s*+(?:\\approx|≈)"), r"\1=", (r"x \approx 11", "x= 11")),
    Rewrite(re.compile(r"(?:\\approx|\\simeq|≈).*"), "", (r"1/3 \approx 0.33", "1/3 ")),
)

# The order matters: numbers are read after the text commands around them are gone.
NOTATIONS = (
    *(*ENVIRONMENTS, *NUMBERS, *FUNCTIONS_AND_SETS, *ARGUMENTS, *RELATIONS, *UNITS),
    *APPROXIMATIONS,
)


def normalize(text: str) -> str:
    r"""Apply all rewrites.

    >>> normalize(r"1\frac12 \text{ km}")
    '(1+\\frac{1}{2})   "km" '
    >>> [r for r in (*CHARACTERS, *NOTATIONS) if r(r.example[0]) != r.example[1]]
    []
    """
    for rewrite in CHARACTERS:
        text = rewrite(text)
    text = unicodedata.normalize("NFKC", text)  # full-width, raised and styled characters
    for rewrite in NOTATIONS:
        text = rewrite(text)
    return text


# ---- Tokens ----

_LETTER = r"(?:\\(?!sum|prod|log)[A-Za-z]+|[A-Za-z])(?![A-Za-z])(?:_(?:\{[^{}]*\}|\\[a-z]+|\w))?'*"
NAME = re.compile(rf"{_LETTER}(?:\([^()]*\))?")
"""One letter or command, perhaps with an index, a prime or arguments: x, \\theta, x_1, y', f(2)."""

_TOKEN = re.compile(
    r"[fg]'*\([^()]*\)"  # f(x) is one name
    rf"|{_LETTER}(?:\([^()]*\)(?=\s*[=<≤]))?"  # P(A) is one name only on the left of a relation
    r"|\\[A-Za-z]+|\\."
    r'|"[^"]*"'
    r"|\*\*|[<>]=|=<"
    r"|(?:\d+\.\d+[eE][+-]?|\d+[eE]|1[eE]-)\d{1,3}\b"  # 6.7e-5, 5e3 and 1e-5, but not 2e-1
    r"|\d+(?:\.\d+)?|\.\d+"
    r"|[A-Za-z]+|\S"
)
_PLURAL = re.compile(r"(?<=[a-z]{3})s$")
# Other runs of letters are products: mn, RC, abc.
_WORD = re.compile(r"\A(?:(?=.*[a-z]).{4,}|.[eiou]|..[eiou]|(?i:no|yes|odd|an))")
_DIGITS = re.compile("[0-9]+")

# These words change what a number means, so they are not units.
_NO_UNITS = (
    "maybe|unless|except|than|least|most|about|from|only|wrong|more|less|when|with|never|even"
)
UNIT = re.compile(rf'[%°]|"(?!(?:{_NO_UNITS})")(?:[^"]{{3,}}|[ckm]?m|k?g|m[lg]|min|in|ft|[shlL])"')
"""Percent, degree, or a quoted word that may be a unit."""

_PLUS = str.maketrans("±∓", "+-")
_MINUS = str.maketrans("±∓", "-+")


@functools.lru_cache(1000)
def tokens(text: str) -> tuple[str, ...]:
    r"""Return the tokens of an answer, each in its first spelling.

    >>> tokens(r"\dfrac{\pi}{2} \leq x")
    ('frac', '{', 'π', '}', '{', '2', '}', '≤', 'x')
    """
    if len(text) > MAX_CHARS:
        raise OverflowError(f"an answer may have {MAX_CHARS} characters")
    if not _DIGITS.fullmatch(text):
        text = normalize(text)
    found: list[str] = []
    for piece in _TOKEN.findall(text.strip(" *=")):
        token = _first_spelling(piece)
        if token.isalpha() and token not in SPELLINGS and not _WORD.fullmatch(token):
            found.extend(token)  # mn is m times n
        else:
            found.append(token)
    while found and found[-1] in (".", ",", ":", ";", '"."', ""):
        found.pop()
    if "±" in found or "∓" in found:
        found = _both_signs(found)
    return tuple(token for token in found if token)


def _first_spelling(piece: str) -> str:
    word = _PLURAL.sub("", piece.strip('"').lower())
    token = f'"{word}"' if piece.startswith('"') else "".join(piece.split())
    return _TOKEN_OF.get(word if word.isalpha() else token, token)


def _both_signs(found: list[str]) -> list[str]:
    """Write 1 ± 2 as the set of 1 + 2 and 1 - 2."""
    plus = [token.translate(_PLUS) for token in found]
    minus = [token.translate(_MINUS) for token in found]
    return ["⦃", *plus, ",", *minus, "⦄"]


# ---- Decimal commas and words ----

_DECIMAL_COMMA = re.compile(r"\A\W*(?:\d+,(?:\d{1,2}|\d{4,})|0,\d+)\D*")
_DECIMAL_POINT = re.compile(r"\.\d")
_PLURAL_OR_MARK = re.compile(r"(?<=\w{3})s\b|[ .;?]")
_ARTICLES = ("a", "an", "the", "The")  # but A is an answer


def decimal_point(text: str, other: str) -> str:
    """Read a comma as a decimal point if the other answer has one; otherwise 1,5 is a list.

    >>> decimal_point("1,5", "1.5"), decimal_point("1,5", "{1,5}")
    ('1.5', '1,5')
    """
    if _DECIMAL_COMMA.fullmatch(text) and _DECIMAL_POINT.search(other):
        return text.replace(",", ".")
    return text


def words(text: str) -> str:
    r"""Return an answer in words without case, articles, plurals, punctuation and order.

    >>> words(r"The Ellipses."), words(r"\text{Bob and Ann}")
    ('ellipse', 'ann,bob')
    """
    kept = [token for token in tokens(text[:MAX_CHARS]) if token.strip('"') not in _ARTICLES]
    plain = " ".join(kept).lower().replace('"', "")
    entries = _PLURAL_OR_MARK.sub("", plain).split(",")
    # A comma within brackets does not end an entry: [2, 3) is not the list "3), [2".
    if all(_is_balanced(entry) for entry in entries):
        entries.sort()
    return ",".join(entries)


def _is_balanced(entry: str) -> bool:
    opening = sum(entry.count(bracket) for bracket in "([{⦃⟦")
    return opening == sum(entry.count(bracket) for bracket in ")]}⦄⟧")

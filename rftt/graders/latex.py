r"""Normalize answers: LaTeX, unicode and plain text become one sequence of tokens.

1. `normalize` applies the rewrites below in order. A rewrite is a function of the text that changes
   one notation of several tokens. Each has one worked example.
2. `tokens` splits the text and replaces every token by the first spelling in `SPELLINGS`.

This is not a grammar of LaTeX. Every pattern runs in linear time, and `tokens` reads at most 500
characters, so no text can make the grader hang.
"""

import functools
import re
import unicodedata

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

# ---- Rewrites: characters ----

_INVISIBLE = re.compile(r"[\u200b-\u200f\u2060\ufeff\xad]|\\displaystyle")
_RAISED = re.compile(r"[²³¹⁰⁴-⁹⁺⁻ⁿ]+")
_LOWERED = re.compile(r"[₀-₉]+")
_VULGAR_FRACTION = re.compile(r"(?<!\d)(\d*)([¼-¾⅐-⅞])")
_REALS = re.compile(r"ℝ|\\mathbb\s*\{?R\}?|(?:all\s+)?real\s+numbers")
_DEGREES = re.compile(r"\^\s*(?:\{\s*)?(?:\\circ|\\degree|°)\s*\}?|[º˚]")


def drop_invisible(text: str) -> str:
    r"""Remove characters and commands that print nothing.

    >>> drop_invisible(r"\displaystyle 7" + "\u200b")
    ' 7'
    """
    return _INVISIBLE.sub("", text)


def raised_digits(text: str) -> str:
    """Write raised digits as an exponent. `compatible_characters` lowers them.

    >>> raised_digits("x²")
    'x^{²}'
    """
    return _RAISED.sub(r"^{\g<0>}", text)


def lowered_digits(text: str) -> str:
    """Write lowered digits as a subscript.

    >>> lowered_digits("x₁")
    'x_{₁}'
    """
    return _LOWERED.sub(r"_{\g<0>}", text)


def vulgar_fractions(text: str) -> str:
    """Write a whole number before a fraction character as a sum.

    >>> vulgar_fractions("1½")
    '(01+½)'
    """
    return _VULGAR_FRACTION.sub(r"(0\1+\2)", text)


def real_numbers(text: str) -> str:
    r"""Write the set of real numbers as an interval.

    >>> real_numbers(r"x \in \mathbb{R}")
    'x \\in (-∞,∞)'
    """
    return _REALS.sub("(-∞,∞)", text)


def degree_signs(text: str) -> str:
    r"""Write a raised circle as a degree sign.

    >>> degree_signs(r"30^{\circ}")
    '30°'
    """
    return _DEGREES.sub("°", text)


def compatible_characters(text: str) -> str:
    """Replace full-width, raised and styled characters by plain ones.

    >>> compatible_characters("７^{²}")
    '7^{2}'
    """
    return unicodedata.normalize("NFKC", text)


# ---- Rewrites: environments ----

_TEXT_COMMAND = re.compile(
    r"\\(?:text\w*|[mh]box|math\w+|boldsymbol|bm|emph|operatorname)\s*\{([^{}]*)\}"
)
_TEXT_WORD = re.compile(r"\b(?:[A-Za-z]{2,}|[mgshlL])\b")
_MATRIX_BEGIN = re.compile(r"\\begin\s*\{(?:array|\w*matrix)\}(?:\s*\{[clr|\s]+\})?")
_MATRIX_END = re.compile(r"\\end\s*\{(?:array|\w*matrix)\}")
_LATEX_SPACE = re.compile(r"(?<!\\)\\(?:\s|$|q?quad)")


def text_commands(text: str) -> str:
    r"""Unwrap \text{…} and its relatives, and quote the words in it.

    >>> text_commands(r"3\text{ m and x}")
    '3  "m" "and" x '
    """
    for _ in range(3):  # \text{\textbf{…}}
        text = _TEXT_COMMAND.sub(lambda found: _quote_words(f" {found[1]} "), text)
    return text


def _quote_words(text: str) -> str:
    return _TEXT_WORD.sub(r'"\g<0>"', text)


def matrices(text: str) -> str:
    r"""Write a matrix environment as a pair of brackets.

    >>> matrices(r"\begin{pmatrix}1&2\end{pmatrix}")
    '⟦1&2⟧'
    """
    return _MATRIX_END.sub("⟧", _MATRIX_BEGIN.sub("⟦", text))


def latex_spaces(text: str) -> str:
    r"""Write wide spaces as one space.

    >>> latex_spaces(r"7 \quad")
    '7  '
    """
    return _LATEX_SPACE.sub(" ", text)


# ---- Rewrites: numbers ----

_SPACED_THOUSANDS = re.compile(
    r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ | |,\s*\\!)\s*(?=\d{3}(?![\d/]|\s*\\?/))"
)
_COMMA_THOUSANDS = re.compile(r"(?<![\d,.(\[{])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
# Bounds keep both patterns linear: the digits before the period, the period and its repeats.
_OVERLINED_PERIOD = re.compile(r"(?<!\d)(\d*)\.(\d{0,20}?)\\overline\s*\{?(\d{1,20})\}?")
_DOTTED_PERIOD = re.compile(r"(?<!\d)(\d*)\.(\d{0,20}?)(\d{1,10}?)\3{2,20}(?:\.{3}|\\[lc]?dots)")
_BARE_ARGUMENT = re.compile(r"\\([dtc]?frac|sqrt|[dt]?binom)\s*(\d)")
_BARE_SECOND_ARGUMENT = re.compile(r"\\([dtc]?(?:frac|binom)\s*\{[^{}]*\})\s*(\d)")
_MIXED_SLASH = re.compile(r"(?<=\d) (\d+)\s*/\s*(\d+)")
_MIXED_FRACTION = re.compile(r"(?<![\d.^_])(\d+)\s*(\\[dtc]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})")
_NUMBER_GAP = re.compile(r"(?<=\d)(?<![_^]\d)\s+(?=\.?\d)")


def spaced_thousands(text: str) -> str:
    r"""Remove a LaTeX separator or a space between groups of three digits.

    >>> spaced_thousands(r"10{,}080")
    '10080'
    """
    return _SPACED_THOUSANDS.sub("", text)


def comma_thousands(text: str) -> str:
    """Remove commas between groups of three digits, but not inside brackets: (1,000) is a pair.

    >>> comma_thousands("1,000,000")
    '1000000'
    """
    return _COMMA_THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)


def _repeating(found: re.Match[str]) -> str:
    whole, start, period = found.groups()
    shifted = "0" * len(start) + period
    return f"({whole}.{start}0+.{shifted}/(1-.1^{len(period)}))"


def overlined_periods(text: str) -> str:
    r"""Write a repeating decimal as a geometric series.

    >>> overlined_periods(r"0.1\overline{6}")
    '(0.10+.06/(1-.1^1))'
    """
    return _OVERLINED_PERIOD.sub(_repeating, text)


def dotted_periods(text: str) -> str:
    """Write a decimal that repeats three times before an ellipsis as a geometric series.

    >>> dotted_periods("0.333...")
    '(0.0+.3/(1-.1^1))'
    """
    return _DOTTED_PERIOD.sub(_repeating, text)


def bare_arguments(text: str) -> str:
    r"""Add braces around one digit after a command.

    >>> bare_arguments(r"\frac12")
    '\\frac{1}{2}'
    """
    return _BARE_SECOND_ARGUMENT.sub(r"\\\1{\2}", _BARE_ARGUMENT.sub(r"\\\1{\2}", text))


def mixed_numbers(text: str) -> str:
    r"""Write a mixed number as a sum.

    >>> mixed_numbers("1 4/5"), mixed_numbers(r"1\frac{4}{5}")
    ('(1+\\frac{4}{5})', '(1+\\frac{4}{5})')
    """
    return _MIXED_FRACTION.sub(r"(\1+\2)", _MIXED_SLASH.sub(r"\\frac{\1}{\2}", text))


def number_gaps(text: str) -> str:
    """Keep two numbers apart with a token that the parser rejects: 7 8 is not 56.

    >>> number_gaps("7 8")
    '7#8'
    """
    return _NUMBER_GAP.sub("#", text)


# ---- Rewrites: functions, sets and relations ----

_INVERSE_FUNCTION = re.compile(r"\\?(sin|cos|tan)\s*\^\s*(?:\{\s*-\s*1\s*\}|-1)")
_CHOOSE = re.compile(r"\{(?=[^{}]*+\})([^{}]*)\\choose([^{}]*)\}")
_SET_BUILDER = re.compile(
    r"\\\{\s*[a-z]\s*(?:\\in\s*\(-∞,∞\)\s*)?(?:\||:|\\mid)"
    r"(?=.{0,100}?(?:[<>=≤≥≠∈]|\\[gln][et]))"  # the bar is followed by a condition
)
_REALS_WITHOUT = re.compile(r"\(-∞,∞\)\s*(?:\\setminus|\\backslash|∖)\s*\\?\{([^,{}\\]*)\\?\}")
_ELEMENT_OF = re.compile(r"^([\s$]*)\w\s*(?:∈|\\in(?![a-z]))")
_UNEQUAL = re.compile(r"^[\s$]*\w\s*(?:≠|!=|\\neq?(?![a-z]))(.*)$")
_ABOUT_AT_START = re.compile(r"^(\s*+\$*+\w*+)\s*+(?:\\approx|≈)")
_ABOUT = re.compile(r"(?:\\approx|\\simeq|≈).*")


def inverse_functions(text: str) -> str:
    r"""Write the inverse of a trigonometric function by its name.

    >>> inverse_functions(r"\tan^{-1} x")
    '\\arctan  x'
    """
    return _INVERSE_FUNCTION.sub(r"\\arc\1 ", text)


def choose(text: str) -> str:
    r"""Write a binomial coefficient as a command with two arguments.

    >>> choose(r"{5 \choose 2}")
    '\\binom{5 }{ 2}'
    """
    return _CHOOSE.sub(r"\\binom{\1}{\2}", text)


def set_builders(text: str) -> str:
    r"""Keep only the condition of a set.

    >>> set_builders(r"\{x \mid x > 3\}")
    '\\{ x > 3\\}'
    """
    return _SET_BUILDER.sub(r"\\{", text)


def reals_without(text: str) -> str:
    r"""Write the real numbers without one number as two intervals.

    >>> reals_without(r"(-∞,∞) \setminus \{3\}")
    '(-∞,3)∪(3,∞)'
    """
    return _REALS_WITHOUT.sub(r"(-∞,\1)∪(\1,∞)", text)


def elements(text: str) -> str:
    r"""Drop the name of an element.

    >>> elements(r"x \in [2, 7]")
    ' [2, 7]'
    """
    return _ELEMENT_OF.sub(r"\1", text)


def unequal(text: str) -> str:
    r"""Write an excluded number as two intervals.

    >>> unequal(r"x \ne 3")
    '(-∞, 3)∪( 3,∞)'
    """
    found = _UNEQUAL.match(text)
    if not found:
        return text
    excluded = found[1].rstrip(".$ \t\n")
    return f"(-∞,{excluded})∪({excluded},∞)"


def approximations(text: str) -> str:
    r"""Keep an approximate answer, but drop one that follows an exact answer.

    >>> approximations(r"x \approx 11"), approximations(r"x = 1/3 \approx 0.33")
    ('x= 11', 'x = 1/3 ')
    """
    return _ABOUT.sub("", _ABOUT_AT_START.sub(r"\1=", text))


# ---- Rewrites: units ----

_UNIT_WORD = re.compile(
    r"(?<=[\d)}\"])(?:\s|\\[,;:!])*"
    r"((?:[ckm]m|k?g|m[lg]|min|hr|in|ft)\b|[A-Za-z]{4,})(?![\"\w(])"
)
_PER_UNIT = re.compile(r"(?<=\")\s*(?:/|per\b)\s*([a-z]+)\b(?!\")")


def unit_words(text: str) -> str:
    """Quote a word that follows a number.

    >>> unit_words("5 cm"), unit_words("5 pens")
    ('5 "cm"', '5 "pens"')
    """
    return _UNIT_WORD.sub(r' "\1"', text)


def per_units(text: str) -> str:
    """Quote a unit that divides another.

    >>> per_units('60 "km" per hour')
    '60 "km"/"hour"'
    """
    return _PER_UNIT.sub(r'/"\1"', text)


REWRITES = (
    # The order matters: numbers are read after the text commands around them are gone.
    drop_invisible,
    raised_digits,
    lowered_digits,
    vulgar_fractions,
    real_numbers,
    degree_signs,
    compatible_characters,
    text_commands,
    matrices,
    spaced_thousands,
    comma_thousands,
    dotted_periods,
    overlined_periods,
    latex_spaces,
    inverse_functions,
    set_builders,
    reals_without,
    choose,
    bare_arguments,
    mixed_numbers,
    number_gaps,
    elements,
    unequal,
    unit_words,
    per_units,
    approximations,
)


def normalize(text: str) -> str:
    r"""Apply all rewrites.

    >>> normalize(r"1\frac12 \text{ km}")
    '(1+\\frac{1}{2})   "km" '
    """
    for rewrite in REWRITES:
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

r"""One spelling for each thing: LaTeX, unicode and plain text become tokens (see grader.py).

Departure from LaTeX parsers: no grammar of LaTeX but three tables. _REWRITES are patterns over the
text, in order, for what concerns more than one token; _TOKEN cuts it; _SPELT renames single tokens.
Every pattern is linear or bounded, and at most 500 characters are read: no text can make it hang.
"""

import functools
import re
import unicodedata
from fractions import Fraction
from typing import Any

MAX_CHARS = 500

# fmt: off
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan",
    "exp", "ln", "log", "lg", "gcd", "lcm", "min", "max",
}
_SPELT = {  # the token that the reader knows: other ways of writing it ("" for none)
    "≤": r"\le \leq \leqslant \leqq ⩽ <= =<", "≥": r"\ge \geq \geqslant \geqq ⩾ >=", "<": r"\lt",
    ">": r"\gt", "=": r"\equiv ≡", "≠": r"\ne \neq != /=", "∈": r"\in",
    "±": r"\pm", "∓": r"\mp", "-": "− – — ‐", "^": "**", "/": r"\div ÷ ⁄ : per", "'": "’ ′",
    "·": r"\cdot \times \ast × ⋅ ∙ • ∗ *", "∅": r"\emptyset \varnothing ⌀", "π": r"\pi pi",
    "∞": r"\infty infinity inf", "|": r"\lvert \rvert \vert \mid ∣", "⌊": r"\lfloor", "ℝ": r"\R",
    "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil", "(": r"\langle \lparen ⟨ 〈", "√": r"\sqrt",
    ")": r"\rangle \rparen ⟩ 〉", "[": r"\lbrack", "]": r"\rbrack", "⦃": r"\{ \lbrace",
    "⦄": r"\} \rbrace", "¶": r"\\ \cr", "Σ": r"\sum", "Π": r"\prod", "∖": r"\setminus \backslash",
    "°": r"\circ \degree degree degrees",
    "frac": r"\frac \dfrac \tfrac \cfrac", "binom": r"\binom \dbinom \tbinom", '"yen"': "¥",
    "%": r"\% percent percentage pct", '"dollar"': r"\$ \textdollar", '"euro"': r"€ \euro",
    '"pound"': r"£ \pounds", ",": r"and or ∪ \cup \bigcup",
    "1": "one", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven",
    "8": "eight", "9": "nine", "10": "ten", **{name: f"\\{name}" for name in FUNCTIONS},
    "": r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \textstyle
        \limits \angle \triangle \rm \bf \it \vec \overrightarrow \bar \hat \overline \underline
        $ ~ \, \; \: \! \> \( \) \[ \]""",
}
_SAME = {other: token for token, others in _SPELT.items() for other in others.split()}
UNITS: dict[str, tuple[str, Any]] = {  # word: (what it measures, how many of the base unit)
    word: (kind, Fraction(size))
    for kind, sizes in {
        "metre": {
            "1/1000": "mm millimeter", "1/100": "cm centimeter", "1": "m meter metre",
            "1000": "km kilometer kilometre", "127/5000": "in inch inche",
            "381/1250": "ft feet foot", "1143/1250": "yd yard", "201168/125": "mi mile",
        },
        "gram": {"1/1000": "mg milligram", "1": "g gram", "1000": "kg kilogram"},
        "second": {"1": "s sec second", "60": "min minute", "3600": "h hr hour", "86400": "day"},
        "litre": {"1/1000": "ml mL milliliter", "1": "l L liter litre"},
        "pound": {"1": "pound"}, "yen": {"1": "yen"},
        "dollar": {"1": "dollar usd", "1/100": "cent"}, "euro": {"1": "euro"}, "%": {"1/100": "%"},
        "": {"1": "unit", "1000": "thousand", "1000000": "million", "1000000000": "billion"},
    }.items() for size, words in sizes.items() for word in words.split()
} | {"°": ("°", Fraction(1))}
KINDS = {kind for kind, _ in UNITS.values()}
_SHORT = "|".join(word for word in UNITS if 1 < len(word) < 4)
NO_UNIT = {
    "maybe", "unless", "except", "than", "least", "most", "about", "from", "only", "wrong", "more",
    "less", "when", "with", "never", "even", "odd",
}
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|"
    "phi|varphi|chi|psi|omega|ell|Gamma|Delta|Theta|Lambda|Phi|Psi|Omega"
)
_LETTER = rf"(?:\\(?:{_GREEK})|[A-Za-z])(?![A-Za-z])(?:_(?:\{{[^{{}}]*\}}|\\[a-z]+|\w))?'*"
NAME = re.compile(  # what may stand left of = only to say what the answer is: x, AB, |AB|, (p, q)
    rf"\|?(?:[A-Z]{{2,}}|{_LETTER}(?:\([^()]*\))?)\|?(?:/(?:[A-Z]+|{_LETTER}))?"
    rf"|\({_LETTER}(?:,{_LETTER})*\)|frac\{{[A-Z]+\}}\{{[A-Z]+\}}"
)
_TOKEN = re.compile(  # f(x) and, left of =, P(A) are names; 6.7e-5, 5e3 and 1e-5 numbers, 2e-1 not
    rf"[fg]'*\([^()]*\)|{_LETTER}(?:\([^()]*\)(?=\s*[=<≤]))?|\\[A-Za-z]+|\\.|\"[^\"]*\"|\*\*|[<>!/]="
    r"|=<|(?:\d+\.\d+[eE][+-]?|\d+[eE]|1[eE]-)\d{1,3}\b|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\S"
)
_WORD = re.compile(r"(?=.*[a-z]).{4,}|.[eiou].|..[eiou]|(?i:no|yes|odd|an)")  # not mn, RC, abc
_MATRIX = r"\s*\{(?:array|[pbB]?(?:small)?matrix)\}"


def _nfkc(found: re.Match[str]) -> str:
    """Full-width, raised and styled characters made plain; invisible ones dropped."""
    plain = unicodedata.normalize("NFKC", found[0]).replace("−", "-")
    return "".join(c for c in plain if c.isspace() or unicodedata.category(c)[0] != "C")


def _repeating(found: re.Match[str]) -> str:
    r"""0.1\overline{6} as a fraction."""
    whole, fixed, period = found.groups()
    top = int(whole + fixed + period) - int(whole + fixed or 0)
    return rf"\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"


_REWRITES: list[tuple[re.Pattern[str], Any]] = [  # what concerns more than one token, in this order
    (re.compile(pattern), new)
    for pattern, new in [
        (r"[²³¹⁰⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{_nfkc(m)}}}"),
        (r"[₀-₉]+", lambda m: f"_{{{_nfkc(m)}}}"),
        (r"[¼-¾⅐-⅞]", lambda m: r"\frac{" + _nfkc(m).replace("⁄", "}{") + "}"),
        (r"ℝ|\\mathbb\s*\{?R\}?|(?:all\s+)?real\s+numbers", r"\\R "),
        (r"[º˚]", "°"),
        (r"(?s).+", _nfkc),
        (r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?", "°"),
        *[(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|tt|cal)|boldsymbol|bm|"
           r"emph|operatorname)\s*\{([^{}]*)\}",  # words are quoted: m in `3\text{ m}` is a metre
           lambda m: re.sub(r"\b(?:[A-Za-z]{2,}|[mgshlL])\b", r'"\g<0>"', f" {m[1]} "))] * 3,
        (rf"\\begin{_MATRIX}(?:\s*\{{[clr|\s]+\}})?", "⟦"),
        (rf"\\end{_MATRIX}", "⟧"),
        (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ | |,\s*\\!)\s*(?=\d{3}(?![\d/]|\s*\\?/))", ""),  # 10{,}080
        (r"(?<=\d)\{,\}(?=\d)", "."),  # 3{,}5 is the continental 3.5
        (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating),
        (r"(\d*)\.(\d{0,9}?)(\d{1,9}?)\3{2,}(?:\.\.\.|\\[lc]?dots)", _repeating),
        (r"(?<!\\)\\(?:\s|$|q?quad)", " "),
        (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\(?\s*\\?[pb]?mod\s*\{?\s*(\w+)\s*\}?\s*\)?", r' "modulo\1"'),
        (r"\\([dt]?frac|sqrt|[dt]?binom)\s*(\d)", r"\\\1{\2}"),  # \frac12 is 1/2
        (r"\\([dt]?(?:frac|binom)\s*\{[^{}]*\})\s*(\d)", r"\\\1{\2}"),
        (r"(?<=\d) (\d+)\s*/\s*(\d+)", r"\\frac{\1}{\2}"),  # 1 4/5 and 1\frac45 are sums
        (r"(?<![\d.^_])(\d+)\s*(\\[dtc]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})", r"(\1+\2)"),
        (r"\"?\b(?:sq(?:uare)?|(cubic))\b\"?\s*\"?([a-z]+)\"?",
         lambda m: f'"{m[2]}"^{2 + bool(m[1])}'),
        (r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\R\s*)?(?:\||:|\\mid)(?=.*[<>=≤≥≠∈]|.*\\[gln][et])",
         r"\\{"),  # {x | x > 3}
        (rf"(?<=[\d)}}\"])\s*((?:{_SHORT})\b|[A-Za-z]{{4,}})(?![\"\w(])", r' "\1"'),  # 5 cm, 5 pens
        (r"(?<=\")\s*(?:/|per\b)\s*([a-z]+)\b(?!\")", r'/"\1"'),
        (r"^(\s*\$*\w*)\s*(?:\\approx|≈)", r"\1="),  # x ≈ 11 says 11, but x = 1/3 ≈ 0.33 says 1/3
        (r"(?:\\approx|\\simeq|≈).*", ""),
    ]
]
# fmt: on


@functools.lru_cache(1000)
def tokens(text: str) -> tuple[str, ...]:
    """LaTeX, unicode and plain ways of writing a thing become the same."""
    if len(text) > MAX_CHARS:
        raise OverflowError
    for pattern, new in () if text.isdecimal() else _REWRITES:
        text = pattern.sub(new, text)
    found: list[str] = []
    for token in _TOKEN.findall(text.strip(" *=")):
        word = token.strip('"')
        token = _SAME.get(word.lower() if word.isalpha() else word, "".join(token.split()))
        known = not token.isalpha() or token in _SPELT or token in UNITS or _WORD.fullmatch(token)
        found += [token] if known else token  # mn is m times n
    while found and found[-1] in (*".,:;", '"."', ""):
        found.pop()
    return tuple(token for token in found if token)


def words(found: tuple[str, ...]) -> str:
    """For answers in words: no case, articles, plural or punctuation; lists in any order."""
    dropped = {*".;!?", "the", "The", "a", "an"}
    kept = [word for token in found if (word := token.strip('"')) not in dropped]
    text = "".join(re.sub("(?<=[a-z]{3})s$", "", word) for word in kept).lower()
    return ",".join(sorted(text.split(",")))

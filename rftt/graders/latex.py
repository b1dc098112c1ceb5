r"""One spelling for each thing: LaTeX, unicode and plain text become tokens (see grader.py).

Departure from LaTeX parsers: no grammar of LaTeX but two tables. _REWRITES are patterns over the
text, in order, for what concerns more than one token; _SPELT names single tokens. Every pattern is
linear or bounded, and at most 500 characters are read: no text can make it hang.
"""

import functools
import re
import unicodedata
from typing import Any

MAX_CHARS = 500

# fmt: off
NAMES = "tanh|tan|sinh|sin|sec|min|max|log|ln|lg|lcm|gcd|exp|csc|cot|cosh|cos|arctan|arcsin|arccos"
_SPELT = {  # the token that the parser knows: other ways of writing it ("" for none)
    "≤": r"\le \leq \leqslant \leqq ⩽ <= =<", "≥": r"\ge \geq \geqslant \geqq ⩾ >=", "<": r"\lt",
    ">": r"\gt", "=": r"\equiv ≡", "±": r"\pm", "∓": r"\mp", "-": "− – — ‐", "^": "**", "'": "’ ′",
    "/": r"\div ÷ ⁄ : per", "·": r"\cdot \times × ⋅ ∙ • *", "π": r"\pi pi", "√": r"\sqrt",
    "∞": r"\infty infinity inf", "∅": r"\emptyset \varnothing", "|": r"\lvert \rvert \vert \mid",
    "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil", "(": r"\langle ⟨",
    ")": r"\rangle ⟩", "[": r"\lbrack", "]": r"\rbrack", "⦃": r"\{ \lbrace", "⦄": r"\} \rbrace",
    "¶": r"\\ \cr", "Σ": r"\sum", "Π": r"\prod", ",": r"; and or ∪ \cup \bigcup",
    "frac": r"\frac \dfrac \tfrac \cfrac", "binom": r"\binom \dbinom \tbinom", "10^6": "million",
    "°": r"\circ \degree degree", "%": r"\% percent pct percentage", '"dollar"': r"\$ dollar",
    '"pound"': r"£ \pounds", '"euro"': "€", '"m"': "meter", '"cm"': "centimeter",
    '"km"': "kilometer", '"kg"': "kilogram", '"g"': "gram", '"min"': "minute", '"h"': "hour hr",
    **{name: f"\\{name}" for name in NAMES.split("|")},
    '"in"': "inch inche", '"ft"': "foot feet", "1": "one", "2": "two",
    "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
    "": r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \textstyle
        \limits \angle \triangle \rm \bf \it \vec \overrightarrow \bar \hat \overline \underline
        $ ~ \, \; \: \! \> \( \) \[ \]""",
}
_REWRITES: list[tuple[str, Any]] = [  # what concerns more than one token, in this order
    (r"[\u200b-\u200f\u2060\ufeff\xad]|\\displaystyle", ""),  # invisible
    (r"[²³¹⁰⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}"),
    (r"[₀-₉]+", r"_{\g<0>}"),
    (r"(\d*)([¼-¾⅐-⅞])", r"(0\1+\2)"),
    (r"ℝ|\\mathbb\s*\{?R\}?|(?:all\s+)?real\s+numbers", r"(-∞,∞)"),
    (r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?|[º˚]", "°"),
    (r"(?s).+", lambda m: unicodedata.normalize("NFKC", m[0])),  # full-width, raised, styled
    *[(r"\\(?:text\w*|[mh]box|math\w+|boldsymbol|bm|emph|operatorname)\s*\{([^{}]*)\}",
       # words are quoted: m in 3\text{ m} is a metre
       lambda m: re.sub(r"\b(?:[A-Za-z]{2,}|[mgshlL])\b", r'"\g<0>"', f" {m[1]} "))] * 3,
    (r"\\begin\s*\{(?:array|\w*matrix)\}(?:\s*\{[clr|\s]+\})?", "⟦"),
    (r"\\end\s*\{(?:array|\w*matrix)\}", "⟧"),
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ | |,\s*\\!)\s*(?=\d{3}(?![\d/]|\s*\\?/))", ""),  # 10{,}080
    (r"(?<![\d,.(\[{])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)", lambda m: m[0].replace(",", "")),
    (r"(\d*)\.(\d*?)(?:\\overline\s*\{?(\d+)\}?|(\d+?)\4{2,}(?:\.{3}|\\[lc]?dots))",  # period
     lambda m: f"({m[1]}.{m[2]}0+.{'0' * len(m[2])}{m[3] or m[4]}/(1-.1^{len(m[3] or m[4])}))"),
    (r"(?<!\\)\\(?:\s|$|q?quad)", " "),
    (r"\\?(sin|cos|tan)\s*\^\s*(?:\{\s*-\s*1\s*\}|-1)", r"\\arc\1 "),
    (r"\\\{\s*[a-z]\s*(?:\\in\s*\(-∞,∞\)\s*)?(?:\||:|\\mid)(?=.*(?:[<>=≤≥≠∈]|\\[gln][et]))", r"\{"),
    (r"\(-∞,∞\)\s*(?:\\setminus|\\backslash|∖)\s*\\?\{([^,{}\\]*)\\?\}", r"(-∞,\1)∪(\1,∞)"),
    (r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"\\([dtc]?frac|sqrt|[dt]?binom)\s*(\d)", r"\\\1{\2}"),  # \frac12 is 1/2
    (r"\\([dtc]?(?:frac|binom)\s*\{[^{}]*\})\s*(\d)", r"\\\1{\2}"),
    (r"(?<=\d) (\d+)\s*/\s*(\d+)", r"\\frac{\1}{\2}"),  # 1 4/5 and 1\frac45 are sums
    (r"(?<![\d.^_])(\d+)\s*(\\[dtc]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})", r"(\1+\2)"),
    (r"(?<=\d)(?<![_^]\d)\s+(?=\.?\d)", "#"),  # 7 8 is not 56
    (r"^([\s$]*)\w\s*(?:∈|\\in(?![a-z]))", r"\1"),  # x ∈ [2, 7] says [2, 7]
    (r"^[\s$]*\w\s*(?:≠|!=|\\neq?(?![a-z]))(.*?)[.\s$]*$", r"(-∞,\1)∪(\1,∞)"),
    (r"(?<=[\d)}\"])(?:\s|\\[,;:!])*((?:[ckm]m|k?g|m[lg]|min|hr|in|ft)\b|[A-Za-z]{4,})(?![\"\w(])",
     r' "\1"'),  # 5 cm, 5 pens
    (r"(?<=\")\s*(?:/|per\b)\s*([a-z]+)\b(?!\")", r'/"\1"'),  # km per hour
    (r"^(\s*\$*\w*)\s*(?:\\approx|≈)", r"\1="),  # x ≈ 11 says 11, but x = 1/3 ≈ 0.33 says 1/3
    (r"(?:\\approx|\\simeq|≈).*", ""),
]
UNIT = re.compile(  # percent, degree, or a word that may be one
    r'[%°]|"(?!(?:maybe|unless|except|than|least|most|about|from|only|wrong|more|less|when|with|never'
    r'|even)")(?:[^"]{3,}|[ckm]?m|k?g|m[lg]|min|in|ft|[shlL])"'
)
# fmt: on
_SAME = {other: token for token, others in _SPELT.items() for other in others.split()}
_LETTER = r"(?:\\(?!sum|prod|log)[A-Za-z]+|[A-Za-z])(?![A-Za-z])(?:_(?:\{[^{}]*\}|\\[a-z]+|\w))?'*"
NAME = re.compile(rf"{_LETTER}(?:\([^()]*\))?")
_TOKEN = re.compile(  # f(x) and, left of =, P(A) are names; 6.7e-5, 5e3 and 1e-5 numbers
    rf"[fg]'*\([^()]*\)|{_LETTER}(?:\([^()]*\)(?=\s*[=<≤]))?|\\[A-Za-z]+|\\.|\"[^\"]*\"|\*\*|[<>]="
    r"|=<|(?:\d+\.\d+[eE][+-]?|\d+[eE]|1[eE]-)\d{1,3}\b|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\S"
)
_WORD = re.compile(r"(?=.*[a-z]).{4,}|.[eiou]|..[eiou]|(?i:no|yes|odd|an)")  # not mn, RC, abc


@functools.lru_cache(1000)
def tokens(text: str) -> tuple[str, ...]:
    """LaTeX, unicode and plain ways of writing a thing become the same."""
    if len(text) > MAX_CHARS:
        raise OverflowError
    for pattern, new in () if re.fullmatch("[0-9]+", text) else _REWRITES:
        text = re.sub(pattern, new, text)
    found: list[str] = []
    for token in _TOKEN.findall(text.strip(" *=")):
        word = re.sub("(?<=[a-z]{3})s$", "", token.strip('"').lower())
        token = f'"{word}"' if token[0] == '"' else "".join(token.split())
        token = _SAME.get(word if word.isalpha() else token, token)
        known = not token.isalpha() or token in _SPELT or _WORD.fullmatch(token)
        found += [token] if known else token  # mn is m times n
    while found and found[-1] in (*".,:;", '"."', ""):
        found.pop()
    plus, minus = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
    if {*found} & {*"±∓"}:  # a set of both
        both = [t.translate(plus) for t in found], [t.translate(minus) for t in found]
        found = ["⦃", *both[0], ",", *both[1], "⦄"]
    return tuple(token for token in found if token)


def pointed(text: str, other: str) -> str:
    """1,5 is a list, but beside 1.5 a decimal."""
    comma = re.fullmatch(r"\W*(?:\d+,(?:\d{1,2}|\d{4,})|0,\d+)\D*", text)
    return text.replace(",", ".") if comma and re.search(r"\.\d", other) else text


def words(text: str) -> str:
    """For answers in words: no case, articles, plural or punctuation; lists in any order."""
    # articles go, but A is an answer
    kept = [t for t in tokens(text[:MAX_CHARS]) if t.strip('"') not in ("a", "an", "the", "The")]
    text = " ".join(kept).lower().replace('"', "")
    return ",".join(sorted(re.sub(r"(?<=\w{3})s\b|[ .;?]", "", text).split(",")))

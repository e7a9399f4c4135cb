"""Numbers as people and models write them, read exactly, as fractions: all of a text is understood, or nothing is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from srft.rewards.answers import tidy
from srft.rewards.arithmetic import evaluate_expression
from srft.rewards.units import UNITS, unit_of
from srft.rewards.words import CHANGES, bounds, changed_after, changes, denies, factor_of, part_scripts, says

MAX_NUMBER_CHARS = 200  # exact arithmetic on longer literals would cost more than it can be worth
MAX_EXPONENT = 1000  # of powers and of ten


@dataclass(frozen=True)
class Quantity:
    """A number with what stands beside it.

    Args:
        value: The number itself, before any percent sign: 50 for "50%".
        percent: Whether a percent sign follows.
        unit: Its unit in one spelling, "" where there is none or it is none that is known.
    """

    value: Fraction
    percent: bool = False
    unit: str = ""

    def equals(self, other: Quantity) -> bool:
        """Whether both say the same: 50% is 0.5 and, its sign left out, 50; a unit may be left out, not changed.

        Args:
            other: The number compared with; which is the answer's makes no difference.
        """
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.percent == other.percent:
            return self.value == other.value
        share, plain = (self, other) if self.percent else (other, self)
        return plain.value in (share.value, share.value / 100)


GROUPED = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])"
"""A whole number with commas between its thousands; 0,123 is a decimal of other countries."""
_DECIMAL = re.compile(rf"(?P<whole>{GROUPED}|[1-9][0-9]{{0,2}}(?: [0-9]{{3}})+|[0-9]*)(?P<point>\.[0-9]*)?"
                      r"(?:\\(?:overline|bar|dot)\s*\{?(?P<repeat>[0-9]+)\}?|\((?P<repeat2>[0-9]+)\))?"
                      r"(?:[eE](?P<exponent>[-+]?[0-9]{1,4}))?")  # fmt: skip
_TIMES = r"\s*(?:\*|\\times|\\cdot|x)\s*"
_SCIENTIFIC = re.compile(
    rf"(?P<digits>[0-9.,]+){_TIMES}10\s*(?:\^|\*\*)\s*(?P<power>[-+]?[0-9]+|\{{\s*[-+]?[0-9]+\s*\}})"
)
_POWER = re.compile(r"(?P<base>[0-9]+)\s*(?:\^|\*\*)\s*(?P<power>[0-9]+|\{\s*[-+]?[0-9]+\s*\})")
_MIXED = re.compile(r"(?P<whole>[0-9]+)(?P<rest>\s+[0-9]+\s*/\s*[0-9]+|\s*\\frac.*)", re.DOTALL)


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    whole, point = match["whole"].replace(",", "").replace(" ", ""), match["point"] or ""
    repeat = match["repeat"] or match["repeat2"]
    if not (whole or point[1:] or (repeat and point)) or (repeat and not point):
        return None
    places = len(point[1:])
    value = Fraction(int((whole + point[1:]) or "0"), 10**places)
    if repeat:
        value += Fraction(int(repeat), 10**places * (10 ** len(repeat) - 1))
    exponent = int(match["exponent"] or 0)
    return None if abs(exponent) > MAX_EXPONENT else value * Fraction(10) ** exponent


def _arguments(text: str, count: int) -> tuple[list[str], str] | None:
    """The first ``count`` LaTeX arguments, braced or single digits, and what follows them."""
    found: list[str] = []
    for _ in range(count):
        text = text.lstrip()
        if not text.startswith("{"):
            if not text[:1].isdigit():
                return None
            found.append(text[0])
            text = text[1:]
            continue
        depth = 0
        for place, character in enumerate(text):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                found.append(text[1:place])
                text = text[place + 1 :]
                break
        else:
            return None
    return found, text


def _ratio(top: Fraction | None, bottom: Fraction | None) -> Fraction | None:
    return None if top is None or not bottom else top / bottom


def read_number(text: str, depth: int = 0) -> Fraction | None:
    """Return the exact value of a text that is one number and nothing else; None of anything else.

    Args:
        text: From :func:`tidy`: a sign, decimals with thousands in groups, repeating decimals, exponents, fractions,
            mixed numbers, whole powers, parentheses.
        depth: Of the nesting, given to itself.
    """
    text = text.strip()
    if depth > 6 or not text or len(text) > MAX_NUMBER_CHARS:
        return None
    if text[0] in "+-" and text[1:].lstrip()[:1] not in ("+", "-"):
        value = read_number(text[1:], depth + 1)
        return value if value is None or text[0] == "+" else -value
    if text[0] + text[-1] in ("()", "{}") and _is_enclosed(text):
        # (1,234) is a point
        return None if text[0] == "(" and "," in text else read_number(text[1:-1], depth + 1)
    if (value := _decimal(text)) is not None:
        return value
    if match := _SCIENTIFIC.fullmatch(text):
        digits, power = _decimal(match["digits"]), int(match["power"].strip("{} "))
        return None if digits is None or abs(power) > MAX_EXPONENT else digits * Fraction(10) ** power
    if match := _POWER.fullmatch(text):
        base, power = int(match["base"]), int(match["power"].strip("{} "))
        if base.bit_length() * abs(power) > 10_000 or (base == 0 and power <= 0):
            return None
        return Fraction(base) ** power
    if match := _MIXED.fullmatch(text):
        whole, rest = int(match["whole"]), read_number(match["rest"].strip(), depth + 1)
        # an improper fraction beside a whole number may as well be a product
        return whole + rest if rest is not None and 0 <= rest < 1 else None
    if text.startswith(r"\frac"):
        parts = _arguments(text[5:], 2)
        if parts is None or parts[1].strip():
            return None
        return _ratio(read_number(parts[0][0], depth + 1), read_number(parts[0][1], depth + 1))
    top, slash, bottom = text.partition("/")
    if slash and "/" not in bottom and bottom.strip()[:1] not in ("-", "+") and not re.search(r"[0-9]\s+[0-9]", bottom):
        return _ratio(read_number(top, depth + 1), read_number(bottom, depth + 1))
    return None


def _is_enclosed(text: str) -> bool:
    depth = 0
    for place, character in enumerate(text):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(character, 0)
        if depth == 0:
            return place == len(text) - 1
    return False


_CURRENCY = "$€£¥₹"
_BEFORE = re.compile(
    rf"(?P<words>.*?)\s*(?P<sign>[-+])?\s*(?P<currency>[{_CURRENCY}])?\s*(?P<sign2>[-+])?\s*(?P<open>(?:[({{]\s*)+[-+]?\s*)?",
    re.DOTALL,
)
_START = re.compile(r"[0-9]|\.[0-9]|\\frac(?![a-zA-Z])")
_CORE = re.compile(
    r"(?:[0-9.,(){}^*/+\-\s]|\\frac(?![a-zA-Z])|\\(?:overline|bar|dot)(?![a-zA-Z])|\\(?:times|cdot)(?![a-zA-Z])"
    r"|(?<=[0-9.])[eE](?=[-+]?[0-9])|(?<=[0-9.\s])x(?=\s*10\s*(?:\^|\*\*)))+"
)
_PERCENT = re.compile(
    r"\s*(?:%|(?:percent|per cent|pct)(?![a-z])(?: points?)?|percentage points?"
    r"|(?:prozent|pour cent|por ciento|por cento|per cento|процент(?:а|ов)?)(?![^\W\d_]))",
    re.IGNORECASE,
)
_RAISED_UNIT = re.compile(r"(?<![a-zA-Z\\])([a-zA-Z]{1,12})\s*\^\s*(?:\{\s*([23])\s*\}|([23])(?![0-9]))")
_RATE = re.compile(r"(?P<words>[a-zA-Z\s]*)\s(?:in|per|for|every|after|within)\s+[0-9]+\s+[a-zA-Z][a-zA-Z\s]*")


def _flatten(text: str) -> str:
    """Tidy text without \\text{}, escapes and \\circ, units' powers as characters."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1", part_scripts(tidy(text).replace("{,}", ",")))
    # bold text, not a power
    text = re.sub(r"\*\*(?![0-9{(])|(?<![0-9)}\s])\*\*|^\*\*|\s\*\*(?=[0-9])(?=.*\*\*)", " ", text)
    text = text.replace(r"\%", "%").replace(r"\$", "$").replace(r"\&", "&")
    text = re.sub(r"\^\s*\\circ\s*([CF])(?![a-zA-Z])", r" °\1", text)
    text = re.sub(r"\^\s*\\circ(?![a-zA-Z]|\s*!)", " degrees", text)

    def raise_unit(match: re.Match[str]) -> str:
        name = match[1] if len(match[1]) == 1 else match[1].lower()
        is_unit = name in UNITS or name in ("unit", "units")
        return f"{match[1]}{'²' if '2' in (match[2], match[3]) else '³'}" if is_unit else match[0]

    return _RAISED_UNIT.sub(raise_unit, text).strip()


def _leading_words(words: str, signed: bool) -> bool | None:
    """Whether the words before a number negate it; None when they make something else of it."""
    words = words.strip().strip("*").strip()
    if not words:
        return False
    if denies(words) or bounds(words):
        return None
    if words[-1].isalpha() or words[-1] in ")'":
        names = re.findall(r"(?:[^\W\d_]|')+", words)
        last = names[-1].lower() if names else ""
        if last in ("minus", "negative"):
            names.pop()
            if signed or (CHANGES & {name.lower() for name in names}) - {"to"}:
                return None
            return True
        if not says(last) and (signed or len(names) > 2 or len(last) == 1):
            return None
    elif words[-1] not in ":=,.~" and not words.endswith((r"\approx", r"\to")):
        return None
    if re.search(r"[<>|^_*/+\[\]#]|\\(?!approx|[a-z]*(?:alpha|beta|theta|lambda|phi))", words.rstrip("*")):
        return None
    found = {name.lower() for name in re.findall(r"[a-zA-Z']+", words)}
    if "=" in words or ":" in words:
        found -= {"no", "point"}
    return None if (CHANGES - {"to"}) & found or "-" in re.sub(r"[a-zA-Z]-[a-zA-Z]", "", words) else False


def _trailing(text: str) -> tuple[Fraction, bool, str] | None:
    """Factor, percent sign and unit that follow a number; None when more follows than that."""
    percent = _PERCENT.match(text)
    if percent:
        text = text[percent.end() :]
    attached = bool(text) and text[0].isalpha() and not percent
    if rate := _RATE.fullmatch(text):
        text = rate["words"]
    if re.search(r"[0-9\\<>=|^_*+#&\[\]{}:]|\.\.|…|^\s*'|(?<![a-zA-Z])\s*!|-\s|-$", text.rstrip(":")):
        return None
    if re.search(rf"[^\w\s.,;:'\"()?!/°µ¢²³{_CURRENCY}-]", text):
        return None
    factor, text = factor_of(text)
    attached = attached and factor == 1
    words = re.findall(rf"(?:[^\W\d_]|[°µ¢])+[²³]?(?:'[a-z]+)?|[{_CURRENCY}]|/", text)
    unit = unit_of(words)
    if not unit:
        if changed_after(words) or denies(text) or (attached and words):
            return None
        # a letter alone is a variable
        if any(len(word) == 1 and word.isascii() and word not in _CURRENCY + "/aAI" for word in words):
            return None
        unit = next((found for size in (3, 2, 1) if (found := unit_of(words[:size]))), "")
    elif attached and len(words[0].rstrip("²³")) == 1 and words[0].rstrip("²³") not in "mgshLl":
        return None
    return Fraction(factor), bool(percent), unit


def read_quantity(text: str) -> Quantity | None:
    """Return the one number that a text states, with its percent sign or unit; None if it states none or several.

    Args:
        text: As in "$1,234.50", "x = 5", "The answer is 5 dollars.", "50\\%", "5\\text{ cm}^2", "1 1/2", "3 million".
    """
    if len(text) > 2000:
        return None
    text = _flatten(text)
    *sides, last = re.split(r"(?<![<>!\\])=", text)
    start = _START.search(last)
    if start is None:
        return None
    before = _BEFORE.fullmatch(last[: start.start()])
    if before is None or (before["sign"] and before["sign2"]):
        return None
    sign = before["sign"] or before["sign2"]
    lead = last[: start.start()]
    if before["words"][-1:].isalnum() and len(lead) == len(before["words"]):
        return None
    words = f"{sides[0]}=" + before["words"] if sides and not _START.search(sides[0]) else before["words"]
    negated = _leading_words(words, bool(sign))
    if negated is None:
        return None
    rest = (before["open"] or "") + last[start.start() :]
    match = _CORE.match(rest)
    assert match is not None
    core = match[0].rstrip()
    while core and (core[-1] in "({^*/+-, " or (core[-1] == "." and not core[:-1].endswith("."))):
        if core[-1] == "." and not core[:-1][-1:].isdigit():
            break
        core = core[:-1]
    after = _trailing(rest[len(core) :])
    value = read_number(core)
    if after is None or value is None:
        return None
    factor, percent, unit = after
    if sign == "-" or negated:
        value = -value
    currency = before["currency"]
    if currency and unit and unit not in (currency, "cent"):
        # "$5 per hour" is five dollars, "$5 €" is nothing
        if unit in _CURRENCY:
            return None
        unit = currency
    found = Quantity(value * factor, percent, currency or unit)
    for number, side in enumerate(sides):
        if not _START.search(side):
            if number and not re.fullmatch(r"\s*[A-Za-z]\s*", side):
                return None
            continue
        other = read_quantity(side) or _computed(side)
        if other is None or not other.equals(found):
            return None
    return found


def _computed(side: str) -> Quantity | None:
    """What stands before an equals sign, worked out: "6 \\times 7"."""
    side = re.sub(r"\\times|\\cdot|(?<=[0-9)\s])x(?=[0-9(\s])", "*", side).replace(r"\div", "/")
    try:
        return Quantity(evaluate_expression(re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|\$", "", side))[0])
    except (ValueError, ZeroDivisionError):
        return None


_UNIT_AT_END = re.compile(
    r"(?:\\text\s*\{(?P<text>[^{}]*)\}|(?<=[\s}])(?P<word>[a-zA-Z]{2,}))(?P<power>\s*\^\s*\{?[23]\}?)?\s*$"
)


def unit_after(text: str) -> tuple[str, bool, str]:
    """Return an expression without the percent sign and the unit at its end, whether there was a sign, and the unit.

    Args:
        text: From :func:`tidy`, such as "2\\sqrt{3}\\text{ cm}", "\\frac{x}{2}\\%" or "x^\\circ".
    """
    percent = False
    if match := re.search(r"(?:\\?%|\\text\s*\{\s*percent\s*\})\s*$", text):
        text, percent = text[: match.start()].strip(), True
    angle = re.search(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text)
    if (match := re.search(r"\^\s*\\circ\s*$", text)) and not angle:
        return text[: match.start()].strip(), percent, "degree"
    match = _UNIT_AT_END.search(text)
    if match and text[: match.start()].strip():
        words = (match["text"] or match["word"]).replace("/", " / ").split()
        if match["power"] and words:
            words[-1] += "²" if "2" in match["power"] else "³"
        unit = unit_of(words)
        said = " ".join(words)
        plain = re.fullmatch(r"[a-zA-Z\s.²³]*", said) is not None and factor_of(said)[0] == 1 and not denies(said)
        if unit or (match["text"] is not None and plain and not any(map(changes, words))):
            return text[: match.start()].strip(), percent, unit
    return text, percent, ""

"""Where the answer stands in a completion, and what a data column says the answer is."""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect
from decimal import Decimal
from fractions import Fraction
from numbers import Rational, Real
from typing import Any


class BadGold(Exception):
    """The ground truth itself cannot be read, so the completion cannot be graded."""


_THOUGHT_OPENS = re.compile(r"<(?:think|thinking|thought)>|\[THINK\]", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(r"</(?:think|thinking|thought)>|\[/THINK\]", re.IGNORECASE)


def after_thinking(text: str) -> str:
    """Return what is judged: the part after the last end of a thought, nothing while a thought is open.

    Args:
        text: A completion. Where the prompt's template has opened the thought already, "<think>" belongs in front
            of it, or a thought that never ends would be judged.
    """
    ends = list(_THOUGHT_ENDS.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return "" if _THOUGHT_OPENS.search(rest) else rest


_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<open>\{)|\s+(?P<bare>[^\s{}$\\]+))|\\[{}]|[{}]")
# what may stand between two boxes that are offered together
_BOXES_TOGETHER = re.compile(r"[\s$,;.]*(?:\\text\s*\{)?\s*(?:and|or|,|;|/)?\s*\}?[\s$,;]*")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Return start, end and content of every \boxed{...}, \fbox{...} or brace-less "\boxed 2", by their start.

    Args:
        text: Any text; a box that is never closed does not count.
    """
    found: list[tuple[int, int, str]] = []
    # one pass, so that a completion that opens a thousand boxes costs no more than another
    opened: list[tuple[int, int] | None] = []
    for match in _BOX_TOKEN.finditer(text):
        if match["open"]:
            opened.append((match.start(), match.end()))
        elif match["bare"]:
            found.append((match.start(), match.end(), match["bare"].rstrip(".,")))
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened and (box := opened.pop()) is not None:
            found.append((box[0], match.end(), text[box[1] : match.start()]))
    return sorted(found)


def last_boxed(text: str) -> tuple[int, str] | None:
    """Return position and content of the last box, or None.

    Args:
        text: Any text; a box that is never closed does not count.
    """
    found = boxes(text)
    return (found[-1][0], found[-1][2]) if found else None


def final_box(text: str) -> tuple[int, str] | None:
    r"""Return position and content of the last box; boxes offered together, "\boxed{1} or \boxed{2}", are one list.

    Args:
        text: Any text; a box that is never closed does not count.
    """
    found = boxes(text)
    if not found:
        return None
    start, _, content = found[-1]
    if not content.strip():
        return start, content
    for earlier, end, other in reversed(found[:-1]):
        between = text[end:start]
        if end > start or len(between) > 40 or not _BOXES_TOGETHER.fullmatch(between) or not other.strip():
            break
        if other != content:
            content = f"{other} or {content}" if re.search(r"\bor\b", between) else f"{other}, {content}"
        start = earlier
    return start, content


_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def marked_answer(text: str, hashes: re.Pattern[str]) -> str | None:
    r"""Return what the last \boxed{}, <answer></answer> or line after '#' holds; None without any.

    Args:
        text: A completion without its thought.
        hashes: What the '#' mark looks like, the answer in its first group.
    """
    found = []
    if (boxed := final_box(text)) is not None:
        found.append(boxed)
    tagged = list(_TAGGED.finditer(text))
    found += [(match.start(), match[1]) for match in tagged]
    starts = [match.start() for match in tagged]
    for match in hashes.finditer(text):
        tag = tagged[place - 1] if (place := bisect(starts, match.start())) else None
        if tag is None or match.start() >= tag.end():
            found.append((match.start(), match[1]))
        # a mark begins a line; "C#" may be the answer itself
        elif not text[tag.start(1) : match.start()].rpartition("\n")[2].strip():
            found.append((match.start(), match[1].partition("</answer>")[0]))
    return max(found)[1].strip() if found else None


def last_line(text: str) -> str:
    """Return the last line that is not blank, stripped, or nothing.

    Args:
        text: Any text.
    """
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


# of East Asian type, but for its tilde, which says "to" where that of LaTeX is a space
_HALF_WIDTH: dict[str, str | int | None] = {
    **{chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7E)}, "。": ".", "、": ",", "\u3000": " "
}  # fmt: skip
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "✕": r"\times ", "·": r"\cdot ",
    "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ",
    "°": r"^\circ ", "√": r"\sqrt", "≈": r"\approx ", "±": r"\pm ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ", "\u200b": "", "\ufeff": "", "’": "'",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
}  # fmt: skip
_TABLE = str.maketrans({**_CHARACTERS, **_HALF_WIDTH})
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SIZES = r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|mathopen|mathclose)(?![a-zA-Z])"
_FONTS = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathsf|mathit|mathtt|ensuremath|underline)\s*\{([^{}]*)\}")
_WORD_FONTS = re.compile(r"\\(?:textbf|textit|textrm|textnormal|textup|mathrm|mbox|hbox)(?=\s*\{)")


_AROUND = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'))


def half_width(text: str) -> str:
    """Return a text with full-width letters, digits and signs of East Asian type as ASCII has them.

    Args:
        text: Any.
    """
    return text.translate(str.maketrans(_HALF_WIDTH))


def tidy(text: str) -> str:
    """Return a text in one spelling: LaTeX for characters that have it, no sizes, spacing, fonts, or outer marks.

    Args:
        text: LaTeX or plain text, between dollars or not.
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text.strip())
    text = unicodedata.normalize("NFC", text.translate(_TABLE))
    # a comma that belongs to a number; mathematics has no spaces around it
    text = re.sub(r"(,?)\s*\\!", lambda m: "{,}" if m[1] else "", text)
    text = re.sub(r"\s*\{,\}\s*", "{,}", text)
    text = re.sub(_SIZES, "", text)
    text = re.sub(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset", text)
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", "", text)
    text = re.sub(r"\\hspace\*?\s*\{[^{}]*\}", " ", text)
    text = re.sub(r"\\(?:[dtcs]|nice)frac", r"\\frac", text)
    text = re.sub(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = re.sub(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " ", text)
    text = _FONTS.sub(r"\1", text)
    text = re.sub(r"\{\s*\\rm(?![a-z])\s*([^{}]*)\}", r"\\text{\1}", text)
    text = _WORD_FONTS.sub(r"\\text", text).replace(r"^{\circ}", r"^\circ").replace(r"\degree", r"^\circ")
    text = re.sub(r"\\leq?(?:slant)?(?![a-zA-Z])", r"\\le", re.sub(r"\\geq?(?:slant)?(?![a-zA-Z])", r"\\ge", text))
    while True:
        text = text.strip()
        # a point ends a sentence, three of them say that digits are missing
        if text.endswith((".", ",", ";", ":")) and not text.endswith((r"\,", "..")):
            text = text[:-1]
            continue
        for opens, closes in _AROUND:
            inner = text[len(opens) : -len(closes)]
            if len(text) > len(opens + closes) and text.startswith(opens) and text.endswith(closes):
                if opens not in inner.replace(r"\$", "") and not inner.endswith("\\"):
                    text = inner
                    break
        else:
            return text


def decimal_text(number: Decimal) -> str:
    """Return a finite decimal written out, without an exponent where it is not huge or tiny: "18" for 18.0.

    Args:
        number: Any finite decimal.
    """
    plain = number.normalize()
    return format(plain, "f") if -20 < plain.adjusted() < 25 else str(plain)


def _without_noise(text: str) -> str:
    """A printed float whose digits end in the noise of arithmetic, as those of 3 * 1e-5 do, as what it stands for."""
    if len(re.sub(r"[^0-9]", "", text)) < 16 or not re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?", text):
        return text
    if text.isdecimal() or repr(float(text)) != text:
        return text
    # a double holds 15 digits for certain
    rounded = Decimal(f"{float(text):.14e}")
    return decimal_text(rounded) if len(rounded.normalize().as_tuple().digits) <= 12 else text


def printed(text: str) -> str:
    """Return a number or boolean as programs print it ("18.0", "1e-05", "True") in one spelling, other text as it is.

    Args:
        text: Leading zeros, added zeros ("1.10") and signs of groups are no program's and are kept apart.
    """
    text = unicodedata.normalize("NFC", text)
    if text.lower() in ("true", "false"):
        return text.lower()
    if re.fullmatch(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?", text):
        plain = decimal_text(Decimal(text))
        if text in (plain, f"{plain}.0") or text.lower() == repr(float(text)):
            return plain
    return text


def _number_text(value: Real | Decimal) -> str:
    """A number as a text that stands for exactly it."""
    if isinstance(value, Rational):
        return str(Fraction(int(value.numerator), int(value.denominator)))
    text = str(value)  # the shortest that gives it back, also for numpy's float32
    if not Decimal(text).is_finite():
        raise BadGold(f"the answer is {text}")
    return decimal_text(Decimal(_without_noise(text)))


def gold_text(answer: Any) -> str:
    """Return the answer of a data column as text, the same whatever type the column has.

    Args:
        answer: Text, bytes in UTF-8, a number of any type (18.0 is "18"), a boolean ("true"), or a list or array: of
            one element that element, of several their JSON.

    Raises:
        BadGold: On nothing, NaN, infinity, empty text, undecodable bytes or a mapping.
    """
    if not isinstance(answer, str | bytes | Real | Decimal) and callable(convert := getattr(answer, "tolist", None)):
        # numpy's arrays and booleans
        answer = convert()
    text = ""
    if answer is None or str(answer) in ("<NA>", "NaT"):
        raise BadGold(f"the answer is missing ({answer})")
    elif isinstance(answer, bytes):
        try:
            text = answer.decode().strip()
        except UnicodeDecodeError as error:
            raise BadGold(f"the answer is bytes that are no UTF-8: {answer!r:.80}") from error
    elif isinstance(answer, bool):
        text = str(answer).lower()
    elif isinstance(answer, Real | Decimal):
        text = _number_text(answer)
    elif isinstance(answer, list | tuple):
        if len(answer) == 1:
            return gold_text(answer[0])
        text = json.dumps(answer, ensure_ascii=False, default=str) if answer else ""
    elif isinstance(answer, dict):
        raise BadGold(
            f"the answer is a mapping with {', '.join(map(str, answer))}; set data.columns.answer to one of them"
        )
    else:
        text = _without_noise(str(answer).strip())
    if not text:
        raise BadGold("the answer is empty")
    return text

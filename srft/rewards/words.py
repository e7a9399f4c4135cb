"""Words beside a number that make another number of it, or none, in the languages that answers come in."""

from __future__ import annotations

import re

_FACTORS = {
    "hundred|hundert|сот(?:ен|ни|ня)|百|백": 100, "decenas?|dizaines?|десятк(?:ов|а)|十": 10,
    "dozens?|dutzend|docenas?|douzaines?|дюжин[аы]?": 12,
    "thousand|tausend|тысячи?|тысяча|тыс|千|천": 1000,
    "lakhs?": 10**5, "crores?": 10**7, "[万萬만]": 10**4, "[亿億억]": 10**8,
    "millions?|millionen|mill[oó]n|millones|milhão|milhões|milione|milioni|миллион(?:а|ов)?|млн": 10**6,
    "billions?|bn|milliarden?|milliards?|miliardo|miliardi|миллиард(?:а|ов)?|млрд": 10**9,
    "trillions?|bill[oó]n(?:es)?|兆|조": 10**12,
}  # fmt: skip
_FACTOR = re.compile(
    r"\s*(?:"
    + "|".join(f"(?P<f{factor}>{names})" for names, factor in _FACTORS.items())
    # a script without spaces has no end of a word
    + r")(?:(?<=[十百千万萬亿億兆백천만억조])|(?![^\W\d_]))\.?",
    re.IGNORECASE,
)
CHANGES = set(
    """
    above base below between cannot cos cubed divided doesn't don't double eight eighteen either eleven except exp
    factorial fifteen fifty five forty four fourteen half halves hundreds inf infinity isn't least ln log mod modulo
    most nan neither never nine nineteen no nor not one or over pi plus point power quarter quarters root seven
    seventeen sin six sixteen sqrt squared tan tau ten tens than third thirds thirteen thirty thousands three through
    to triple twelve twenty twice two wrong incorrect false invalid impossible under zero mil mille mila mio mrd
    viertel drittel fünftel achtel zehntel
    halb halbe demi demie medio половина половиной
    """.split()
)
"""Words after or before a number that make another number of it, or none."""
_NUMBERS = set(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty".split()
)
_JOINING = {"and", "or", "to", "times", "by", "over", "point", "plus", "minus", "through"}
# of scripts without spaces: "and a half", "or more", "or less"
_AROUND = re.compile(r"半|^以[上下内內外]|^이상|^이하|^미만|^초과")
_PARTS = re.compile(
    r"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|hundred|thousand|\w+illion|\w*teen|\w+tie)ths?|\w+illion\w*"
)
TELLING = set(
    "is are was were be equals equal to of about approximately answer get ist sind est sont es son é são è sono равен "
    "равна равно составляет".split()
)
"""Words that a number follows which they say nothing of."""
_SAYS = tuple("是为為はが은는이가")
_DENIES = re.compile(
    r"\b(?:not|cannot|never|neither|nor|[a-z]+n['’]t|nicht|keine?[nmrs]?|niemals|falsch|n['’]est|pas|jamais|fausse?"
    r"|nunca|jamás|incorrect[aeo]?|n[ãa]o|errad[ao]|non|nessuno|sbagliat[ao]|не|нет|ни|никогда|неверно|неправильно)\b"
    r"|[不没沒非无無未错錯誤違]|ない|なく|ません|아니|않|틀",
    re.IGNORECASE,
)
_BOUNDS = re.compile(
    r"\b(?:weniger|mehr|mindestens|höchstens|moins|menos|más|mayor|menor|mais|maior|больше|меньше|более|менее)\b"
    r"|[第超]|百分|[大小多少][于於]|至[少多]|最[大小少多]",
    re.IGNORECASE,
)
_SCRIPT = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
_SCRIPTS_MEET = re.compile(rf"(?<={_SCRIPT})(?=[-+0-9$.\\])|(?<=[0-9%])(?={_SCRIPT})")


def factor_of(text: str) -> tuple[int, str]:
    """Return what the words that a text begins with multiply the number before them by, and the rest of the text.

    Args:
        text: What follows a number: "million dollars", "万元".
    """
    factor = 1
    while match := _FACTOR.match(text):
        assert match.lastgroup is not None
        factor *= int(match.lastgroup[1:])
        text = text[match.end() :]
    return factor, text


def changes(word: str) -> bool:
    """Whether a word beside a number makes another number of it, or none: "18 ninths", "18 quadrillion", "over 18".

    Args:
        word: In any case.
    """
    word = word.lower()
    return word in CHANGES or _PARTS.fullmatch(word) is not None


def changed_after(words: list[str]) -> bool:
    """Whether words after a number make another number of it, or none; "42 days to finish" and "$42 for three" do not.

    Args:
        words: In order.
    """
    for i, word in enumerate(words):
        lower, next_one = word.lower(), words[i + 1].lower() if i + 1 < len(words) else ""
        if lower in _NUMBERS and i and words[i - 1].lower() not in _JOINING:
            continue
        if lower == "to" and next_one not in _NUMBERS:
            continue
        if changes(lower) or _AROUND.search(word):
            return True
    return False


def denies(text: str) -> bool:
    """Whether words beside a number say that it is not the answer, in one of the languages known here.

    Args:
        text: What stands before or after it.
    """
    return _DENIES.search(text) is not None


def bounds(text: str) -> bool:
    """Whether words before a number, of another language than English, make a bound, a rank or a share of it.

    Args:
        text: What stands before it.
    """
    return _BOUNDS.search(text) is not None


def says(word: str) -> bool:
    """Whether a word leads to a number of which it says nothing: "is", "ist", "равно", "答案是".

    Args:
        word: The last one before the number.
    """
    return word.lower() in TELLING or word.endswith(_SAYS)


def part_scripts(text: str) -> str:
    """Return a text with spaces between numbers and the letters of languages that write none.

    Args:
        text: As in "答案是18。".
    """
    return _SCRIPTS_MEET.sub(" ", text)

"""Units of measurement and money in one spelling each."""

from __future__ import annotations

_NAMES = {
    "$": "$ dollar dollars usd", "€": "€ euro euros eur", "£": "£ pound_sterling gbp", "¥": "¥ yen jpy yuan",
    "₹": "₹ rupee rupees rs inr", "cent": "¢ cent cents", "degree": "degree degrees deg",
    "radian": "radian radians rad", "celsius": "°c celsius", "fahrenheit": "°f fahrenheit",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres", "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres", "in": "in inch inches", "ft": "ft foot feet",
    "yd": "yd yard yards", "mi": "mi mile miles", "mg": "mg milligram milligrams", "g": "g gram grams",
    "kg": "kg kilogram kilograms", "lb": "lb lbs pound pounds", "oz": "oz ounce ounces",
    "ml": "ml milliliter milliliters millilitre millilitres", "l": "l liter liters litre litres",
    "gal": "gal gallon gallons", "ms": "ms millisecond milliseconds", "s": "s sec second seconds",
    "min": "min mins minute minutes", "h": "h hr hrs hour hours", "day": "day days", "week": "week weeks",
    "month": "month months", "year": "yr yrs year years", "n": "newton newtons", "j": "joule joules",
    "w": "w watt watts", "v": "v volt volts", "hz": "hz hertz",
}  # fmt: skip
UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_POWERS_OFUNITS = {"square": "²", "sq": "²", "squared": "²", "cubic": "³", "cu": "³", "cubed": "³"}


def unit_of(words: list[str]) -> str:
    """Return the unit that words name, with powers and "per"; "" when one of them is no unit.

    Args:
        words: As in ["square", "meters"], ["km", "/", "h"], ["cm²"].
    """
    parts: list[str] = []
    pending = ""
    for word in words:
        raised = "²³"["²³".index(word[-1])] if word[-1:] in ("²", "³") else ""
        bare = word.rstrip("²³").lower() if len(word.rstrip("²³")) > 1 else word.rstrip("²³")
        if word in ("/", "per", "a", "an"):
            parts.append("/")
        elif word.lower() in ("mph", "kph"):
            parts += [{"mph": "mi", "kph": "km"}[word.lower()], "/", "h"]
        elif bare.lower() in _POWERS_OFUNITS:
            if parts and bare.lower() in ("squared", "cubed"):
                parts[-1] += _POWERS_OFUNITS[bare.lower()]
            else:
                pending = _POWERS_OFUNITS[bare.lower()]
        elif bare in UNITS or bare.lower() in ("l", "w", "v"):
            parts.append(UNITS[bare.lower()] + (raised or pending))
            pending = ""
        else:
            return ""
    return "".join(parts)

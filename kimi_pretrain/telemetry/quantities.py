"""Numbers as people read them. Every unit and precision on the console and the report."""

import math
import unicodedata

_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
# Characters that reorder the text around them: a sample may not rearrange the page.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def count(number: float) -> str:
    """Three digits and a prefix: 950, 12.3k, 4.92M, 1.03T."""
    if not math.isfinite(number):
        return decimal(number, 0)
    for scale, prefix in _PREFIXES:
        # 999,500 is 1.00M: compare what will be printed.
        if abs(number) >= 0.9995 * scale:
            return f"{_three_digits(number / scale)}{prefix}"
    return f"{number:.0f}"


def tick(number: float) -> str:
    """As short as it gets, for the even numbers along an axis: 8k, 1.5k, 0.2, 1.5e-3."""
    for scale, prefix in _PREFIXES:
        if abs(number) >= scale:
            return f"{number / scale:g}{prefix}"
    if 0 < abs(number) < 0.0099:
        exponent = math.floor(math.log10(abs(number)) + 1e-9)
        return f"{number / 10.0**exponent:g}e{exponent}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Whole seconds as 0:07, 12:34, 1:02:03, or 3d 04:05 beyond a day."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def decimal(number: float | None, digits: int) -> str:
    """A fixed number of decimals; - for nothing, nan, inf and -inf for themselves."""
    return "-" if number is None else f"{number:.{digits}f}"


def percent(share: float | None) -> str:
    """A share of one in percent: two digits that matter, no more."""
    if share is None:
        return "-"
    return f"{100 * share:.1f}%" if abs(share) < 0.0995 else f"{100 * share:.0f}%"


def progress(step: int, total: int) -> str:
    """How far a run is, as wide at its first step as at its last."""
    return f"{step:>{len(str(total))}}/{total}"


def printable(text: str) -> str:
    """Text that no terminal or page obeys: controls but newline and tab become U+FFFD.

    A model over bytes may well write an escape sequence or half a character.
    """
    return "".join(
        "\ufffd"
        if character in _BIDI
        or (character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs"))
        else character
        for character in text
    )


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"

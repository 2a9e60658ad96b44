"""Numbers, SI prefixes, percentages and durations as text."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
LETTERS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_number(value: float | None, digits: int = 4) -> str:
    """Significant digits with separators: 1,234; 0.02500; 3.1e-7; a dash if unknown."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    tiny = size < -4
    text = f"{value:.{digits - 1}e}".replace("e-0", "e-") if tiny else f"{value:,.{max(0, digits - 1 - size)}f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def format_si(value: float | None, digits: int = 3) -> str:
    """With an SI prefix from thousands on, without trailing zeros: 2.05 M, 400, 0.3."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    for unit, letter in LETTERS:
        if abs(value) >= unit:
            return f"{strip_zeros(format_number(value / unit, digits))} {letter}"
    return strip_zeros(format_number(value, digits))


def strip_zeros(text: str) -> str:
    """Without trailing zeros of a decimal fraction."""
    mantissa, e, power = text.partition("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + e + power


def format_percent(value: float | None) -> str:
    """A fraction as percent: 27 %, 0.4 %."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = strip_zeros(format_number(100 * value, 2)) if abs(value) < 0.0995 else f"{100 * value:.0f}".replace("-", MINUS)
    return f"{text} %"


def format_duration(seconds: float | None) -> str:
    """A duration in s, min, h or days."""
    if seconds is None:
        return "\N{EN DASH}"
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"

"""How the report writes numbers, durations and foreign text. Pure functions, no dependency.

Text from models and users may contain anything. So besides HTML escaping (jinja's autoescape), control characters and
lone surrogates are made visible here, since they would make the page invalid or impossible to write as UTF-8.
"""

import math
from datetime import UTC, datetime

from markupsafe import Markup

MINUS = "−"
NOTHING = "–"


def number(value: object, *, signed: bool = False) -> str:
    """A readable number: three significant digits, thousands separated, tiny ones as powers of ten; text unchanged."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: MINUS + "∞"}.get(value, "not a number")
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        text = f"{size:,.0f}"
    elif size == 0:
        text = "0"
    elif size < 0.001:
        text = f"{size:.1e}".replace("e-0", "e-").replace("e-", "e" + MINUS)
    else:
        text = f"{size:.{max(0, min(3, 2 - math.floor(math.log10(size))))}f}"
    sign = MINUS if value < 0 else "+" if signed and value > 0 else ""
    return sign + text


def short(value: object, *, signed: bool = False) -> str:
    """As `number`, but with two decimals if the third is a zero: 0.70 instead of 0.700."""
    text = number(value, signed=signed)
    return text[:-1] if "." in text and text[-4] == "." and text[-1] == "0" else text


def percent(share: float) -> str:
    """A share in [0, 1] as `67 %` or `99.8 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def compact(value: float | None) -> str:
    """A count in few characters: 1.25 M, 48.2 k, 7."""
    if value is None:
        return NOTHING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as `8.4 s`, `2 min 13 s` or `1 h 04 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(created: str) -> str:
    """An ISO time as `24 Nov 2026, 10:43 UTC`; other text is returned unchanged."""
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return created
    time = time.astimezone(UTC)
    return f"{time.day} {time:%b %Y, %H:%M} UTC"


_CONTROLS = {*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)}  # all but tab and line feed
# Marks and overrides of the writing direction, which in a model's text could reverse the page's.
_DIRECTIONS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_SHOWN = {code: f"⟨U+{code:04X}⟩" for code in (*_CONTROLS, *_DIRECTIONS, *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}


def visible(value: object) -> object:
    """`value` with unprintable characters made visible, if it is text; our own markup is unchanged."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.translate(_SHOWN)
    return value

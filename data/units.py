"""Large numbers as people read them: three digits and a decimal prefix."""

from __future__ import annotations

COUNTED, MEASURED = ("", "k", "M", "B", "T"), ("", "k", "M", "G", "T", "P")


def in_bytes(count: float) -> str:
    """41.0 TB."""
    return measured(count, "B")


def measured(amount: float, unit: str) -> str:
    """22.1 GFLOP."""
    return f"{_short(amount, MEASURED)}{unit}"


def counted(amount: float) -> str:
    """401 B, for billions of things."""
    return _short(amount, COUNTED).rstrip()


def _short(amount: float, prefixes: tuple[str, ...]) -> str:
    power = 0
    while float(f"{amount:.3g}") >= 1000 and power < len(prefixes) - 1:  # 999.6 is 1.00 k already
        amount, power = amount / 1000, power + 1
    digits = 0 if power == 0 else max(0, 3 - len(str(int(float(f"{amount:.3g}")))))
    return f"{amount:,.{digits}f} {prefixes[power]}"

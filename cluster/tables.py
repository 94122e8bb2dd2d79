"""Figures as people read them in a terminal: tables, sizes, times."""

import os
from collections.abc import Sequence
from typing import IO


def table_text(
    rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), width: int | None = None, spare: Sequence[int] = ()
) -> str:
    """Rows, the first of them the head, in columns as wide as they need; those in `numeric` are flush right.

    Where that is more than `width`, columns of `spare` are left out, in this order, and then lines are cut.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = list(range(len(widths)))
    for column in spare:
        if width is None or sum(widths[at] + 2 for at in shown) - 2 <= width:
            break
        shown.remove(column)
    lines = [
        "  ".join(row[at].rjust(widths[at]) if at in numeric else row[at].ljust(widths[at]) for at in shown)
        for row in rows
    ]
    return "\n".join(cut_text(line.rstrip(), width) for line in lines)


def cut_text(text: str, width: int | None) -> str:
    """A line of at most `width` characters; the last one says that there was more."""
    return text if width is None or len(text) <= width else f"{text[: max(0, width - 1)]}…"


def width_of(stream: IO[str]) -> int | None:
    """Columns of the terminal that shows a stream; None where none does, and nothing has to be left out."""
    return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else None


def size_text(size: float) -> str:
    """Bytes for a reader: at most four digits and a decimal unit."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 99.95 else f"{size:.1f} {units[0]}"


def duration_text(seconds: float) -> str:
    """Seconds for a reader: two units at most."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def measured_text(name: str, value: float) -> str:
    """What a piece of work has measured, with its name; shares and accuracies in percent."""
    words = name.removesuffix("_share").replace("_", " ")
    is_share = name.endswith("_share") or "accuracy" in name
    if is_share:
        return f"{words} {100 * value:.1f} %"
    return f"{words} {value:,.0f}" if abs(value) >= 1000 else f"{words} {value:.4g}"


def rate_text(rate: float) -> str:
    """Pieces a second."""
    return f"{rate:,.{0 if rate >= 10 else 1}f}"


def shares_text(candidate: str, champion: str, share: float) -> str:
    """Which version of a roll-out answers whom."""
    others = f", version {champion} the others" if share < 1 else ""
    return f"version {candidate} answers {100 * share:g} % of users{others}"

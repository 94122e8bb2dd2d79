"""Figures as people read them in a terminal: tables, sizes, times."""

from collections.abc import Sequence


def table_text(rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Rows, the first of them the head, in columns as wide as they need; those in `numeric` are flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.rjust(width) if column in numeric else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


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

"""How values print: few enough lines for a screen, and a table in notebooks."""

import html
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "html_table", "shortened"]

COLUMNS = 120  # where nobody knows how wide it is shown
SCREEN = 40  # lines that a terminal shows at once, with the prompt


def console(**options: Any) -> "Console":
    """What prints tables and lines as they are: names of files and layers may look like rich's markup."""
    from rich.console import Console

    width = None if "width" in options or sys.stdout.isatty() else COLUMNS
    return Console(**{"width": width, "markup": False, "highlight": False, **options})


def shortened(lines: Sequence[str], what: str, most: int = SCREEN) -> list[str]:
    """The first and last lines, and how many are between them, where there are more than `most`."""
    if len(lines) <= most:
        return list(lines)
    half = most // 2
    return [*lines[:half], f"  ... {len(lines) - 2 * half:,} further {what} ...", *lines[-half:]]


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table for notebooks, which scrolls when it is long. Numbers are set to the right."""

    def cell(value: Any) -> str:
        number = isinstance(value, (int, float))
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}" if number else str(value)
        return f'<td style="text-align:{"right" if number else "left"}">{html.escape(text)}</td>'

    top = "".join(f'<th style="text-align:left">{html.escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f"<p><b>{html.escape(title)}</b></p>"
        f'<div style="max-height:30em;overflow:auto"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )

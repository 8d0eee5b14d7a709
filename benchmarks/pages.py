"""Tables that a benchmark writes to a page, between two comments."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end of the table -->"


def with_table(page: str, program: str, table: str) -> str:
    """Return `page` with `table` between the comments of `program`, a path in the repository."""
    begin = f"<!-- {program} writes this table -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{table}\n{END}{rest.split(END, 1)[1]}"


def write_table(page: Path, program: str, table: str) -> None:
    """Replace the page's table of `program`."""
    page.write_text(with_table(page.read_text(encoding="utf-8"), program, table), encoding="utf-8")

"""The CSV files in benchmarks/results: rows as dictionaries, only ever appended."""

import csv


def rows_at(path):
    """All rows of a file, a list of dictionaries; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path, row):
    """Add a row, with the columns that the file has or, as its first one, those of the row."""
    rows = rows_at(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0] if rows else row))
        if not rows:
            writer.writeheader()
        writer.writerow(row)


def write_section(page, script, text):
    """Put what a script writes between its two comments on a page."""
    begin, end = f"<!-- {script} -->\n", f"<!-- end of {script} -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    assert found, f"{page} has no {begin}"
    assert closed, f"{page} has no {end}"
    page.write_text(before + begin + text + end + after)

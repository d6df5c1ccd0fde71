"""Where generated tables stand in the pages: between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations


def with_table(text: str, table: str, name: str) -> str:
    """Return the page's text with the table in its place; everything around it stays as it is.

    Raises:
        ValueError: the page has no such place.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"no place for the table {name!r} between {begin.strip()} and {end.strip()}")
    return before + begin + table + end + after

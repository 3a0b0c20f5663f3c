"""Pages that are written, in whole or in part, from what tests found."""


def markdown(heads, rows):
    """Return a table, of strings."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_part(path, name, text):
    """Replace what a page has between the comments `NAME: begin` and `end`.

    Args:
        path: `pathlib.Path` of the page.
        name: String, the part's name.
        text: String, the new part.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = path.read_text("utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")

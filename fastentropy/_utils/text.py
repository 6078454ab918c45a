"""Format numbers, names and tables as plain text for a terminal of 80 columns."""

import functools
from collections.abc import Sequence

#: The width of a terminal in characters.
WIDTH = 80
#: The text between two columns of a table.
GAP = "  "


def format_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, width: int = WIDTH, marks: Sequence[str] | None = None
) -> str:
    """Return a table as lines of text: the head, a row of dashes, and the rows.

    Args:
        head: the title of each column.
        rows: the cells of each row, as many as `head` has.
        left: how many columns, counted from the first, are aligned to the left. The other columns are aligned to the right.
        width: the largest number of characters in a line. If a line would be longer, the cells of the first column are
            shortened. The other columns are never shortened, and may therefore exceed the width.
        marks: for each row, a text that follows the cell in the first column, such as an asterisk. It is never shortened.

    Returns:
        The lines, separated by line breaks.
    """
    others = [max(len(row[column]) for row in [head, *rows]) for column in range(1, len(head))]
    room = max(width - sum(len(GAP) + other for other in others), len(head[0]))
    marks = marks or [""] * len(rows)
    names = shorten_names([row[0] for row in rows], room - max(map(len, marks), default=0))
    names = [name + mark for name, mark in zip(names, marks, strict=True)]
    widths = [max(map(len, [head[0], *names])), *others]
    lines = [head, ["-" * size for size in widths], *([name, *row[1:]] for name, row in zip(names, rows, strict=True))]
    return "\n".join(GAP.join(_align(line, widths, left)).rstrip() for line in lines)


def shorten_names(names: Sequence[str], length: int) -> list[str]:
    """Shorten the names that have more than `length` characters, by an ellipsis in the middle or at both ends.

    All names are cut at the same position, chosen so that as many as possible of the shortened names stay distinct. If several
    positions are equally good, an ellipsis in the middle is preferred, as close as possible to a quarter of the length: the
    names of modules differ most at their ends, so most of the length goes to the end.
    """
    heads = sorted(range(length), key=lambda head: abs(head - length // 4))
    starts = range(1, max(map(len, names), default=0) - length + 1)
    cuts = [functools.partial(_without_middle, head=head) for head in heads]
    cuts += [functools.partial(_without_ends, start=start) for start in starts]
    return max(([cut(name, length) for name in names] for cut in cuts), key=lambda shortened: len(set(shortened)))


def format_count(count: int) -> str:
    """Format a count in at most five characters, with an SI prefix if needed: 640, 1.2 G."""
    size = float(count)
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if size < 999.5:
            return f"{size:.1f}{unit}" if unit and size < 9.95 else f"{size:.0f}{unit}"
        size /= 1000
    return f"{count:.0e}"


def format_integer(value: int) -> str:
    """Format an integer with its digits in groups of three: 4 800."""
    return f"{value:,}".replace(",", " ")


def format_share(share: float) -> str:
    """Format a fraction from 0 to 1 in percent, in at most five characters. Only 0 itself gives 0%, and only 1 gives 100%."""
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.001 else f"{min(share, 0.999):.1%}"


def format_percent(score: float) -> str:
    """Format a score from 0 to 1 in percent, without the percent sign: 97.30."""
    return f"{100 * score:.2f}"


def format_milliseconds(value: float) -> str:
    """Format milliseconds with fewer decimals the larger they are: 0.512, 4.00, 123."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Format a count with its noun: 1 site, 17 sites. `many` is the plural if it is not the noun with an s."""
    return f"{format_integer(count)} {noun if count == 1 else many or f'{noun}s'}"


def _align(texts: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    """Pad each text to the width of its column. The first `left` columns are aligned to the left, the others to the right."""
    sized = enumerate(zip(texts, widths, strict=True))
    return [text.ljust(size) if column < left else text.rjust(size) for column, (text, size) in sized]


def _without_middle(name: str, length: int, head: int) -> str:
    """Shorten a name to `length` characters: the first `head` ones, an ellipsis, and the end of the name."""
    return name if len(name) <= length else f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def _without_ends(name: str, length: int, start: int) -> str:
    """Shorten a name to `length` characters: an ellipsis, the characters from index `start` on, and another ellipsis.

    If the name ends before that, only its start is replaced by an ellipsis.
    """
    if length < 3 or start > len(name) - length:
        return _without_middle(name, length, 0)
    return f"…{name[start : start + length - 2]}…"

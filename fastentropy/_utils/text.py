"""Numbers, names and tables as plain text for a terminal of 80 columns."""

import functools
from collections.abc import Sequence

#: Columns of a terminal.
WIDTH = 80
GAP = "  "


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, width: int = WIDTH) -> str:
    """Return a table of texts, with the first `left` columns flush left and the others flush right.

    The texts of the first column are shortened to the space that the others leave of `width`.
    """
    others = [max(len(row[column]) for row in [head, *rows]) for column in range(1, len(head))]
    room = max(width - sum(len(GAP) + other for other in others), len(head[0]))
    names = shorten_names([row[0] for row in rows], room)
    widths = [max(map(len, [head[0], *names])), *others]
    lines = [head, ["-" * size for size in widths], *([name, *row[1:]] for name, row in zip(names, rows, strict=True))]
    return "\n".join(GAP.join(_align(line, widths, left)).rstrip() for line in lines)


def shorten_names(names: Sequence[str], length: int) -> list[str]:
    """Shorten names to at most `length` characters, with an ellipsis in the middle or at both ends.

    All names are cut at the same place: the one that keeps most of them distinct. Among equal places, the one closest to a
    quarter of the length is chosen, since names of sites differ most at their ends.
    """
    heads = sorted(range(length), key=lambda head: abs(head - length // 4))
    starts = range(1, max(map(len, names), default=0) - length + 1)
    cuts = [functools.partial(_without_middle, head=head) for head in heads]
    cuts += [functools.partial(_without_ends, start=start) for start in starts]
    return max(([cut(name, length) for name in names] for cut in cuts), key=lambda shortened: len(set(shortened)))


def format_count(count: int) -> str:
    """Write a count in at most five characters: 640, 1.2 G."""
    size = float(count)
    for unit in ("", " k", " M", " G", " T", " P", " E"):
        if size < 999.5:
            return f"{size:.1f}{unit}" if unit and size < 9.95 else f"{size:.0f}{unit}"
        size /= 1000
    return f"{count:.0e}"


def format_integer(value: int) -> str:
    """Write an integer with its digits in groups of three: 4 800."""
    return f"{value:,}".replace(",", " ")


def format_share(share: float) -> str:
    """Write a share in percent in at most five characters. Only 0 becomes 0%, and only 1 becomes 100%."""
    if share in (0, 1):
        return f"{share:.0%}"
    return "<0.1%" if share < 0.001 else f"{min(share, 0.999):.1%}"


def format_percent(score: float) -> str:
    """Write a score from 0 to 1 in percent, without the sign: 97.30."""
    return f"{100 * score:.2f}"


def format_milliseconds(value: float) -> str:
    """Write milliseconds with as many digits as matter: 0.512, 4.00, 123."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Write a count with its noun: 1 site, 17 sites. `many` is an irregular plural."""
    return f"{format_integer(count)} {noun if count == 1 else many or f'{noun}s'}"


def _align(texts: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    sized = enumerate(zip(texts, widths, strict=True))
    return [text.ljust(size) if column < left else text.rjust(size) for column, (text, size) in sized]


def _without_middle(name: str, length: int, head: int) -> str:
    return name if len(name) <= length else f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def _without_ends(name: str, length: int, start: int) -> str:
    if length < 3 or start > len(name) - length:
        return _without_middle(name, length, 0)
    return f"…{name[start : start + length - 2]}…"

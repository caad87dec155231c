"""Where a picture stands in a text: a chat template writes one mark for it, and the model reads as many placeholders as
the picture has features, with what its family puts around and between. Expanded before tokens are made, since what is
put around may merge with its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rollout_server.quoting import counted, quoted
from rollout_server.text.pictures.picture import Picture

Spell = Callable[[Picture], str]


@dataclass(frozen=True, slots=True)
class Placeholders:
    mark: str
    """What a template writes for one picture."""
    token: str
    """What stands for one feature."""
    spell: Spell
    """What takes the place of the mark."""

    def expand(self, text: str, pictures: Sequence[Picture]) -> str:
        """Raises `ValueError` with half a sentence where places and pictures disagree."""
        around = text.split(self.mark)
        if len(around) - 1 != len(pictures):
            raise ValueError(
                f"the text has {counted(len(around) - 1, 'place')} for pictures ({quoted(self.mark)}), and there "
                f"{'is' if len(pictures) == 1 else 'are'} {counted(len(pictures), 'picture')}"
            )
        if self.token != self.mark and self.token in text:
            raise ValueError(f"the text itself holds {quoted(self.token)}, which stands for a part of a picture")
        pairs = zip(map(self.spell, pictures), around[1:], strict=True)
        return around[0] + "".join(placeholders + behind for placeholders, behind in pairs)


def repeated(token: str) -> Placeholders:
    """Qwen's and LLaVA's: the mark as often as there are features."""
    return Placeholders(token, token, lambda picture: token * picture.tokens)


def framed(mark: str, token: str, end: str) -> Placeholders:
    """Gemma 3's: between its marks of begin and end, in a paragraph of their own."""
    return Placeholders(mark, token, lambda picture: f"\n\n{mark}{token * picture.tokens}{end}\n\n")


def in_rows(token: str, after_row: str, end: str, merge: int) -> Placeholders:
    """Pixtral's: row by row, for a grid of patches of which merge · merge are one feature."""

    def spell(picture: Picture) -> str:
        rows, columns = (side // merge for side in picture.grid)
        return after_row.join([token * columns] * rows) + end

    return Placeholders(token, token, spell)


def in_tiles(token: str, fence: str, whole: str, each: int) -> Placeholders:
    """Idefics3's: tile by tile in lines, each with its place, and a small copy of the whole behind them. `each` is how
    many features a tile has."""

    def spell(picture: Picture) -> str:
        rows, columns = picture.grid
        lines = [
            "".join(f"{fence}<row_{row + 1}_col_{column + 1}>{token * each}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(lines) + ("\n" if rows else "") + f"{fence}{whole}{token * each}{fence}"

    return Placeholders(token, token, spell)

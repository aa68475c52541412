"""What the samples of a .beton were called in their source: one name a line, in a file beside it."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path


def names_file(split: str) -> str:
    """The file that holds the names of a split's samples."""
    return f"{split}.names.txt"


def write_names(directory: Path, split: str, names: Iterable[str]) -> None:
    """Writes the names of a split's samples, in their order: one a line, a line break in a name as \\n."""
    with open(
        Path(directory) / names_file(split), "w", encoding="utf-8", errors="surrogateescape", newline="\n"
    ) as file:
        for name in names:
            file.write(name.replace("\n", "\\n") + "\n")


def sample_title(beton: Path, index: int) -> str:
    """How a message calls a sample of a split's file: its number, and its name where that is known."""
    name = sample_name(beton.parent, beton.stem, index)
    return f"{beton}: sample {index}" + (f" ({name})" if name else "")


def sample_name(directory: Path, split: str, index: int) -> str | None:
    """What a sample was called in its source, such as `train/cat/7.jpg` or `x_train[17]`, fit to be printed.

    None where the data set keeps no names: an earlier varscale made it, or another program.
    """
    try:
        with open(Path(directory) / names_file(split), "rb") as file:
            line = next(islice(file, index, None), None)
    except OSError:
        return None
    return None if line is None else line.decode("utf-8", "backslashreplace").removesuffix("\n")

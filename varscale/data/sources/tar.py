"""Tar archives of class folders, and folders of tar archives, one a class, as ImageNet is distributed."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from varscale.data.sources.archives import ArchiveSplit, Members, members_of
from varscale.data.sources.splits import Names, Source, check_same_classes, ignored_note, is_image
from varscale.errors import UserError


def open_tar(spec: str, location: str) -> Source:
    """One tar of train/CLASS/... and val/CLASS/..., or for each split, parted by a comma, a tar or a folder of tars.

    A split's tar holds CLASS/..., a split's folder CLASS.tar. Leading folders that all images of a tar share are passed
    over. The order is that of the unpacked class folders.
    """
    ignored: Counter[str] = Counter()
    if "," in location:
        parts = location.split(",", 1)
        (classes, train), (other, val) = (_open_split(Path(part), ignored) for part in parts)
    else:
        members = _list([Path(location)], location, ignored)
        top = _shared_folder(members.names)
        (classes, train), (other, val) = (_open_folder(members, f"{top}{name}/", location) for name in ("train", "val"))
    check_same_classes(location, classes, other)
    return Source(spec, tuple(classes), train, val, notes=ignored_note(ignored))


def _open_split(path: Path, ignored: Counter[str]) -> tuple[list[str], ArchiveSplit]:
    if path.is_dir():
        archives = sorted(path.glob("*.tar"))
        if not archives:
            raise UserError(f"{path} holds no CLASS.tar; for a folder of class folders write imagefolder:DIR")
        members = _list(archives, path, ignored)
        return _by_class(members, _all(members), (archives[archive].stem for archive in members.places[:, 0]))
    members = _list([path], path, ignored)
    return _by_class(members, _all(members), _class_folders(members.names, _shared_folder(members.names), path))


def _open_folder(members: Members, folder: str, location: str) -> tuple[list[str], ArchiveSplit]:
    inside = np.flatnonzero(np.fromiter((name.startswith(folder) for name in members.names), np.bool_))
    if not inside.size:
        raise UserError(
            f"{location} has no images in a folder {os.path.basename(folder[:-1])}; "
            "where the splits are two tars, write tar:TRAIN.tar,VAL.tar"
        )
    return _by_class(members, inside, _class_folders((members.names[index] for index in inside), folder, location))


def _all(members: Members) -> np.ndarray:
    return np.arange(len(members.names))


def _list(archives: list[Path], place: Path | str, ignored: Counter[str]) -> Members:
    members = Members.listed(
        archives,
        (
            (number, member)
            for number, archive in enumerate(archives)
            for member in members_of(archive)
            if is_image(member.name, ignored)
        ),
    )
    if not len(members.names):
        raise UserError(f"{place} holds no .jpg, .jpeg or .png file")
    return members


def _shared_folder(names: Names) -> str:
    """The folder that holds all class folders, with its slash, or nothing where these are at the top."""
    shared = os.path.dirname(names[0])
    for name in names:
        if not name.startswith(f"{shared}/"):
            shared = os.path.commonpath([shared, os.path.dirname(name)])
        if not shared:
            return ""
    if any(os.path.dirname(name) == shared for name in names):  # it is itself a class folder, the only one
        shared = os.path.dirname(shared)
    return f"{shared}/" if shared else ""


def _class_folders(names: Iterable[str], parent: str, place: Path | str) -> Iterator[str]:
    for name in names:
        folder, slash, _ = name[len(parent) :].partition("/")
        if not slash:
            raise UserError(f"{place}: {name} lies in no class folder; a tar must hold CLASS/IMAGE")
        yield folder


def _by_class(members: Members, taken: np.ndarray, classes: Iterable[str]) -> tuple[list[str], ArchiveSplit]:
    """The classes' names, sorted, and the split of the members `taken`, in the order of class, folder and file name.

    The members are copied once, when their order is known: an ImageNet's list should not lie in memory three times.
    """
    numbers: dict[str, int] = {}
    found = np.fromiter((numbers.setdefault(name, len(numbers)) for name in classes), np.int64)
    names = sorted(numbers)
    ranks = np.empty(len(names), np.int64)
    ranks[[numbers[name] for name in names]] = np.arange(len(names))
    labels = ranks[found]
    by_label = np.argsort(labels, kind="stable")
    for group in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):  # views, so that all is sorted
        group[:] = sorted(group.tolist(), key=lambda place: os.path.split(members.names[taken[place]]))
    return names, ArchiveSplit(members.take(taken[by_label]), labels[by_label])

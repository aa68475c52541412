"""Views of one batch seen by a student and a teacher: which are compared with which."""

from collections.abc import Mapping, Sequence
from itertools import product

from torch import Tensor


def ordered_pairs(student: Sequence, teacher: Sequence) -> list[tuple[int, int]]:
    """(a, b) for every view a of the student and every other view b of the teacher."""
    return [(a, b) for a, b in product(range(len(student)), range(len(teacher))) if a != b]


def check_latents(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises ValueError unless both saw two or more views of the same samples, as (N, d) tensors alike."""
    check_views([{"": view} for view in student], [{"": view} for view in teacher])


def check_views(student: Sequence[Mapping[str, Tensor]], teacher: Sequence[Mapping[str, Tensor]]) -> None:
    """The same where a view is several tensors, by what is put behind the view's name."""
    if not 2 <= len(teacher) <= len(student):
        raise ValueError(
            "student, teacher: expected two or more views of both, and none that only the teacher sees, "
            f"found {len(student)} and {len(teacher)}"
        )
    first_name, first = next(iter(student[0].items()))
    for network, views in (("student", student), ("teacher", teacher)):
        for index, view in enumerate(views):
            for name, tensor in view.items():
                fits = tensor.ndim == 2 and tensor.is_floating_point() and 0 not in tensor.shape
                if not fits or tensor.shape != first.shape or tensor.device != first.device:
                    raise ValueError(
                        f"{network}[{index}]{name}: expected a non-empty (N, d) floating-point tensor like "
                        f"student[0]{first_name} {tuple(first.shape)} on {first.device}, found {tensor.dtype} of shape "
                        f"{tuple(tensor.shape)} on {tensor.device}"
                    )

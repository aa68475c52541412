"""The memory that is left: the least of the machine's and of all control groups around the process."""

import psutil
import pytest

from varscale.data import memory
from varscale.data.memory import available_memory, can_be_cached, check_cached
from varscale.errors import UserError

MACHINE = 64_000_000_000
NONE = 9223372036854771712  # how version 1 writes no limit


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that lays out control groups: {folder: (limit, bytes used)}, and what /proc says of this process."""
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    free = psutil.virtual_memory()._replace(available=MACHINE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)

    def lay_out(own: str, groups: dict[str, tuple[object, int]]) -> None:
        (tmp_path / "own").write_text(own)
        for name, (limit, used) in groups.items():
            folder = tmp_path / "groups" / name
            folder.mkdir(parents=True, exist_ok=True)
            first = name.startswith("memory")
            (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(f"{limit}\n")
            keys = ("total_rss", "total_cache") if first else ("anon", "file")
            (folder / "memory.stat").write_text(f"{keys[1]} 999999\n{keys[0]} {used}\n")

    return lay_out


SLURM = "system.slice/slurmstepd.scope/job_7"


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        ("", {}, MACHINE),
        ("0::/\n", {"": ("max", 5)}, MACHINE),
        ("0::/\n", {"": (9_000, 2_000)}, 7_000),  # a container that sees its own group as the root
        (f"0::/{SLURM}/step_0\n", {SLURM: (8_000, 3_000), f"{SLURM}/step_0": ("max", 3_000)}, 5_000),
        (f"0::/{SLURM}/step_0\n", {SLURM: (8_000, 3_000), f"{SLURM}/step_0": (4_000, 3_500)}, 500),
        (f"0::/{SLURM}\n", {"other": (10, 0), "": ("max", 0)}, MACHINE),  # somebody else's limit
        ("5:cpuset:/x\n4:memory:/slurm/job_7\n", {"memory/slurm/job_7": (6_000, 1_000)}, 5_000),
        ("4:cpu,memory:/docker/abc\n", {"memory": (6_000, 2_000)}, 4_000),
        ("4:memory:/a\n0::/a\n", {"memory/a": (NONE, 1_000), "unified/a": ("max", 0)}, MACHINE),
        ("0::/\n", {"": (1_000, 3_000)}, 0),
        ("0::/../../job\n", {"": (9_000, 1_000)}, 8_000),
    ],
)
def test_the_smallest_limit_around_the_process_counts(system, own, groups, expected):
    system(own, groups)
    assert available_memory() == expected


def test_a_file_that_does_not_fit_is_named_with_the_way_out(system, tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(bytes(1_001))
    system("0::/job\n", {"job": (1_500, 500)})
    assert not can_be_cached(path)
    with pytest.raises(UserError, match=r"x\.beton has 0\.0 GB, but only 0\.0 GB .*set data\.os_cache=false"):
        check_cached(path)
    path.write_bytes(bytes(1_000))
    check_cached(path)


def test_this_machine_has_some():
    assert 0 < available_memory() <= psutil.virtual_memory().total

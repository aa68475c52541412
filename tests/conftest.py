"""Fixtures shared by all tests: where the repository lies, optional reference data, a small data set, real runs."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import varscale  # noqa: F401 -- before torch: it sets how OpenMP waits

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tool():
    """Import a script of tools/ by its name, as a module."""

    def load(name: str) -> ModuleType:
        specification = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference values and real data that may lie beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A converted data set: 320 training and 100 validation digits of 16x16 pixels."""
    from sklearn.datasets import load_digits

    from varscale.data.conversion import convert
    from varscale.data.sources import open_source

    source = load_digits()
    images = np.kron(source.images * 15.9375, np.ones((1, 2, 2))).astype(np.uint8)[..., None].repeat(3, axis=3)
    labels = source.target.astype(np.int64)
    folder = tmp_path_factory.mktemp("digits")
    np.savez(
        folder / "digits.npz",
        x_train=images[:320],
        y_train=labels[:320],
        x_test=images[320:420],
        y_test=labels[320:420],
    )
    convert(open_source(f"npz:{folder / 'digits.npz'}"), folder / "converted")
    return folder / "converted"


@pytest.fixture(scope="session")
def small_run(digits):
    """Overrides that make a digits recipe a matter of seconds: 5 steps of 64 images an epoch, in exact float32."""
    return [
        f"data.dir={digits}",
        "data.workers=1",
        "data.image_size=16",
        "batch.global_batch_size=64",
        "schedule.epochs=2",
        "compute.precision=float32",
        "logging.every_steps=1",
        "logging.trackers=[]",
        "online_knn.every_epochs=0",
    ]


@pytest.fixture(scope="session")
def free_port():
    """A function: the number of a port that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def launch(free_port):
    """Run a program of the project as a user would; returns the completed process, whatever its exit code.

    launcher: "python", "deepspeed" (2 ranks) or "torchrun" (2 ranks).
    """

    def run(*arguments: object, launcher: str = "python", ranks: int = 2, timeout: float = 300):
        binaries = Path(sys.executable).parent
        command = {
            "python": [sys.executable],
            "deepspeed": [binaries / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()],
            "torchrun": [binaries / "torchrun", "--nproc_per_node", ranks, "--master_port", free_port()],
        }[launcher]
        environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(
            [str(part) for part in (*command, *arguments)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def ctrl_c_interrupts():
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unprivileged():
    """A context in which permissions count, also where the tests run as root."""

    @contextmanager
    def without_root():
        user = os.geteuid()
        os.seteuid(65534 if user == 0 else user)
        try:
            yield
        finally:
            os.seteuid(user)

    return without_root


@pytest.fixture
def disk(tmp_path):
    """A function: a real file system of so many megabytes."""
    mounts = []

    def mount(megabytes: int) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root and its permission to mount")
        mounts.append(place)
        return place

    yield mount
    for place in mounts:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def small_disk(disk):
    """A real file system of 6 MB."""
    return disk(6)

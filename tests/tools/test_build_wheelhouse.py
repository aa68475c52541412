"""tools/build_wheelhouse.sh says what it lacks, keeps what is there, makes an FFCV wheel that brings its libraries."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PACKAGES = "g++ pkg-config libopencv-dev libturbojpeg0-dev"
COMMANDS = ["awk", "bash", "cat", "cut", "df", "dirname", "du", "echo", "grep", "mkdir", "mv", "rm"]
COMMANDS += ["sha256sum", "wc", "xargs"]
UV = Path(sys.executable).with_name("uv")


@pytest.fixture
def build(repository, tmp_path):
    """Run a copy of the script for `pins` where only some commands exist and no network; `commands` are scripts."""
    (tmp_path / "project" / "tools").mkdir(parents=True)
    script = shutil.copy(repository / "tools" / "build_wheelhouse.sh", tmp_path / "project" / "tools")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in COMMANDS:
        (binaries / name).symlink_to(shutil.which(name))
    (binaries / "uv").symlink_to(UV)

    def run(*arguments, pins=(), **commands):
        for name, body in commands.items():
            (binaries / name).unlink(missing_ok=True)
            (binaries / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
            (binaries / name).chmod(0o755)
        (tmp_path / "pins").write_text("".join(f"{pin}\n" for pin in ("# made by hand", *pins)))
        options = ["--python", sys.executable, "--requirements", tmp_path / "pins"]
        done = subprocess.run(
            [shutil.which("bash"), script, *options, *arguments],
            env={"PATH": str(binaries), "HOME": str(tmp_path), "UV_OFFLINE": "1", "UV_PYTHON_DOWNLOADS": "never"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def wheels(tmp_path):
    """The folder to fill; it holds one wheel, `kept` 1.0."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "kept-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("kept-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: kept\nVersion: 1.0\n")
        wheel.writestr("kept-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("kept-1.0.dist-info/RECORD", "")
    return folder


def test_without_a_compiler_the_packages_that_ffcv_takes_are_listed(build, wheels):
    code, said = build(wheels, pins=["ffcv==1.0.2"])
    assert code == 2, said
    assert f"apt-get install {PACKAGES}\n" in said


def test_only_what_is_missing_is_listed(build, wheels):
    commands = {"g++": f"echo {sys.executable}", "pkg-config": '[ "$2" = opencv4 ]'}
    code, said = build(wheels, pins=["ffcv==1.0.2"], **commands)
    assert code == 2, said
    assert "apt-get install libturbojpeg0-dev\n" in said


def test_opencv_without_static_libraries_is_missing(build, wheels):
    code, said = build(wheels, pins=["ffcv==1.0.2"], **{"g++": "echo libopencv_core.a", "pkg-config": "exit 0"})
    assert code == 2, said
    assert "apt-get install libopencv-dev\n" in said


def test_a_full_disk_is_seen_before_anything_is_fetched(build, wheels):
    code, said = build(wheels, pins=["torch==2.13.0"], df="echo header; echo /dev/x 100 0 2097152 0% /")
    assert code == 2, said
    assert "2 GiB free" in said
    assert "4 GiB are needed" in said


def test_without_a_network_nothing_is_left_behind(build, wheels):
    code, said = build(wheels, pins=["kept==1.0", "other==1.0"])
    assert code == 2, said
    assert "could not be installed" in said.splitlines()[-1]
    assert os.listdir(wheels) == ["kept-1.0-py3-none-any.whl"]


def test_a_full_folder_needs_no_network(build, wheels):
    """What is there is kept, what is for other systems is left out, and the checksums are those of the files."""
    wheel = wheels / "kept-1.0-py3-none-any.whl"
    content = wheel.read_bytes()
    code, said = build(wheels, pins=["kept==1.0", "other==1.0 ; sys_platform == 'win32'"])
    assert code == 0, said
    assert sorted(os.listdir(wheels)) == ["SHA256SUMS", wheel.name]
    assert wheel.read_bytes() == content
    assert (wheels / "SHA256SUMS").read_text() == f"{hashlib.sha256(content).hexdigest()}  {wheel.name}\n"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert said.splitlines()[-1].strip() == f"PYTHON={version} tools/setup.sh --wheelhouse {wheels}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a folder for the wheels is needed"),
        (["--python"], "--python needs a version"),
        (["--python", "3.99", "wheels"], "there is no Python 3.99 here (reason above)"),
        (["--requirements"], "--requirements needs a file"),
        (["--requirements", "/nowhere", "wheels"], "--requirements /nowhere: no such file"),
        (["--fast", "wheels"], "unknown argument --fast"),
        (["one", "two"], "one folder, not both one and two"),
        (["/dev/null/wheels"], "/dev/null/wheels cannot be made (reason above)"),
    ],
)
def test_wrong_arguments(build, arguments, message):
    code, said = build(*arguments)
    assert code == 2, said
    assert said.splitlines()[-1] == f"build_wheelhouse: {message}"


def test_without_uv(build, tmp_path, wheels):
    (tmp_path / "bin" / "uv").unlink()
    code, said = build(wheels)
    assert code == 2, said
    assert "uv is needed" in said


DECODE = """
import sys
from pathlib import Path
import numpy as np
from varscale.data import libffcv
jpeg, pixels = Path(sys.argv[1]).read_bytes(), np.load(sys.argv[2])
decoded = np.zeros_like(pixels)
height, width = pixels.shape[:2]
size = (height, width, decoded.ctypes.data, height, width)
status = libffcv.imdecode()(jpeg, len(jpeg), *size, 0, 0, 1, 1, False, False)
print(status, np.abs(decoded.astype(int) - pixels).max())
print(*{line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}, sep="\\n")
"""


@pytest.mark.slow
def test_the_ffcv_wheel_brings_its_libraries(repository, tmp_path):
    environment = os.environ | {"PATH": f"{UV.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*command, **variables):
        return subprocess.run(
            command, env=environment | variables, cwd=tmp_path, capture_output=True, text=True, timeout=500
        )

    probe = ["pip", "install", "--no-cache", "--dry-run", "--reinstall", "--no-deps", "--python", sys.executable]
    if run(UV, *probe, "terminaltables==3.1.10").returncode:
        pytest.skip("no network: no package index answers")
    (tmp_path / "pins").write_text("ffcv==1.0.2\n")
    script = repository / "tools" / "build_wheelhouse.sh"
    done = run(script, "--python", sys.executable, "--requirements", "pins", "wheels")
    if "FFCV is compiled on this machine" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name.startswith("ffcv-1.0.2-cp311-abi3-manylinux_")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    pixels = np.random.default_rng(0).integers(256, size=(6, 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=95)
    (tmp_path / "image.jpg").write_bytes(jpeg.getvalue())
    np.save(tmp_path / "pixels.npy", np.asarray(Image.open(jpeg)))

    path = f"{tmp_path / 'unpacked'}{os.pathsep}{repository}"
    done = run(sys.executable, "-c", DECODE, "image.jpg", "pixels.npy", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    said, *libraries = done.stdout.splitlines()
    status, difference = map(int, said.split())
    assert status == 0
    assert difference <= 3  # FFCV asks TurboJPEG for the fast transform, Pillow for the exact one
    folders = {name: Path(library).parent for library in libraries for name in [Path(library).name.split("-")[0]]}
    assert folders["_libffcv.abi3.so"] == tmp_path / "unpacked" / "ffcv"
    assert folders["libturbojpeg"] == tmp_path / "unpacked" / "ffcv.libs"
    assert not [library for library in libraries if "opencv" in library or "libX11" in library]

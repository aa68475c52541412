"""tools/setup.sh says what is missing and how to get it, and leaves nothing behind when it cannot go on."""

import os
import shutil
import subprocess
import sys

import pytest

MISSING = "g++ pkg-config libopencv-dev libturbojpeg0-dev"
COMMANDS = ["awk", "bash", "cat", "cut", "df", "dirname", "echo", "env", "grep", "head", "id", "rm", "sed", "sha256sum"]
COMMANDS += ["sort", "tail", "tr", "xargs"]


@pytest.fixture
def setup(repository, tmp_path):
    """Run a copy of setup.sh, alone with the lock file, where only some commands exist; `commands` are scripts."""
    (tmp_path / "project" / "tools").mkdir(parents=True)
    shutil.copy(repository / "tools" / "setup.sh", tmp_path / "project" / "tools")
    shutil.copy(repository / "requirements.lock", tmp_path / "project")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in COMMANDS:
        (binaries / name).symlink_to(shutil.which(name))

    def run(*arguments, **commands):
        for name, script in commands.items():
            path = binaries / name
            path.unlink(missing_ok=True)
            path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
            path.chmod(0o755)
        done = subprocess.run(
            [shutil.which("bash"), tmp_path / "project" / "tools" / "setup.sh", *arguments],
            env={"PATH": str(binaries), "PYTHON": sys.executable, "HOME": os.environ.get("HOME", "/")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr, sorted(os.listdir(tmp_path / "project"))

    return run


COMPILER = {"g++": "exit 0", "pkg-config": "exit 0"}
ROOMY = {"df": "echo header; echo /dev/x 100 0 99999999 0% /"}  # whatever this machine's disk has
FULL = {"df": "echo header; echo /dev/x 100 0 2097152 0% /"}
UNTOUCHED = ["requirements.lock", "tools"]


def test_without_root_the_missing_system_packages_are_listed(setup):
    code, said, left = setup(id="echo 1000")
    assert (code, left) == (2, UNTOUCHED), said
    assert f"these system packages are missing: {MISSING}\n" in said
    assert "apt-get install" in said
    assert "conda install" in said


def test_only_what_is_missing_is_listed(setup):
    code, said, _ = setup(id="echo 1000", **COMPILER | {"pkg-config": '[ "$2" = opencv4 ]'})
    assert code == 2, said
    assert "these system packages are missing: libturbojpeg0-dev\n" in said


def test_check_changes_nothing(setup):
    code, said, left = setup("--check")
    assert (code, left) == (2, UNTOUCHED), said
    assert said.splitlines()[0] == f"missing system packages: {MISSING}"
    assert "missing or out of date:" in said.splitlines()[1]


def test_a_full_disk_is_seen_before_anything_is_installed(setup):
    code, said, left = setup(**COMPILER, **FULL)
    assert (code, left) == (2, UNTOUCHED), said
    assert "2 GiB free" in said
    assert "8 GiB are needed" in said


def test_a_wheelhouse_that_lacks_packages_is_refused(setup, tmp_path):
    (tmp_path / "wheels").mkdir()
    code, said, _ = setup("--wheelhouse", tmp_path / "wheels", **COMPILER, **ROOMY)
    assert code == 2, said
    assert f"{tmp_path / 'wheels'} must hold wheels of all of requirements.lock" in said.splitlines()[-1]


def test_a_wheelhouse_with_ffcv_takes_no_compiler(setup, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "ffcv-1.0.2-cp311-abi3-manylinux_2_34_x86_64.whl").touch()
    code, said, _ = setup("--wheelhouse", tmp_path / "wheels", "--check")
    assert code == 2, said
    assert "missing system packages" not in said
    assert "missing or out of date:" in said


def test_without_root_slurm_is_said_to_be_missing_and_nothing_waits_for_it(setup):
    code, said, _ = setup("--with-slurm", id="echo 1000", **COMPILER, **FULL)
    assert "Slurm is not installed: its tests will be skipped. As root: apt-get install slurm-wlm munge" in said
    assert said.splitlines()[-1].startswith("setup: 2 GiB free")
    assert code == 2


def test_as_root_slurm_is_installed(setup, tmp_path):
    log = tmp_path / "apt-get.log"
    apt_get = {"apt-get": f'echo "$@" >>{log}', "id": "echo 0"}
    _, said, _ = setup("--with-slurm", **COMPILER, **apt_get, **FULL)
    assert "installing system packages: slurm-wlm munge" in said
    assert log.read_text().splitlines()[1].endswith("--no-install-recommends slurm-wlm munge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wheelhouse"], "--wheelhouse needs a folder"),
        (["--wheelhouse", "/nowhere"], "--wheelhouse /nowhere: no such folder"),
        (["--fast"], "unknown argument --fast"),
    ],
)
def test_wrong_arguments(setup, arguments, message):
    code, said, left = setup(*arguments)
    assert (code, left) == (2, UNTOUCHED), said
    assert said.splitlines()[-1] == f"setup: {message}"

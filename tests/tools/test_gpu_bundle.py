"""What is brought to a machine with a GPU is all that training and evaluation import there."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires

IMPORTED = """
import importlib, sys
from importlib.metadata import packages_distributions

sys.path[:0] = ["tools", "."]
from gpu_smoke import PROGRAMS

for program in PROGRAMS:
    importlib.import_module(program)
distributions = packages_distributions()
print(*{name for module in list(sys.modules) for name in distributions.get(module, [])})
"""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names):
    """These packages, and all that they ask for without extras."""
    found, new = set(), [normal(name) for name in names]
    while new:
        name = new.pop()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        new += [normal(re.match(r"[\w.-]+", line)[0]) for line in wanted if "extra ==" not in line]
    return found


def test_all_that_is_imported_is_there_or_brought(repository):
    script = (repository / "tools" / "gpu_bundle.sh").read_text()
    has = re.search(r'^has="(.*)"$', script, re.MULTILINE)[1].split()
    brought = " ".join(re.findall(r'^lacks\+?="(.*)"$', script, re.MULTILINE)).split()
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=repository, capture_output=True, text=True, timeout=120)
    imported = {normal(name) for name in done.stdout.splitlines()[-1].split()}
    assert {"deepspeed", "numba", "torch"} < imported, done.stderr
    lock = (repository / "requirements.lock").read_text()
    imported &= {normal(name) for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    assert imported - with_requirements(has) - {normal(name) for name in brought} <= {"varscale"}


def test_what_the_machine_must_have_is_what_the_plan_says(repository):
    has = re.search(r'^has="(.*)"$', (repository / "tools" / "gpu_bundle.sh").read_text(), re.MULTILINE)[1].split()
    said = re.search(
        r"The machine itself must have (.*?)\. Its packages", (repository / "benchmarks/gpu.md").read_text(), re.S
    )
    assert all(re.search(rf"\b{name}\b", said[1]) for name in has), said[1]

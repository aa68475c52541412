"""The versions that are written beside results."""

import tomllib

import varscale
from varscale.versions import versions_of


def test_a_checkout_on_the_path_has_a_version_though_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("sys.path", [])  # where the metadata of installed packages is looked for
    assert versions_of(["varscale", "torch"]) == {"varscale": varscale.__version__, "torch": "not installed"}


def test_the_package_has_this_version(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert project["version"] == varscale.__version__


def test_installed_packages_tell_theirs():
    import numpy

    assert versions_of(["numpy"]) == {"numpy": numpy.__version__}

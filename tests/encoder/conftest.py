"""The data set that runs of these tests were trained on."""

from pathlib import Path

import pytest
from small_runs import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return make_data(tmp_path_factory.mktemp("data"))

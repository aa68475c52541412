"""A start loads only what the run needs, and compiles nothing that an earlier one has compiled."""

import json

import pytest

NOT_NEEDED = {"sklearn", "matplotlib", "pandas", "transformers", "tensorboard", "wandb", "onnx", "ffcv", "umap"}

RUN = """
import json, sys
from varscale import train
code = train.main(sys.argv[1:])
from numba.core.dispatcher import Dispatcher
ours = {id(d): d for name, m in list(sys.modules.items()) if name.startswith("varscale.data")
        for d in vars(m).values() if isinstance(d, Dispatcher)}.values()
compiled = [d.py_func.__name__ for d in ours if sum(d.stats.cache_misses.values())]
loaded = [d.py_func.__name__ for d in ours if sum(d.stats.cache_hits.values())]
print(json.dumps([code, compiled, loaded, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.fixture(scope="module")
def second_run(launch, small_run, tmp_path_factory):
    """What the second of two runs, of two steps each, compiled, took from numba's cache and imported."""
    folder = tmp_path_factory.mktemp("startup")
    built = folder / "torch_extensions"
    overrides = [*small_run, "schedule={epochs: 1, warmup_epochs: 0}", "batch.global_batch_size=160"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(built))
        for number in range(2):
            done = launch("-c", RUN, "--config", "digits-varcon", f"output_dir={folder / str(number)}", *overrides)
            assert done.returncode == 0, done.stderr
    code, compiled, loaded, packages = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    return compiled, loaded, set(packages), built


def test_the_second_run_compiles_nothing(second_run):
    compiled, loaded, _, built = second_run
    assert not compiled
    assert len(loaded) >= 2  # what decodes, and what changes colours
    assert not built.exists() or not any(built.iterdir()), "DeepSpeed built an operation of its own"


def test_only_what_a_run_needs_is_imported(second_run):
    _, _, packages, _ = second_run
    assert {"torch", "deepspeed", "numba"} <= packages
    assert not packages & NOT_NEEDED

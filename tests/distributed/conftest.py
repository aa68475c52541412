"""Real processes for tests of several ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def run_ranks(free_port):
    """Run `python SCRIPT FOLDER *arguments` once for each rank and return what each saved in FOLDER/<rank>.pt.

    The ranks find each other by the variables that torchrun sets. One core each; a rank that fails shows its log.
    """

    def run(script: str, world_size: int, folder: Path, *arguments: object, timeout: float = 300) -> list:
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world_size)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        logs = [folder / f"{rank}.log" for rank in range(world_size)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                with log.open("w") as output:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, script, *map(str, (folder, *arguments))],
                            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                            stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]

    return run

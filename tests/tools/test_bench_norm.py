"""The benchmark of normalisations, in small."""

import torch


def test_every_way_has_a_row(launch):
    small = ["--encoder", "resnet18", "--image-size", "32", "--batch", "4", "--rounds", "1"]
    done = launch("tools/bench_norm.py", *small)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    titles = {row[0].strip() for row in rows}
    assert {"torch's kernels", "over ranks"} <= titles
    assert ("ours everywhere" in titles) == torch.cuda.is_available()
    assert all(0 < float(host) <= float(whole) for _, whole, host in rows)

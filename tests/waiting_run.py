"""A training run that writes down where the host waits for the device, or would if the device were a GPU: where it
reads a value of a tensor, makes one of values of its own, or asks to wait.

    python waiting_run.py FIRST LAST REPORT arguments of train.py ...

The steps FIRST to LAST are watched, from handing out one to handing out the one behind the last. On a GPU whatever
waits for it without being asked to is an error then.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

READS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "new_tensor")
READING_OPERATORS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")


class Watcher(TorchDispatchMode):
    """Notes the place of every wait while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.inside, self.places = False, False, []
        accelerator = type(get_accelerator())
        waits = [(torch.Tensor, name) for name in READS]
        waits += [(torch, "tensor"), (accelerator, "synchronize"), (torch.cuda, "synchronize")]
        for owner, name in waits:
            setattr(owner, name, self._noted(getattr(owner, name)))

    def _noted(self, method):
        def call(*arguments, **options):
            self._note()
            outer, self.inside = self.inside, True
            try:
                return method(*arguments, **options)
            finally:
                self.inside = outer

        return call

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.overloadpacket.__name__ in READING_OPERATORS:
            self._note()
        return operator(*arguments, **(options or {}))

    def _note(self) -> None:
        if self.watching and not self.inside:
            frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
            self.places.append(f"{Path(frames[-1].filename).name}:{frames[-1].name}")


def main() -> int:
    first, last, report, *arguments = sys.argv[1:]
    from varscale import train

    watcher, take_step, steps = Watcher(), train.take_step, 0

    def watched(*given):
        nonlocal steps
        steps += 1
        watcher.watching = int(first) <= steps <= int(last)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if watcher.watching else "default")
        return take_step(*given)

    train.take_step = watched
    with watcher:
        code = train.main(arguments)
    Path(report).write_text(json.dumps(watcher.places))
    return code


if __name__ == "__main__":
    sys.exit(main())

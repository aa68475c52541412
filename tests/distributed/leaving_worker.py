"""Train where the disk is slow, and tell when this rank ended: `python leaving_worker.py FOLDER *arguments`."""

import os
import sys
import time
from pathlib import Path

import torch

from varscale import train
from varscale.engine import saving

write_checkpoint = saving.write_checkpoint


def write_slowly(*arguments):
    time.sleep(4)
    return write_checkpoint(*arguments)


saving.write_checkpoint = write_slowly
code = train.main(sys.argv[2:])
torch.save((code, time.time()), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")

"""Features kept on the disk under the digest of all that made them, so that a second evaluator costs seconds."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varscale.evaluation.features import Features, Gather, gather_rows
from varscale.files import let_others_read

SUFFIX = ".safetensors"


class FeatureCache:
    """Files `folder`/DIGEST.safetensors, written by rank 0 and read by all.

    say: tells a person what was wrong with a file; called on rank 0 alone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        device: torch.device | None = None,
        gather: Gather = gather_rows,
        say: Callable[[str], None] = lambda message: print(f"note: {message}", file=sys.stderr),
    ):
        self.folder, self.rank, self.device, self.gather, self.say = folder, rank, device, gather, say

    def get(self, origin: Mapping[str, object], make: Callable[[], Features]) -> Features:
        """The features that `origin` describes: from their file, or made by `make`, a call that all ranks make.

        origin: everything that the features depend on, as JSON knows it. A file that is damaged, or that holds what
        another origin made, is replaced. A disk that cannot be written leaves things as they are.
        """
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{digest}{SUFFIX}"
        found = self._read(path, digest)
        # Where one rank sees no file, on a disk of its own, all make the features: making them is a collective act.
        everywhere = self.gather(torch.tensor([found is not None], dtype=torch.int64, device=self.device))
        if found is not None and bool(everywhere.all()):
            return found
        features = make()
        if self.rank == 0:
            self._write(path, digest, origin, features)
        return features

    def _read(self, path: Path, digest: str) -> Features | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("digest") != digest:
                    return self._refuse(path, "was made by something else")
                features = Features(*(file.get_tensor(name) for name in Features._fields))
        except (OSError, SafetensorError) as error:
            return self._refuse(path, f"is damaged ({error})")
        if metadata.get("sha256") != tensors_digest(features._asdict()):
            return self._refuse(path, "is damaged (its SHA-256 is another)")
        return features

    def _refuse(self, path: Path, reason: str) -> None:
        if self.rank == 0:
            self.say(f"{path} {reason}; its features are extracted anew")

    def _write(self, path: Path, digest: str, origin: Mapping[str, object], features: Features) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in features._asdict().items()}
        metadata = {"digest": digest, "origin": json.dumps(origin), "sha256": tensors_digest(tensors)}
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside, metadata)
            let_others_read(aside)
            aside.replace(path)
        except (OSError, SafetensorError) as error:
            self.say(f"{path} cannot be written ({error}); the features are not kept")
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

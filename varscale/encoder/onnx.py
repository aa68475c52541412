"""An encoder as an ONNX file, and how far onnxruntime's features are from torch's."""

import importlib.util
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from varscale.errors import UserError

OPSET = 18
INPUT, OUTPUT = "images", "features"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
BATCHES = (1, 5)  # that it is checked with: the size of a batch must not have been frozen
TOLERANCE = 1e-3  # of the largest feature; float32 sums in another order differ by about 1e-6 of it


def check_installed() -> None:
    """Raises UserError with the command to give where one of the packages that this needs is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def write_onnx(encoder: nn.Module, image_size: int, path: Path, metadata: dict[str, str]) -> None:
    """Write `features = encoder(images)`, (N, 3, image_size, image_size) float32 -> (N, d) float32, for any N.

    One file, parameters within; `metadata` becomes the model's metadata_props. Raises OSError.
    """
    import onnx

    images = torch.zeros(2, 3, image_size, image_size)
    # torch's fused attention has no counterpart in ONNX; without it the same is written as products and a softmax.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about its own code
            program = torch.onnx.export(
                encoder,
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("N")},),
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def onnx_difference(encoder: nn.Module, image_size: int, path: Path) -> tuple[float, float]:
    """The largest difference between onnxruntime's features and torch's over random images, and the largest feature."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    difference = largest = 0.0
    for batch in BATCHES:
        images = torch.randn(batch, 3, image_size, image_size, generator=random)
        with torch.no_grad():
            expected = encoder(images)
        (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
        difference = max(difference, float((torch.from_numpy(found) - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return difference, largest


def onnx_code(file: str) -> str:
    """The lines that compute `features` of normalised `images`, a float32 array, by such a file."""
    return "\n".join(
        [
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({json.dumps(file)})",
            f'(features,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})',
        ]
    )

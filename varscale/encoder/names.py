"""What torchvision and timm call an encoder's parameters, and the lines of Python that make their model of it."""

import json
from collections.abc import Callable

from varscale.encoder.description import Description
from varscale.models.encoders import VITS

# torchvision's VisionTransformer -> timm's; ResNets have the same names in both.
VIT_IN_TIMM = {
    "class_token": "cls_token",
    "conv_proj.": "patch_embed.proj.",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln.": "norm.",
    "encoder.layers.encoder_layer_": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".self_attention.in_proj_": ".attn.qkv.",
    ".self_attention.out_proj.": ".attn.proj.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.3.": ".mlp.fc2.",
}
TIMM_MODELS = {
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
}


def timm_name(key: str) -> str:
    """What timm calls the parameter that torchvision calls `key`."""
    for ours, theirs in VIT_IN_TIMM.items():
        key = key.replace(ours, theirs)
    return key


NAMES: dict[str | None, Callable[[str], str]] = {"torchvision": lambda key: key, "timm": timm_name}


def loading_code(description: Description, names: str, file: str) -> str:
    """The lines that load an exported file without varscale, into `model`."""
    make = _timm_code if names == "timm" else _torchvision_code
    library = "timm" if names == "timm" else "torchvision"
    lines = [f"import {library}", "import torch", "from safetensors.torch import load_file", "", *make(description)]
    if description.stem == "cifar":
        lines.append("model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem for small images")
        lines.append("model.maxpool = torch.nn.Identity()")
    return "\n".join([*lines, f"model.load_state_dict(load_file({json.dumps(file)}))", "model.eval()"])


def _torchvision_code(description: Description) -> list[str]:
    if description.name not in VITS:
        return [f"model = torchvision.models.{description.name}()", "model.fc = torch.nn.Identity()"]
    shape = VITS[description.name]._asdict() | {"image_size": description.image_size}
    arguments = ", ".join(f"{key}={value}" for key, value in (shape | {"patch_size": description.patch_size}).items())
    return [f"model = torchvision.models.VisionTransformer({arguments})", "model.heads = torch.nn.Identity()"]


def _timm_code(description: Description) -> list[str]:
    if description.name not in VITS:
        return [f'model = timm.create_model("{description.name}", num_classes=0)']
    sizes = f"img_size={description.image_size}, patch_size={description.patch_size}"
    return [f'model = timm.create_model("{TIMM_MODELS[description.name]}", num_classes=0, {sizes})']

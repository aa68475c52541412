"""The encoders are torchvision's: same keys, features of the right width, errors that name the mistake."""

import typing

import pytest
import torch
import torchvision
from torch import nn

from varscale.config.schema import EncoderConfig
from varscale.models.encoders import ENCODERS, build_encoder
from varscale.models.norm import SyncBatchNorm

FEATURE_DIMS = {
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnet152": 2048,
    "vit_ti": 192,
    "vit_s": 384,
    "vit_b": 768,
    "vit_l": 1024,
}
TORCHVISION_VITS = {"vit_b": torchvision.models.vit_b_16, "vit_l": torchvision.models.vit_l_16}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_encoder(name, image_size=224, patch_size=16 if name.startswith("vit") else None)


def test_names_are_those_of_the_configuration() -> None:
    assert typing.get_args(EncoderConfig.model_fields["name"].annotation) == ENCODERS
    assert set(ENCODERS) == set(FEATURE_DIMS)


@pytest.mark.parametrize("name", ENCODERS)
def test_features_have_feature_dim(name: str) -> None:
    encoder = on_meta(name)
    assert encoder.feature_dim == FEATURE_DIMS[name]
    images = torch.empty(2, 3, 224, 224, device="meta")
    assert encoder.eval()(images).shape == (2, encoder.feature_dim)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("vit_ti", "vit_s")])
def test_keys_and_shapes_are_torchvisions_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        reference = TORCHVISION_VITS.get(name, getattr(torchvision.models, name, None))()
    expected = {k: v.shape for k, v in reference.state_dict().items() if not k.startswith(("fc.", "heads."))}
    assert {key: value.shape for key, value in on_meta(name).state_dict().items()} == expected


@pytest.mark.parametrize(
    ("name", "heads", "parameters"),  # parameters with DeiT's classifier of 1,000 classes
    [("vit_ti", 3, 5_717_416), ("vit_s", 6, 22_050_664)],
)
def test_small_transformers_are_deits(name: str, heads: int, parameters: int) -> None:
    encoder = on_meta(name)
    block = encoder.encoder.layers[11]
    assert len(encoder.encoder.layers) == 12
    assert block.self_attention.num_heads == heads
    assert block.mlp[0].out_features == 4 * encoder.feature_dim
    assert sum(p.numel() for p in encoder.parameters()) + (encoder.feature_dim + 1) * 1000 == parameters


def test_torchvision_loads_a_resnet_strictly_and_agrees() -> None:
    encoder = build_encoder("resnet18", image_size=64).eval()
    reference = torchvision.models.resnet18()
    reference.fc = nn.Identity()
    reference.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), reference.eval()(images))


def test_torchvision_loads_a_vit_strictly_and_agrees() -> None:
    encoder = build_encoder("vit_s", image_size=32, patch_size=8).eval()
    reference = torchvision.models.VisionTransformer(32, 8, 12, 6, 384, 1536)
    reference.heads = nn.Identity()
    reference.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), reference.eval()(images))


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder = build_encoder("resnet18", stem="cifar", image_size=32)
    assert encoder.conv1.weight.shape == (64, 3, 3, 3)
    images = torch.randn(2, 3, 32, 32)
    assert encoder.maxpool(encoder.conv1(images)).shape == (2, 64, 32, 32)
    # He initialisation by fan-out, as torchvision's other convolutions have it.
    assert encoder.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert set(encoder.state_dict()) == set(build_encoder("resnet18", image_size=32).state_dict())


def test_batch_norm_is_synchronised_where_asked() -> None:
    def kinds(sync_batch_norm: bool) -> set[type]:
        encoder = build_encoder("resnet18", image_size=32, sync_batch_norm=sync_batch_norm)
        return {type(m) for m in encoder.modules() if isinstance(m, SyncBatchNorm | nn.BatchNorm2d)}

    assert kinds(True) == {SyncBatchNorm}
    assert kinds(False) == {nn.BatchNorm2d}


def test_residual_branches_do_not_start_at_zero() -> None:
    assert build_encoder("resnet18", image_size=32).layer1[0].bn2.weight.eq(1).all()


@pytest.mark.parametrize(("name", "options"), [("resnet18", {"stem": "cifar"}), ("vit_s", {"patch_size": 16})])
def test_channels_last_and_bfloat16_autocast(name: str, options: dict) -> None:
    encoder = build_encoder(name, image_size=32, **options).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    expected = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(images)
    features.float().square().sum().backward()
    assert features.dtype == torch.bfloat16 or name == "vit_s"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    similarity = nn.functional.cosine_similarity(features.float(), expected, dim=1)
    assert similarity.min() > 0.98


def kept_and_gradients(encoder: nn.Module, images: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """Bytes that autograd keeps for the backward pass, and the gradients of all parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        features = encoder(images)
    bytes_ = sum(kept.values())  # the backward pass may keep more, one block's at a time
    features.float().square().sum().backward()
    return bytes_, [p.grad for p in encoder.parameters()]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointed_blocks_give_the_same_gradients_from_less_memory(precision: torch.dtype) -> None:
    images, found = torch.randn(4, 3, 32, 32), []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder(
            "vit_ti", image_size=32, patch_size=4, activation_checkpointing=activation_checkpointing
        )
        for module in encoder.modules():  # which must draw the same numbers when a block is computed again
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            found.append((list(encoder.state_dict()), *kept_and_gradients(encoder, images)))
    (keys, whole, expected), (same_keys, less, gradients) = found
    assert same_keys == keys
    assert less < whole / 8
    assert all(map(torch.equal, gradients, expected))


def test_without_gradients_nothing_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("vit_ti", image_size=32, patch_size=8, activation_checkpointing=True)
    monkeypatch.setattr("varscale.models.encoders.checkpoint", None)
    with torch.no_grad():
        encoder(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet5", "image_size": 32}, "nearest: resnet50"),
        ({"name": "resnet18", "image_size": 32, "patch_size": 4}, "resnet18 has no patches"),
        (
            {"name": "resnet18", "image_size": 32, "activation_checkpointing": True},
            "activation_checkpointing: resnet18 has no transformer blocks",
        ),
        ({"name": "resnet18", "image_size": 32, "stem": "cifa"}, "'cifa', expected 'imagenet' or 'cifar'"),
        ({"name": "vit_s", "image_size": 32, "stem": "cifar", "patch_size": 4}, "vit_s has no stem"),
        ({"name": "vit_s", "image_size": 32}, "vit_s needs one"),
        ({"name": "vit_s", "image_size": 32, "patch_size": 5}, r"does not divide image_size \(32\)"),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(**arguments)

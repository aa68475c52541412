"""torchvision's ResNets, whose normalisations are told what follows them, so that a GPU can do it in one pass."""

from torch import Tensor
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock as _BasicBlock
from torchvision.models.resnet import Bottleneck as _Bottleneck

from varscale.models.norm import norm_relu


class BasicBlock(_BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), residual=_shortcut(self, x))


class Bottleneck(_Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        return norm_relu(self.bn3, self.conv3(out), residual=_shortcut(self, x))


class FusedResNet(ResNet):
    """images (N, 3, H, W) -> features (N, feature_dim); the state dict is torchvision's, without `fc`."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


RESNETS = {  # by name: the block, and how many there are in each of the four layers
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)

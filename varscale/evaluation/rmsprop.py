"""RMSProp as TensorFlow computes it, from which the published linear evaluation on ImageNet comes."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class RMSProp(Optimizer):
    """w -= m, where m = momentum m + lr g / sqrt(s + eps), s = decay s + (1 - decay) g^2, from s = 1 and m = 0.

    torch's own starts from s = 0, adds eps to the root and multiplies m by the rate of the moment: at the warm-up's
    small rates and small gradients of a linear layer that is another optimizer. g includes weight_decay w.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, decay: float, momentum: float, eps: float, weight_decay: float = 0.0
    ):
        defaults = {"lr": 0.0, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in (one for one in group["params"] if one.grad is not None):
                state = self.state[weight]
                if not state:
                    state["square"], state["moment"] = torch.ones_like(weight), torch.zeros_like(weight)
                gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                state["square"].lerp_(gradient.square(), 1 - group["decay"])
                root = (state["square"] + group["eps"]).sqrt_()
                state["moment"].mul_(group["momentum"]).addcdiv_(gradient, root, value=group["lr"])
                weight.sub_(state["moment"])

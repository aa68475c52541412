"""How much memory a rank's tensors take at the peak of a step: predicted, without a step being computed.

The step itself runs on torch's fake tensors, which have shapes but no memory: what autograd keeps, each gradient, and
what the loss and the teacher need for themselves are counted in the order in which they come and go. What DeepSpeed
keeps beside that stands in formulas, which hold for DeepSpeed 0.19.8 with the configurations of ds_configs/.
"""

import copy
import weakref

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varscale.config import BatchSizes, Config, zero_stage
from varscale.engine.learners import Learner, MicroBatch
from varscale.models.precision import autocast, view_format
from varscale.triton_launch import can_launch

STATES = {"sgd": 1, "lars": 1, "adamw": 2}  # float32 tensors an optimizer keeps per parameter
BUCKET = 500_000_000  # elements: DeepSpeed's own reduce_bucket_size
PREFETCH = 50_000_000  # elements: DeepSpeed's own stage3_prefetch_bucket_size
SIMULATED = 2  # micro-batches: from the second one on, all find the memory alike


def memory_estimate(config: Config, sizes: BatchSizes, deepspeed: dict, learner: Learner) -> dict[str, float]:
    """Bytes of one rank's tensors at the peak of a step, which is their sum, by what they are for:

    parameters, optimizer (its state, and float32 copies that ZeRO makes), teacher, views (of all micro-batches of a
    step), buffers (DeepSpeed's, for gradients on their way) and backward (activations and gradients, at the worst
    moment).

    Not in it: what CUDA and its libraries take for themselves, what the allocator loses between tensors, messages of
    batch normalisation and the loss between ranks, and the loader's memory. Parameters that ZeRO-3 has partitioned are
    whole while a micro-batch runs, as they are within stage3_max_live_parameters and stage3_max_reuse_distance.

    learner: before ZeRO-3 has partitioned it; it is left as it is. There must not be a process group of several ranks
        yet, with which the simulated step would speak.
    """
    stage, ranks, micro_batches = zero_stage(deepspeed), sizes.world_size, sizes.gradient_accumulation_steps
    zero = deepspeed.get("zero_optimization", {})
    whole = _bytes(learner.network)
    share = whole / ranks
    bucket = 4 * zero.get("reduce_bucket_size", BUCKET)
    buffers = bucket * (2 if zero.get("overlap_comm") and stage < 3 else 1) if stage else 0
    states = (share if stage else whole) * (STATES[config.optimizer.name] + (stage > 0))
    peak = simulated_peak(config, sizes, learner, keeps_gradients=stage < 2)
    reduced = min(whole, bucket)  # a copy of the gradients that the ranks add up at a time
    if stage == 0 and ranks == 1:
        backward = peak
    elif stage == 0:
        backward = max(peak, whole + reduced + min(_turned_over(config, learner), bucket))
    elif stage == 1:
        backward = max(peak, whole + share - buffers)  # the latter while the optimizer steps, without the buffers
    elif stage == 2:
        held = share if micro_batches > 1 else 0  # of the micro-batches before
        partition = share if whole > bucket else 0  # of this one, made with the first full bucket
        backward = max(held + partition + max(peak, reduced), held + share, 2 * share - buffers)
    else:
        buffers += share  # the gradients' partition
        # From several ranks parameters come in one piece, of which each is copied out.
        gathered = min(whole, 4 * zero.get("stage3_prefetch_bucket_size", PREFETCH)) if ranks > 1 else 0
        backward = whole + max(peak + gathered, reduced)
    teacher = sum(map(_bytes, learner.companions().values()))
    if stage == 3 and ranks > 1:
        teacher += teacher / ranks  # whole until it follows the student
    parts = {
        "parameters": share if stage == 3 else whole,
        "optimizer": 0 if "offload_optimizer" in zero else states,
        "teacher": teacher,
        "views": micro_batches * sum(view.nbytes for view in _micro_batch(config, sizes, "meta").views),
        "buffers": buffers,
        "backward": backward,
    }
    return {name: size for name, size in parts.items() if size}


def _turned_over(config: Config, learner: Learner) -> int:
    """Bytes of gradients in channels-last, of which DeepSpeed makes contiguous copies before it puts them together."""
    if not config.compute.channels_last:
        return 0
    parameters = learner.network.parameters()
    return sum(p.nbytes for p in parameters if p.dim() == 4 and p.requires_grad and p.shape[2:].numel() > 1)


def simulated_peak(config: Config, sizes: BatchSizes, learner: Learner, *, keeps_gradients: bool) -> int:
    """Bytes that a step makes on top of parameters and views, up to its last backward pass, at the most.

    keeps_gradients: or each parameter's is given away as soon as it is complete, as under ZeRO-2 and 3.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels of this machine: they keep different things
    can_launch()  # which fake tensors could not answer
    mode, live = FakeTensorMode(), _LiveBytes()
    learner = _without_memory(learner, mode, device)
    with mode:
        count = min(SIMULATED, sizes.gradient_accumulation_steps)
        micro_batches = [_micro_batch(config, sizes, device) for _ in range(count)]
        tensors = [t for m in _modules(learner) for t in (*m.parameters(), *m.buffers())]
        live.ignore([*tensors, *(t for batch in micro_batches for t in (*batch.views, batch.labels, batch.indices))])
        if not keeps_gradients:
            for parameter in learner.network.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

        def forward(*views: Tensor) -> object:
            with autocast(config.compute, device):
                return learner.network(*views)

        with live:
            learner.before_step(forward, micro_batches)
            for batch in micro_batches:
                loss, terms = learner.loss(forward, batch)
                loss.backward()
                del loss, terms
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations made and what still lives of it, and the most there were at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # a fake tensor has no value: every check holds
            return True if args[0].dtype == torch.bool else 1
        if function is torch.ops.aten._unique2.default:  # of class numbers: as many as there can be
            return args[0].flatten(), torch.empty_like(args[0]), args[0].new_empty(0)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def ignore(self, tensors: list[Tensor]) -> None:
        """Do not count these, nor what only looks at them in another shape."""
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _without_memory(learner: Learner, mode: FakeTensorMode, device: str) -> Learner:
    """A copy of the learner whose tensors are fake ones on `device`."""
    tensors = [tensor for module in _modules(learner) for tensor in (*module.parameters(), *module.buffers())]
    copies = [mode.from_tensor(tensor.detach()) for tensor in tensors]
    fakes: dict[int, object] = {}
    with mode:
        for tensor, fake in zip(tensors, copies, strict=True):
            fake = torch.empty_like(fake, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
        return copy.deepcopy(learner, fakes)


def _micro_batch(config: Config, sizes: BatchSizes, device: str) -> MicroBatch:
    images = sizes.micro_batch_size
    dtype, layout = view_format(config.compute)
    views = tuple(
        torch.empty((count * images, 3, size, size), dtype=dtype, device=device, memory_format=layout)
        for size, count in config.data.views_by_size.items()
    )
    labels, indices = torch.zeros(2, images, dtype=torch.long, device=device).unbind()
    return MicroBatch(views, labels, indices)


def _modules(learner: Learner) -> list[nn.Module]:
    return [learner.network, *learner.companions().values()]


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())

"""The kNN accuracy of the encoder as it stands, measured while it is trained: the pulse of a run."""

from collections.abc import Callable

from torch import Tensor, nn

from varscale.config import Config
from varscale.data.dataset import DatasetInfo
from varscale.data.geometry import training_crops
from varscale.evaluation import knn
from varscale.evaluation.context import Context, Place
from varscale.evaluation.images import Images
from varscale.models.precision import autocast


class OnlineKNN:
    """Measures `network.encoder` on the validation split every `online_knn.every_epochs` and after the last epoch.

    network: in training; its parameters may be spread over the ranks, for every rank makes the same calls.
    workers: loader threads where the configuration leaves their number open.
    labelled: whether the data has labels; without them nothing is measured.
    heartbeat: called again and again while it measures.
    """

    def __init__(
        self,
        config: Config,
        info: DatasetInfo,
        network: nn.Module,
        place: Place,
        workers: int,
        labelled: bool,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self.every = config.online_knn.every_epochs if labelled else 0
        self.epochs = config.schedule.epochs
        self.network, self.place, self.heartbeat = network, place, heartbeat
        self.accuracy = f"top1_k{config.online_knn.k}"
        self.compute = config.compute
        self.settings = knn.Settings(k=(config.online_knn.k,), temperature=config.online_knn.temperature)
        data = config.data
        self.images = Images(
            data.dir,
            info,
            random_crop=training_crops(data)[0],
            mean=info.mean,
            std=info.std,
            seed=config.seed,
            workers=data.workers or workers,
            decoder=data.loader,
            on_bad_sample=data.on_bad_sample,
            os_cache=data.os_cache,
        )

    def is_due(self, epoch: int) -> bool:
        """Whether it is measured after this epoch, counted from 0."""
        return self.every > 0 and ((epoch + 1) % self.every == 0 or epoch + 1 == self.epochs)

    def measure(self) -> dict[str, float]:
        """Top-1, by the name `accuracy`, and top-5 in percent. Every rank must call it."""
        self.network.eval()
        try:
            return knn.run(Context(self._encode, self.images, self.place), self.settings).metrics
        finally:
            self.network.train()

    def _encode(self, images: Tensor) -> Tensor:
        self.heartbeat()
        with autocast(self.compute, images.device):
            return self.network.encoder(images)

"""A student that learns to predict its momentum teacher's outputs for other views: VSSL and its relatives."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from varscale.config import Config
from varscale.engine.learners.base import Forward, Learner, MicroBatch, Shown, Terms
from varscale.engine.phases import in_phase
from varscale.engine.schedules import teacher_momentum
from varscale.engine.zero import drop_whole_copies, finish_changes, local_part
from varscale.models.networks import StudentNetwork
from varscale.models.precision import autocast
from varscale.models.teacher import MomentumTeacher
from varscale.objectives.collapse import effective_rank, spread

COLLAPSED, ON_A_LINE = 0.2, 1.5  # below this spread or effective rank of the latents a person is warned

ViewLoss = Callable[[Sequence, Sequence], tuple[Tensor, Terms]]


class TeacherStudentLearner(Learner):
    """The student's outputs for all views against the teacher's for the large ones.

    view_loss: from the student's and the teacher's outputs, one a view, to the loss and its terms, among them those
        that `spread` and `effective_rank` need.
    """

    def __init__(self, network: StudentNetwork, view_loss: ViewLoss, config: Config, total_steps: int) -> None:
        self.network = network
        self.teacher = MomentumTeacher(network)
        self.view_loss = view_loss
        self.objective = config.objective
        self.compute = config.compute
        self.large_views = config.data.views
        self.total_steps = total_steps

    def loss(self, forward: Forward, batch: MicroBatch) -> tuple[Tensor, Terms]:
        student = by_view(forward(*batch.views), len(batch.labels))
        loss, terms = self.view_loss(student, self.teacher_outputs(batch))
        return loss, {"loss": loss, **terms}

    @in_phase("teacher forward")
    def teacher_outputs(self, batch: MicroBatch) -> list:
        """What the teacher says of each large view: small crops say too little to learn from."""
        large = batch.views[0]
        with autocast(self.compute, large.device):
            return by_view(self.teacher(large), len(batch.labels))

    @in_phase("EMA")
    def after_step(self, step: int) -> None:
        momentum = teacher_momentum(
            step, self.total_steps, base=self.objective.teacher_momentum, final=self.objective.teacher_momentum_final
        )
        drop_whole_copies(self.teacher)
        self.teacher.update(self.network, momentum, part=local_part)
        finish_changes(self.teacher)

    def derive(self, means: Terms) -> Shown:
        others = dict(means)
        direction = others.pop("direction")
        others["spread"] = spread(direction, others.pop("direction_square"))
        others["effective_rank"] = effective_rank(direction, others.pop("direction_product"))
        return super().derive(others)

    def warning(self, shown: Shown) -> str | None:
        if shown["spread"] >= COLLAPSED and shown["effective_rank"] >= ON_A_LINE:
            return None
        return (
            f"the latents are collapsing: spread {shown['spread']:.3f} (1 is healthy, 0 is one point for all images), "
            f"effective rank {shown['effective_rank']:.1f} (of {self.objective.latent_dim}; 1 is a line); "
            "a slower teacher (objective.teacher_momentum) or a lower learning rate may help"
        )

    def companions(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher}


def by_view(output: Tensor | tuple[Tensor, ...], images: int) -> list:
    """Rows of all views as one tensor a view, or for several tensors (a Gaussian's) as one tuple a view."""
    if isinstance(output, Tensor):
        return list(output.split(images))
    return list(zip(*(part.split(images) for part in output), strict=True))

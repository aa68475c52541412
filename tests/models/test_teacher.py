"""The teacher is a plain exponential moving average of the student, and its forward leaves no trace."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from varscale.models.networks import StudentNetwork, build_student_network
from varscale.models.teacher import MomentumTeacher, moving_average_


class TinyEncoder(nn.Sequential):
    feature_dim = 6

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture
def student() -> StudentNetwork:
    torch.manual_seed(0)
    return build_student_network(TinyEncoder(), latent_dim=4, projector_hidden=8, predictor_hidden=8, gaussian=True)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def train_a_little(student: StudentNetwork, images: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    mean, logvar = student(images)
    (mean.square().sum() + logvar.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_starts_as_the_student_without_predictor(student: StudentNetwork, images: torch.Tensor) -> None:
    teacher = MomentumTeacher(student)
    expected = {key: value for key, value in student.state_dict().items() if not key.startswith("predictor.")}
    found = teacher.network.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    mean, logvar = teacher(images)
    latents = student.projector(student.encoder(images))
    torch.testing.assert_close(mean, student.gaussian.mean(latents).detach())
    torch.testing.assert_close(logvar, student.gaussian.logvar(latents).detach())


def test_a_student_without_gaussian_head_has_a_teacher_without(images: torch.Tensor) -> None:
    student = build_student_network(TinyEncoder(), latent_dim=4, projector_hidden=8, predictor_hidden=8)
    teacher = MomentumTeacher(student)
    assert teacher.network.gaussian is None
    torch.testing.assert_close(teacher(images), student.projector(student.encoder(images)).detach())
    with torch.no_grad():
        student.projector[0].weight.add_(1.0)
    teacher.update(student, 0.0)
    assert torch.equal(teacher.network.projector[0].weight, student.projector[0].weight)


def test_forward_has_no_gradient_and_leaves_running_statistics(student: StudentNetwork, images: torch.Tensor) -> None:
    teacher = MomentumTeacher(student)
    before = deepcopy(teacher.state_dict())
    mean, logvar = teacher(images)
    assert not mean.requires_grad
    assert not logvar.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(layer.track_running_stats for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d))


def test_forward_uses_batch_statistics(student: StudentNetwork, images: torch.Tensor) -> None:
    teacher = MomentumTeacher(student.eval())
    moved = teacher(images * 3 + 10).mean  # the first batch norm takes a common scale and shift out again
    torch.testing.assert_close(moved, teacher(images).mean, rtol=1e-3, atol=1e-3)


def test_update_is_the_moving_average_over_several_steps(student: StudentNetwork, images: torch.Tensor) -> None:
    teacher = MomentumTeacher(student)
    expected = {name: p.detach().double() for name, p in teacher.network.named_parameters()}
    for momentum in (0.99, 0.9, 0.3):
        train_a_little(student, images)
        teacher.update(student, momentum)
        current = dict(student.named_parameters())
        for name in expected:
            expected[name] = momentum * expected[name] + (1 - momentum) * current[name].detach().double()
    for name, parameter in teacher.network.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(parameter, dict(student.named_parameters())[name])
    buffers = dict(student.named_buffers())
    assert buffers["encoder.1.num_batches_tracked"] == 3
    for name, buffer in teacher.network.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_update_of_the_teacher_leaves_the_student(student: StudentNetwork, images: torch.Tensor) -> None:
    teacher = MomentumTeacher(student)
    train_a_little(student, images)
    before = deepcopy(student.state_dict())
    teacher.update(student, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_momentum_zero_and_one_are_exact() -> None:
    source = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for momentum, expected in ((0.0, source), (1.0, torch.full((1000,), 0.1))):
        target = torch.full((1000,), 0.1)
        moving_average_([target], [source], momentum)
        assert torch.equal(target, expected)


def test_update_by_parts_leaves_the_rest(student: StudentNetwork, images: torch.Tensor) -> None:
    teacher, whole = MomentumTeacher(student), MomentumTeacher(student)
    before = deepcopy(dict(teacher.network.named_parameters()))
    train_a_little(student, images)
    teacher.update(student, 0.5, part=lambda p: p.detach().flatten()[: p.numel() // 2])
    whole.update(student, 0.5)
    expected = dict(whole.network.named_parameters())
    for name, parameter in teacher.network.named_parameters():
        half = parameter.numel() // 2
        assert torch.equal(parameter.flatten()[:half], expected[name].flatten()[:half])
        assert torch.equal(parameter.flatten()[half:], before[name].flatten()[half:])


def test_wrong_calls_are_named(student: StudentNetwork) -> None:
    teacher = MomentumTeacher(student)
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        teacher.update(student, 1.5)
    students = {id(p) for p in student.parameters()}
    with pytest.raises(ValueError, match=r"encoder\.0\.weight: the student's shape is \(0,\).*both or neither"):
        teacher.update(student, 0.9, part=lambda p: p.detach().flatten()[: 0 if id(p) in students else None])
    student.encoder[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"the student has no encoder\.1\.weight"):
        teacher.update(student, 0.9)

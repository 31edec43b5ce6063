"The tensor functions for all dtypes and devices, with extreme values, and without synchronising in a step."
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ltrl_fastai.all import (BalancedSoftmaxLoss, TeacherMemory, batch_class_counts, class_centers, class_similarity,
                             conflict_coefficient, project_conflict, review_loss, soft_cross_entropy, soft_labels)

devices = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
tols = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=devices)
def device(request): return request.param


@pytest.fixture(params=list(tols), ids=str)
def dtype(request): return request.param


def batch(device, dtype, n=24, c=6):
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, n, c, generator=g, dtype=torch.float64)*3
    return z.to(device, dtype), t.to(device, dtype), torch.randint(0, c, (n,), generator=g).to(device)


def assert_same(got, want, dtype):
    tol = tols[dtype]
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=tol, atol=tol)


def test_every_dtype_agrees_with_float64(device, dtype):
    z, t, y = batch(device, dtype)
    Z, T, Y = z.double().cpu(), t.double().cpu(), y.cpu()
    for kwargs in ({}, dict(count_scale=True), dict(tau=1., has_teacher=Y < 4)):
        on_device = {k: v.to(device) if torch.is_tensor(v) else v for k, v in kwargs.items()}
        loss = review_loss(z, t, y, **on_device)
        assert_same(loss, review_loss(Z, T, Y, **kwargs), dtype)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    M = class_similarity(class_centers(z, y, 6))
    assert_same(M, class_similarity(class_centers(Z, Y, 6)), dtype)
    M64 = M.double().cpu()
    assert_same(soft_cross_entropy(z, soft_labels(y, M, .9)), soft_cross_entropy(Z, soft_labels(Y, M64, .9)), dtype)
    assert_same(project_conflict(z, -z+.1*t), project_conflict(Z, -Z+.1*T), dtype)
    assert project_conflict(z, t).dtype == dtype
    counts = [500, 90, 30, 10, 4, 1]
    assert_same(BalancedSoftmaxLoss(counts)(z, y), BalancedSoftmaxLoss(counts)(Z, Y), dtype)


@pytest.mark.parametrize('gap', [120., 1e4])
def test_extreme_logits(device, dtype, gap):
    "The published log(softmax) overflows at gaps near 120"
    _, _, y = batch(device, dtype)
    hot = torch.nn.functional.one_hot(y, 6).to(dtype)*gap
    for student, teacher in [(hot, hot), (-hot, hot), (hot.roll(1, 1), hot), (torch.zeros_like(hot), hot)]:
        s = student.clone().requires_grad_()
        loss = review_loss(s, teacher, y) + soft_cross_entropy(s, soft_labels(y, torch.eye(6, device=device), .9))
        loss.backward()
        assert loss.isfinite()
        assert s.grad.isfinite().all()


def test_rows_without_a_teacher_may_hold_anything(device):
    z, t, y = batch(device, torch.float32)
    seen = torch.arange(24, device=device) % 2 == 0
    spoiled = torch.where(seen[:, None], t, float('nan'))
    z.requires_grad_()
    loss = review_loss(z, spoiled, y, has_teacher=seen)
    torch.testing.assert_close(loss, review_loss(z, t, y, has_teacher=seen))
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_gradients():
    z, t, y = batch('cpu', torch.float64, 6, 4)
    M = torch.rand(4, 4).double()
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: review_loss(z, t, y), z)
    assert torch.autograd.gradcheck(lambda z: review_loss(z, t, y, count_scale=True), z)
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(z, soft_labels(y, M, .8)), z)
    assert torch.autograd.gradcheck(lambda z: BalancedSoftmaxLoss([9, 3, 2, 1]).func(z, y), z)


def test_no_gradient_flows_into_the_teacher():
    z, t, y = batch('cpu', torch.float32)
    t.requires_grad_()
    assert not review_loss(z, t, t.argmax(1)).requires_grad


def test_a_step_reads_nothing_back_from_the_device():
    "Fake CUDA tensors have no values, so reading one on the host raises an error. Works without a GPU."
    with FakeTensorMode():
        with pytest.raises(DataDependentOutputException): torch.zeros(1, device='cuda').item()
        z, t = torch.randn(2, 8, 5, device='cuda')
        y = torch.zeros(8, dtype=torch.long, device='cuda')
        seen = torch.ones(8, dtype=torch.bool, device='cuda')
        ids = torch.arange(8, device='cuda')
        M = torch.rand(5, 5, device='cuda')
        assert review_loss(z, t, y, has_teacher=seen, count_scale=True).device.type == 'cuda'
        soft_cross_entropy(z, soft_labels(y, M))
        batch_class_counts(y, 5)
        project_conflict(z, t)
        conflict_coefficient(z.sum(), t.sum())
        memory = TeacherMemory(20, 5, device='cuda')
        memory.remember(ids, z, y, seen, list(range(8)))
        memory.recall(ids)

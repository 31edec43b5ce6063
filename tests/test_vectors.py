"Our functions compared with outputs of the published ones: float64 to 1e-6, float32 to 1e-5."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ltrl_fastai.all import (BalancedSoftmaxLoss, KnowledgeSummary, batch_class_counts, class_centers, class_similarity,
                             conflict_coefficient, imbalanced_counts, project_conflict, review_loss, review_mask,
                             shot_groups, soft_cross_entropy, soft_labels)

here = Path(__file__).parent/'vectors'
dtypes = pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-6), (torch.float32, 1e-5)])


def load(name, dtype):
    "Arrays as tensors, floating ones in `dtype`"
    d = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(here/f'{name}.npz').items()}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in d.items()}


def close(a, b, tol): torch.testing.assert_close(a.detach(), b.to(a.dtype), rtol=tol, atol=tol)


@dtypes
def test_soft_labels(dtype, tol):
    d = load('soft_labels', dtype)
    close(soft_labels(d['labels'], d['similarity'], alpha=.99), d['soft_labels'], tol)


@dtypes
def test_label_smoothing_before_centres(dtype, tol):
    d = load('soft_labels', dtype)
    ks = KnowledgeSummary(mode='replace', smoothing=.1, adapt=0., resemblance='features')
    close(ks._soft_labels(d['labels'], 10).to(dtype), d['soft_labels_first_epoch'], tol)


@dtypes
def test_centres_and_similarity(dtype, tol):
    d = load('centres', dtype)
    centers = class_centers(d['features'], d['labels'], 6)
    close(centers, d['centres'], tol)
    close(class_similarity(centers), d['similarity'], tol)


@dtypes
def test_projection(dtype, tol):
    d = load('projection', dtype)
    n = int(d['n'])
    main, aux = [[d[f'g_{o}_{j}'] for j in range(n)] for o in ('ltr', 'kr')]
    for j in range(n):
        close((aux[j]*main[j]).sum(), d[f'dot_{j}'], tol)
        close(main[j]+project_conflict(aux[j], main[j]), d[f'combined_{j}'], tol)
    dots = torch.stack([(a*m).sum() for a, m in zip(aux, main)])
    norms2 = torch.stack([m.square().sum() for m in main])
    coefs = conflict_coefficient(dots, norms2)
    close((coefs < 0).to(dtype).mean(), d['official_conflict_fraction'], tol)
    flat = [torch.cat([o.flatten() for o in g]) for g in (aux, main)]
    close(flat[1]+project_conflict(*flat), d['not_official_global_combined'], tol)


@dtypes
@pytest.mark.parametrize('name', ['bsce_rl', 'sade_rl'])
def test_review(name, dtype, tol):
    d = load(name, dtype)
    logits = d['logits'].clone().requires_grad_()
    z = logits.mean(1) if logits.ndim == 3 else logits
    y, teacher, tau = d['targets'], d['prev_logits'], float(d['tau'])
    assert (review_mask(teacher, y) == d['cci_mask']).all()
    assert (batch_class_counts(y, 10) == d['batch_class_count']).all()
    close(z/batch_class_counts(y, 10)[:, None], d['stored_logits'], tol)
    loss = d['kr_weight']*review_loss(z, teacher, y, tau=tau, count_scale=True)
    close(loss, d['loss_kr'], tol)
    close(torch.autograd.grad(loss, logits)[0], d['grad_logits_kr'], tol)
    close(review_loss(z, teacher, y, tau=tau), d['not_official_kr_without_count_division_unweighted'], tol)


@dtypes
def test_balanced_softmax_with_soft_labels(dtype, tol):
    d = load('bsce_rl', dtype)
    logits = d['logits'].clone().requires_grad_()
    trained = BalancedSoftmaxLoss(d['cls_num_list']).trained_logits(logits)
    loss = soft_cross_entropy(trained, soft_labels(d['targets'], d['similarity'], .99))
    close(loss, d['loss_ltr_ks'], tol)
    close(torch.autograd.grad(loss, logits)[0], d['grad_logits_ltr_ks'], tol)


@dtypes
def test_sade_with_soft_labels(dtype, tol):
    d = load('sade_rl', dtype)
    logits = d['logits'].clone().requires_grad_()
    n = d['cls_num_list'].to(dtype)
    pi = n/n.sum()
    mirrored = torch.empty_like(pi)
    mirrored[pi.argsort()] = pi.sort(descending=True).values
    soft = soft_labels(d['targets'], d['similarity'], .99)
    of_experts = [logits[:, 0], logits[:, 1]+pi.log(), logits[:, 2]+pi.log()-2*mirrored.log()]
    loss = sum(soft_cross_entropy(z, soft) for z in of_experts)
    close(loss, d['loss_ltr_ks'], tol)
    close(torch.autograd.grad(loss, logits)[0], d['grad_logits_ltr_ks'], tol)


def test_cifar_profile():
    for factor, o in json.loads((here/'cifar100_lt_profile.json').read_text()).items():
        counts = imbalanced_counts(500, 100, float(factor))
        assert counts == o['counts']
        assert sum(counts) == o['total']
        groups = shot_groups(counts)
        for k in ('many', 'medium', 'few'): assert groups[k].sum() == o[k]

"Memories belong to one model and one data set, and are dropped when either changes (fault 6)."
import os
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.vision.all import (Callback, CancelFitException, DataLoader, DataLoaders, Datasets, Learner, nn, params,
                               set_seed)
from ltrl_fastai.all import BalancedSoftmaxLoss, Diagnosis, ReflectiveLearning, WithIds, class_counts, digits_lt
from ltrl_fastai.reflective.terms import KeptItems, same_items


def constant():
    "Review and summary of constant strength, so that they act from the second epoch on"
    return ReflectiveLearning(kr=dict(weight=1., adapt=0.), ks=dict(adapt=0., alpha=.9))


def learner(cbs, dls=None):
    dls = dls or digits_lt(device='cpu', n_max=40)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return Learner(dls, net, loss_func=BalancedSoftmaxLoss(class_counts(dls)), cbs=cbs)


def fit(learn, epochs=1, **kwargs):
    "The review loss and the summary loss of each epoch"
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, **kwargs)
    return [(o['review_loss'], o['summary_loss']) for o in learn.loss_terms.history[-epochs:]]


def starts_anew(learn):
    "Whether nothing is remembered in the next epoch"
    return fit(learn) == [(None, None)]


def remembers(learn):
    "Whether review and summary act in the next epoch"
    return None not in fit(learn)[0]


def test_fault_06_one_callback_on_several_learners():
    rl = constant()
    dls = digits_lt(device='cpu', n_max=40)
    for _ in range(3):
        first, second = fit(learner(rl, dls), 2)
        assert first == (None, None)
        assert None not in second


def loaded(learn, tmp_path):
    learn.path = tmp_path
    learn.save('before')
    fit(learn)
    learn.load('before')


def another_model(learn, tmp_path): learn.model = learner(None).model
def removed_and_added(learn, tmp_path):
    rl = learn.reflective_learning
    learn.remove_cb(rl)
    learn.add_cb(rl)
def other_data(learn, tmp_path): learn.dls = digits_lt(device='cpu', n_max=40, data_seed=1)
def state_dict_loaded(learn, tmp_path): learn.model.load_state_dict(learner(None).model.state_dict())
def new_head(learn, tmp_path): learn.model[3] = nn.Linear(16, 10)
def one_weight_nudged(learn, tmp_path):
    with torch.no_grad(): next(learn.model.parameters())[0, 0] += 1e-3
def two_units_swapped(learn, tmp_path):
    with torch.no_grad(): learn.model[1].weight[:2] = learn.model[1].weight[[1, 0]]
def trained_elsewhere(learn, tmp_path):
    other = Learner(learn.dls, learn.model, loss_func=learn.loss_func)
    with other.no_bar(), other.no_logging(): other.fit(1, 1e-2)


changes = [loaded, another_model, removed_and_added, other_data, state_dict_loaded, new_head, one_weight_nudged,
           two_units_swapped, trained_elsewhere]


def items_moved(learn, tmp_path):
    "Within the first class of the same data set"
    ds = learn.dls.train_ds
    own = (ds.targets == 0).nonzero().flatten()
    ds.x[own] = ds.x[own.flip(0)]
def items_replaced(learn, tmp_path):
    ds = learn.dls.train_ds
    ds.x = 255-ds.x

changes += [items_moved, items_replaced]


@pytest.mark.parametrize('change', changes)
def test_fault_06_memories_are_dropped_with_the_model_or_the_data(change, tmp_path):
    learn = learner(constant())
    fit(learn, 2)
    assert remembers(learn)  # memories outlast a fit
    change(learn, tmp_path)
    assert starts_anew(learn)


def nothing(learn): pass
def evaluated(learn):
    learn.validate()
    with learn.no_bar(): learn.get_preds(ds_idx=0)
    learn.lr_find(show_plot=False, num_it=5)
def copied_with_its_weights(learn): learn.model = deepcopy(learn.model)
def moved(learn): learn.model.to('cpu')
def toggled(learn): learn.reflective_learning.switch(kr=False).switch(kr=True)
def frozen(learn):
    for p in learn.model[1].parameters(): p.requires_grad_(False)


@pytest.mark.parametrize('action', [nothing, evaluated, copied_with_its_weights, moved, toggled, frozen])
def test_memories_outlast(action):
    learn = learner(constant())
    fit(learn, 2)
    action(learn)
    assert remembers(learn)


class Items:
    "A data set with items, like those of fastai, and a transform"
    vocab = list('abc')
    def __init__(self, items, scale=1.):
        self.items = items
        self.scale = scale
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.scale*torch.randn(4), i % 3


def test_fault_06_a_list_of_items_that_is_sorted_in_place():
    items = list(range(60))
    learn = small_learner(Items(items))
    fit(learn, 2)
    assert remembers(learn)
    items[0], items[3] = items[3], items[0]
    assert starts_anew(learn)


def small_learner(train):
    dls = DataLoaders(DataLoader(train, bs=20, shuffle=True), DataLoader(Items(list(range(12))), bs=12))
    return Learner(dls, nn.Linear(4, 3), loss_func=BalancedSoftmaxLoss([20, 20, 20]), cbs=constant())


def test_the_same_items_through_other_transforms_keep_memories():
    "As in progressive resizing"
    learn = small_learner(Items(list(range(60))))
    fit(learn, 2)
    learn.dls.train.dataset = Items(list(range(60)), scale=2.)
    assert remembers(learn)
    learn.dls.train.dataset = Items(list(range(1, 61)))
    assert starts_anew(learn)


class Rows:
    "A data set of a user's own: arrays or tensors, and labels"
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return torch.as_tensor(self.x[i]), int(self.y[i])


def rows(): return Rows(torch.randn(60, 4), torch.arange(60) % 3)
def pairs(): return [(torch.randn(4), i % 3) for i in range(60)]
def dict_pairs(): return [({'x': torch.randn(4)}, i % 3) for i in range(60)]


def relabelled(ds): ds.y[[0, 1]] = ds.y[[1, 0]]
def a_row_changed(ds): ds.x[30] = 0
def two_swapped(items): items[0], items[3] = items[3], items[0]
def other_indices(ds): ds.indices[:] = range(60, 120)
def two_swapped_within(ds): two_swapped(ds.dataset)


class Images:
    "A data set of the pixels of files"
    def __init__(self, folder):
        self.items = [folder/f'{i}.bin' for i in range(60)]
        for i, file in enumerate(self.items): file.write_bytes(bytes([i]*4))
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return torch.tensor(list(self.items[i].read_bytes()))/60, i % 3


def two_files_swapped(ds):
    a, b = ds.items[0], ds.items[3]
    a.write_bytes(bytes([3]*4))
    b.write_bytes(bytes([0]*4))
    for o in (a, b): os.utime(o, (1, 1))


@pytest.mark.parametrize('make,change', [
    (rows, relabelled),
    (rows, a_row_changed),
    (lambda: Rows(np.random.randn(60, 4).astype('float32'), np.arange(60) % 3), relabelled),
    (lambda: Rows(np.random.randn(60, 4).astype('float32'), np.arange(60) % 3), a_row_changed),
    (pairs, two_swapped),
    (lambda: torch.utils.data.Subset(pairs()*2, list(range(60))), other_indices),
    (lambda: torch.utils.data.Subset(pairs(), list(range(60))), two_swapped_within),
    (lambda: WithIds(pairs()), two_swapped_within),
    (None, two_files_swapped),
], ids=['labels', 'tensor', 'array labels', 'array', 'list', 'indices', 'subset', 'with ids', 'files'])
def test_fault_06_data_that_change_in_place(make, change, tmp_path):
    ds = make() if make else Images(tmp_path)
    learn = small_learner(ds)
    fit(learn, 2)
    assert remembers(learn)
    change(ds)
    assert starts_anew(learn)
    assert remembers(learn)


def test_fault_06_items_that_can_not_be_compared():
    "Dicts of tensors have no `==` that is true or false"
    items = dict_pairs()
    kept = KeptItems(items)
    assert kept.same_as(KeptItems(items))
    two_swapped(items)
    assert not kept.same_as(KeptItems(items))


def renamed(items):
    res = Items(items)
    res.vocab = list('xyz')
    return res


@pytest.mark.parametrize('a,b,same', [
    (Items([1, 2]), Items([1, 2]), True),
    (Items([1, 2]), Items([2, 1]), False),
    (Items([1, 2]), Items([1]), False),
    (Items([1, 2]), renamed([1, 2]), False),
    (Items(np.arange(3)), Items(np.arange(3)), True),
    (Items(torch.arange(3)), Items(torch.ones(3)), False),
    (Items([np.arange(2)]), Items([np.arange(2)]), False),
    (Items([1]), Items((1,)), False),
    ([1, 2], [1, 2], False),
    (Datasets([1, 2], [[lambda o: o]]), Datasets([1, 2], [[lambda o: -o]]), True),
])
def test_same_items(a, b, same):
    assert same_items(a, b) == same
    assert same_items(a, a)


class Raise(Callback):
    "Raise an exception in the middle of the second epoch"
    def __init__(self, exc): self.exc = exc
    def before_batch(self):
        if self.training and self.epoch == 1 and self.iter == 2: raise self.exc


def test_a_cancelled_fit_keeps_its_memories():
    learn = learner(constant())
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=Raise(CancelFitException))
    assert remembers(learn)


def test_an_interrupted_fit_keeps_its_memories():
    learn = learner(constant())
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2, cbs=Raise(KeyboardInterrupt))
    assert remembers(learn)


def test_diagnosis_belongs_to_a_model():
    learn = learner([constant(), Diagnosis()])
    fit(learn, 2)
    assert np.isfinite(learn.diagnosis.kl[-1]).any()
    another_model(learn, None)
    fit(learn)
    assert np.isnan(learn.diagnosis.kl[0]).all()


def test_weights_that_are_nan_start_anew():
    learn = learner(constant())
    fit(learn, 2)
    with torch.no_grad(): learn.model[1].weight.fill_(float('nan'))
    assert starts_anew(learn)
    assert params(learn.model)[0].isnan().any()


def test_loaders_that_are_copied_keep_memories():
    set_seed(0)
    learn = learner(constant())
    fit(learn, 2)
    learn.dls = DataLoaders(learn.dls.train.new(), learn.dls.valid, device='cpu')
    assert remembers(learn)

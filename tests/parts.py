"Reflective Learning with all three parts, for tests of how callbacks work together."
from ltrl_fastai.all import ReflectiveLearning


def all_three():
    "The settings of v0.0.1, which take effect from the second epoch on whatever the data"
    return ReflectiveLearning(preset='v0.0.1', ks=True, kc=True)

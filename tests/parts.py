"All three parts with the settings of v0.0.1, which act from the second epoch on whatever the data: for tests of how callbacks work together."
from ltrl_fastai.all import ReflectiveLearning


def all_three(): return ReflectiveLearning(preset='v0.0.1', ks=True, kc=True)

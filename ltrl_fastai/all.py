"Everything that a notebook or a script wants: `from ltrl_fastai.all import *`, after `from fastai.vision.all import *`."
from ltrl_fastai.core.tensors import *
from ltrl_fastai.core.counts import *
from ltrl_fastai.core.memory import *
from ltrl_fastai.core.ranks import *
from ltrl_fastai.reflective.functional import *
from ltrl_fastai.reflective.samples import *
from ltrl_fastai.reflective.stores import *
from ltrl_fastai.reflective.memory import *
from ltrl_fastai.reflective.terms import *
from ltrl_fastai.reflective.features import *
from ltrl_fastai.reflective.review import *
from ltrl_fastai.reflective.summary import *
from ltrl_fastai.reflective.correction import *
from ltrl_fastai.reflective.learning import *
from ltrl_fastai.data.imbalance import *
from ltrl_fastai.data.images import *
from ltrl_fastai.data.fast import *
from ltrl_fastai.data.benchmarks import *
from ltrl_fastai.data.frozen import *
from ltrl_fastai.data.shipped import *
from ltrl_fastai.data.lists import *
from ltrl_fastai.data.own import *
from ltrl_fastai.methods.losses import *
from ltrl_fastai.methods.nets import *
from ltrl_fastai.methods.weights import *
from ltrl_fastai.methods.margins import *
from ltrl_fastai.methods.lade import *
from ltrl_fastai.methods.posthoc import *
from ltrl_fastai.methods.views import *
from ltrl_fastai.methods.heads import *
from ltrl_fastai.methods.method import *
from ltrl_fastai.methods.experts import *
from ltrl_fastai.methods.ride import *
from ltrl_fastai.methods.sade import *
from ltrl_fastai.methods.mdcs import *
from ltrl_fastai.methods.oltr import *
from ltrl_fastai.methods.balancing import *
from ltrl_fastai.methods.mislas import *
from ltrl_fastai.methods.decouple import *
from ltrl_fastai.methods.bbn import *
from ltrl_fastai.methods.paco import *
from ltrl_fastai.methods.ncl import *
from ltrl_fastai.methods.catalogue import *
from ltrl_fastai.methods.optimizer import *
from ltrl_fastai.evaluation.metrics import *
from ltrl_fastai.evaluation.report import *
from ltrl_fastai.evaluation.shift import *
from ltrl_fastai.evaluation.diagnosis import *
from ltrl_fastai.evaluation.pictures import *
from ltrl_fastai.experiments.checkpoint import Checkpoint as Checkpoint # `as` says to type checkers that it is handed on
from ltrl_fastai.experiments.recipes import Recipe as Recipe, recipe as recipe, recipes as recipes
# Left out, since a star import must shadow nothing and bring no everyday word: import these by name, from their modules.
del fastai_path # noqa: F821 - fastai has another
del follow, interval, locate, smooth # noqa: F821
del as_listed, dealt, few_of, flat_val, read_csv, shrink, where_to_put, with_targets # noqa: F821
del alone_and_even, scales_alone_and_even, shifted_and_even # noqa: F821

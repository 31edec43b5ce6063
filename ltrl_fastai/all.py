"Everything that a notebook or a script wants: `from ltrl_fastai.all import *`, after `from fastai.vision.all import *`."
from ltrl_fastai.reflective.functional import *
from ltrl_fastai.reflective.samples import *
from ltrl_fastai.reflective.memory import *
from ltrl_fastai.reflective.terms import *
from ltrl_fastai.reflective.features import *
from ltrl_fastai.reflective.review import *
from ltrl_fastai.reflective.summary import *
from ltrl_fastai.reflective.correction import *
from ltrl_fastai.reflective.learning import *
from ltrl_fastai.data.imbalance import *
from ltrl_fastai.data.fast import *
from ltrl_fastai.data.benchmarks import *
from ltrl_fastai.methods.losses import *
from ltrl_fastai.methods.nets import *
from ltrl_fastai.evaluation.metrics import *
from ltrl_fastai.evaluation.report import *

"Names for notebooks and scripts, by task: `from ltrl_fastai.all import *` after `from fastai.vision.all import *`."
from ltrl_fastai.reflective.learning import presets, ReflectiveLearning
from ltrl_fastai.reflective.review import review_risks, KnowledgeReview
from ltrl_fastai.reflective.summary import class_predictions, shared_predictions, KnowledgeSummary
from ltrl_fastai.reflective.correction import KnowledgeCorrection
from ltrl_fastai.reflective.gap import unevenness, GeneralizationGap
from ltrl_fastai.reflective.samples import WithIds, SampleIds
from ltrl_fastai.core.ranks import Ranks, allow_cpu_ranks
from ltrl_fastai.experiments.checkpoint import Checkpoint
from ltrl_fastai.methods.optimizer import nesterov_step, benchmark_sgd, body_and_head, BodyRate
from ltrl_fastai.methods.sam import SAM, FocalSAM, ImbSAM
from ltrl_fastai.methods.averages import WeightAverage
from ltrl_fastai.methods.finetuning import finetuned_net, FrozenStats, HeadFirst
from ltrl_fastai.methods.adapters import adapt_vit, parameter_counts
from ltrl_fastai.methods.lift import FiveCrops, InitHead, five_crops, lift_net
from ltrl_fastai.deploy.best import KeepBest, weights_of
from ltrl_fastai.deploy.suspects import LabelAgreement, LabelRecord, label_doubt, suspects
from ltrl_fastai.deploy.calibration import Calibration, fit_calibration, read_prior
from ltrl_fastai.deploy.priors import PriorEstimate, estimate_prior, implied_prior
from ltrl_fastai.deploy.thresholds import ClassThresholds, fit_thresholds
from ltrl_fastai.deploy.model_files import load_classifier, save_classifier
from ltrl_fastai.deploy.predict import Prediction, image_files, predict_files, prediction_columns, prediction_row
from ltrl_fastai.deploy.evaluate import Evaluation, Measured, evaluate, evaluate_logits
from ltrl_fastai.deploy.export import ServingNet, export_model, read_exported, serving_net
from ltrl_fastai.data.imbalance import (long_tail_indices, long_tail_subset, LongTailSplitter, dataset_targets,
    without_augmentation, class_counts, imbalanced_counts)
from ltrl_fastai.data.benchmarks import (DataNote, LongTailDataLoaders, long_tailed, digits_lt, load_cifar, cifar100_lt,
    cifar10_lt)
from ltrl_fastai.data.shipped import shipped_photos, photos_lt
from ltrl_fastai.data.beds import grocery, magnetic, unicode_names, landforms, digits_folder
from ltrl_fastai.data.frozen import frozen_features, Lite0, TorchFeatures, cifar100_frozen_lt, frozen_loaders
from ltrl_fastai.data.lists import (TrainCrop, ImageAugment, photo_tfms, ImageFileDataLoaders, image_dataloaders,
    imagenet_lt, places_lt, inaturalist18)
from ltrl_fastai.data.own import own_images
from ltrl_fastai.data.audit import Audit, inspect_images
from ltrl_fastai.data.audit_page import audit_html, audit_text
from ltrl_fastai.data.labelled import labelled_images, match_classes
from ltrl_fastai.data.images import UnreadableImage, open_image, broken_images
from ltrl_fastai.data.fast import (TensorItems, ImageTensors, FeatureTensors, TensorDL, pad_crop, random_flip, cutout,
    BatchAug, small_image_tfms, tensor_dataloaders)
from ltrl_fastai.methods.catalogue import methods, method_constants, method_with, Methods
from ltrl_fastai.methods.losses import BalancedSoftmax, BalancedSoftmaxLoss, smooth_labels
from ltrl_fastai.methods.weights import effective_weights, ClassBalancedLoss, DeferredWeights
from ltrl_fastai.methods.sampling import (power_shares, progressive_shares, draws_per_image, repeats_note, Resampling,
    PowerSampling, ProgressiveSampling, DeferredSampling, weighted_order, WeightedSampling)
from ltrl_fastai.methods.scaling import VectorScaling, VectorScalingLoss
from ltrl_fastai.methods.seesaw import Seesaw, SeesawLoss
from ltrl_fastai.methods.gcl import gcl_stage, cloud_sizes, GCL, GCLLoss
from ltrl_fastai.methods.los import los_stage, los_margin, logits_magnitude, over_smooth
from ltrl_fastai.methods.margins import LDAM, LDAMLoss
from ltrl_fastai.methods.lade import lader, LADE, LADELoss
from ltrl_fastai.methods.posthoc import LogitAdjustment, best_tau, crossfit_adjusted
from ltrl_fastai.methods.nets import CosineHead, BasicBlock, CifarResNet, mlp, drop_features, create_net
from ltrl_fastai.methods.heads import head_of, replace_head, pretrained_net, cosine_head, HeadOnly, ClassAwareSampling
from ltrl_fastai.methods.views import ViewPipeline, two_views, SplitViews, OnViews
from ltrl_fastai.methods.experts import ExpertHeads, ExpertNet, GlobalPool, expert_net, ExpertsLoss
from ltrl_fastai.methods.ride import (assignment, distillation, RIDELoss, Gate, GatedExperts, GateLoss, assign_experts,
    Distilled, WithTeacher, TeacherAndStudent, distil_net)
from ltrl_fastai.methods.sade import aggregation, with_reversed_ranks, SADELoss, aggregate_experts
from ltrl_fastai.methods.mdcs import MDCSLoss, RampUp, mdcs_net
from ltrl_fastai.methods.ncl import hard_classes, NCLLoss, ncl_net
from ltrl_fastai.methods.paco import QueuedNet, queued_net, KeyQueue, PaCoLoss
from ltrl_fastai.methods.balpoe import BalPoELoss
from ltrl_fastai.methods.bcl import ProjectedNet, CentredNet, centred_net, BCLLoss
from ltrl_fastai.methods.proco import (log_normaliser_ratio, ClassDistributions, distributions_net, UpdateDistributions,
                                       ProCoLoss)
from ltrl_fastai.methods.glmc import random_box, GlobalLocalMix, TwoHeadNet, two_head_net, GLMCLoss
from ltrl_fastai.methods.car import soft_confusion, largest_singular_value, ConfusionRegularizer
from ltrl_fastai.methods.bbn import ReversedBatch, BilateralNet, bilateral_net, BBNLoss
from ltrl_fastai.methods.decouple import (crt, lws, tau_norm, ncm, new_head, ScaledHead, scaled_head, TauNormHead,
    tau_norm_head, features_of, unaugmented, MeanHead, class_means, mean_head)
from ltrl_fastai.methods.mislas import mislas_stage, smoothing_by_class, LabelAwareSmoothing
from ltrl_fastai.methods.balancing import (balancing_stage, published_balancing, MaxNorm, WeightDecay,
    BinaryBalancedLoss, class_balanced, balancing_callbacks)
from ltrl_fastai.methods.oltr import oltr_stage, MemoryHead, OLTRLoss, with_memory
from ltrl_fastai.evaluation.metrics import shot_groups, group_accuracy, group_interval, ShotAccuracy, shot_accuracies
from ltrl_fastai.evaluation.classwise import classwise_errors, errors_by_prediction
from ltrl_fastai.evaluation.multilabel import ShotPrecision, label_precisions, shot_precisions
from ltrl_fastai.data.multilabel import MultiLabelTensors, digit_scenes, label_counts, label_matrix
from ltrl_fastai.methods.multilabel import AsymmetricLoss, DistributionBalancedLoss, MultiLabelLoss
from ltrl_fastai.reflective.labels import LabelReview, label_review_loss
from ltrl_fastai.evaluation.report import ShotReport
from ltrl_fastai.evaluation.pictures import (picture_ink, picture_palette, picture_params, picture_style, draw_classes,
    draw_by_class, draw_per_class, draw_shots, draw_report, draw_similarity, draw_drift, draw_drift_by_class,
    draw_conflicts, draw_terms)
from ltrl_fastai.evaluation.mistakes import (calibration_error, draw_confusion, draw_losses, draw_reliability,
    reliability)
from ltrl_fastai.evaluation.shift import (test_distributions, shifted_accuracy, shifted_table, shifted_indices,
    shifted_loaders, adapted_table)
from ltrl_fastai.evaluation.diagnosis import Diagnosis, feature_similarity, shot_means, diagnosis_of
from ltrl_fastai.experiments.recipes import Recipe, recipe, recipes
from ltrl_fastai.experiments.recommend import Recommendation, recommend, recommendations
from ltrl_fastai.experiments.html_report import write_report
from ltrl_fastai.methods.method import MethodLoss, Stage, Method, renew_optimizer
from ltrl_fastai.reflective.terms import CallbackWithHelpers, LossTerms, CallbackWithMemory
from ltrl_fastai.reflective.memory import TeacherMemory, FeatureBank
from ltrl_fastai.reflective.stores import DenseStore, DiskStore, make_store
from ltrl_fastai.reflective.functional import (batch_class_counts, review_loss, review_mask, class_centers,
    class_similarity, soft_labels, soft_cross_entropy, conflict_coefficient, project_conflict)
from ltrl_fastai.core.counts import check_counts, check_class_counts

__all__ = [
    # Train: Reflective Learning, and what goes with any `Learner`
    'presets', 'ReflectiveLearning', 'review_risks', 'KnowledgeReview', 'class_predictions', 'shared_predictions',
    'KnowledgeSummary', 'KnowledgeCorrection', 'unevenness', 'GeneralizationGap', 'WithIds', 'SampleIds', 'Ranks',
    'allow_cpu_ranks', 'Checkpoint', 'nesterov_step', 'benchmark_sgd', 'body_and_head', 'BodyRate', 'finetuned_net',
    'FrozenStats', 'HeadFirst', 'SAM', 'ImbSAM', 'FocalSAM', 'WeightAverage', 'KeepBest', 'LabelAgreement',
    # Load data, and look for faults in it
    'Audit', 'inspect_images', 'audit_text', 'audit_html',
    'long_tail_indices', 'long_tail_subset', 'LongTailSplitter', 'dataset_targets', 'without_augmentation',
    'class_counts', 'imbalanced_counts', 'DataNote', 'LongTailDataLoaders', 'long_tailed', 'digits_lt',
    'load_cifar', 'cifar100_lt', 'cifar10_lt', 'shipped_photos', 'photos_lt', 'grocery', 'magnetic',
    'unicode_names', 'landforms', 'digits_folder', 'frozen_features', 'Lite0', 'TorchFeatures',
    'cifar100_frozen_lt', 'frozen_loaders', 'TrainCrop', 'ImageAugment', 'photo_tfms', 'ImageFileDataLoaders',
    'image_dataloaders', 'imagenet_lt', 'places_lt', 'inaturalist18', 'own_images', 'UnreadableImage', 'open_image',
    'broken_images', 'TensorItems', 'ImageTensors', 'FeatureTensors', 'TensorDL', 'pad_crop', 'random_flip',
    'cutout', 'BatchAug', 'small_image_tfms', 'tensor_dataloaders',
    # Use another method: by name, or its losses, networks and callbacks
    'methods', 'method_constants', 'method_with', 'Methods', 'BalancedSoftmax', 'BalancedSoftmaxLoss',
    'smooth_labels', 'effective_weights', 'ClassBalancedLoss', 'DeferredWeights', 'LDAM', 'LDAMLoss', 'lader',
    'power_shares', 'progressive_shares', 'draws_per_image', 'repeats_note', 'Resampling', 'PowerSampling',
    'ProgressiveSampling', 'DeferredSampling', 'weighted_order', 'WeightedSampling', 'VectorScaling',
    'VectorScalingLoss', 'Seesaw', 'SeesawLoss', 'gcl_stage', 'cloud_sizes', 'GCL', 'GCLLoss', 'los_stage',
    'los_margin', 'logits_magnitude', 'over_smooth',
    'LADE', 'LADELoss', 'LogitAdjustment', 'best_tau', 'crossfit_adjusted', 'CosineHead', 'BasicBlock',
    'CifarResNet', 'mlp', 'drop_features', 'create_net', 'head_of', 'replace_head', 'pretrained_net', 'cosine_head',
    'HeadOnly', 'ClassAwareSampling', 'ViewPipeline', 'two_views', 'SplitViews', 'OnViews', 'ExpertHeads',
    'ExpertNet', 'GlobalPool', 'expert_net', 'ExpertsLoss', 'assignment', 'distillation', 'RIDELoss', 'Gate',
    'GatedExperts', 'GateLoss', 'assign_experts', 'Distilled', 'WithTeacher', 'TeacherAndStudent', 'distil_net',
    'aggregation', 'with_reversed_ranks', 'SADELoss', 'aggregate_experts', 'MDCSLoss', 'RampUp', 'mdcs_net', 'hard_classes',
    'NCLLoss', 'ncl_net', 'QueuedNet', 'queued_net', 'KeyQueue', 'PaCoLoss', 'ReversedBatch', 'BilateralNet',
    'BalPoELoss', 'ProjectedNet', 'CentredNet', 'centred_net', 'BCLLoss', 'log_normaliser_ratio', 'ClassDistributions',
    'distributions_net', 'UpdateDistributions', 'ProCoLoss', 'random_box', 'GlobalLocalMix', 'TwoHeadNet',
    'two_head_net', 'GLMCLoss', 'soft_confusion', 'largest_singular_value', 'ConfusionRegularizer',
    'bilateral_net', 'BBNLoss', 'crt', 'lws', 'tau_norm', 'ncm', 'new_head', 'ScaledHead', 'scaled_head',
    'TauNormHead', 'tau_norm_head', 'features_of', 'unaugmented', 'MeanHead', 'class_means', 'mean_head',
    'mislas_stage', 'smoothing_by_class', 'LabelAwareSmoothing', 'balancing_stage', 'published_balancing',
    'MaxNorm', 'WeightDecay', 'BinaryBalancedLoss', 'class_balanced', 'balancing_callbacks', 'oltr_stage',
    'MemoryHead', 'OLTRLoss', 'with_memory',
    'adapt_vit', 'parameter_counts', 'lift_net', 'InitHead', 'FiveCrops', 'five_crops',
    # Use a model: save it, load it, predict, evaluate, export
    'save_classifier', 'load_classifier', 'Calibration', 'fit_calibration', 'read_prior', 'Prediction',
    'image_files', 'predict_files', 'prediction_columns', 'prediction_row', 'Evaluation', 'Measured', 'evaluate',
    'evaluate_logits', 'labelled_images', 'match_classes', 'export_model', 'read_exported',
    # Look at results
    'shot_groups', 'group_accuracy', 'group_interval', 'ShotAccuracy', 'shot_accuracies', 'ShotReport',
    'picture_ink', 'picture_palette', 'picture_params', 'picture_style', 'draw_classes', 'draw_by_class',
    'draw_per_class', 'draw_shots', 'draw_report', 'draw_similarity', 'draw_drift', 'draw_drift_by_class',
    'draw_conflicts', 'draw_terms', 'test_distributions', 'shifted_accuracy', 'shifted_table', 'shifted_indices',
    'shifted_loaders', 'adapted_table', 'Diagnosis', 'feature_similarity', 'shot_means', 'diagnosis_of',
    'calibration_error', 'reliability', 'draw_confusion', 'draw_losses', 'draw_reliability', 'suspects',
    'write_report',
    # Compare: a recommendation, and recipes of the slides' tables
    'Recommendation', 'recommend', 'recommendations', 'Recipe', 'recipe', 'recipes',
    # Extend: parts for methods and callbacks of your own
    'MethodLoss', 'Stage', 'Method', 'renew_optimizer', 'CallbackWithHelpers', 'LossTerms', 'CallbackWithMemory',
    'TeacherMemory', 'FeatureBank', 'DenseStore', 'DiskStore', 'make_store', 'batch_class_counts', 'review_loss',
    'review_mask', 'class_centers', 'class_similarity', 'soft_labels', 'soft_cross_entropy', 'conflict_coefficient',
    'project_conflict', 'check_counts', 'check_class_counts', 'weights_of', 'LabelRecord', 'label_doubt',
    'ServingNet', 'serving_net',
    # After training: class frequencies and thresholds where a model is used
    'PriorEstimate', 'estimate_prior', 'implied_prior', 'ClassThresholds', 'fit_thresholds', 'classwise_errors',
    'errors_by_prediction',
    # Multi-label data
    'ShotPrecision', 'label_precisions', 'shot_precisions', 'MultiLabelTensors', 'digit_scenes', 'label_counts',
    'label_matrix', 'AsymmetricLoss', 'DistributionBalancedLoss', 'MultiLabelLoss', 'LabelReview',
    'label_review_loss',
]

# Names of the previous version, kept for one release
_renamed = {
    'Companion': 'CallbackWithHelpers', 'Remembers': 'CallbackWithMemory', 'EvenClasses': 'ClassAwareSampling',
    'SixThenThree': 'TeacherAndStudent', 'balanced_head': 'balancing_callbacks', 'eval_view': 'without_augmentation',
    'tau_normed': 'tau_norm_head', 'world_loaders': 'shifted_loaders', 'worlds': 'test_distributions',
    'mirrored': 'with_reversed_ranks',
}


def __getattr__(name):
    if name not in _renamed: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings
    warnings.warn(f"{name} is now called {_renamed[name]}; the old name will go in the next release.", FutureWarning,
                  stacklevel=2)
    return globals()[_renamed[name]]

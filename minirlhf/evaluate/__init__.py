"""How good a model is: one evaluation of a run, one of any models, judges, statistics, calibration, traces."""

from minirlhf.evaluate.evaluation import PRESETS, Answers, Config, Evaluator, best_of_n_kl, main, table
from minirlhf.evaluate.statistics import bootstrap_interval

__all__ = ["PRESETS", "Answers", "Config", "Evaluator", "best_of_n_kl", "bootstrap_interval", "main", "table"]

"""V*: estimators from sampled rewards, and the store that keeps the samples."""

from typing import Literal

EstimatorName = Literal["log_mean_exp", "debiased", "beta_smoothed", "mean", "max"]

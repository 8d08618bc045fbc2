"""V*: estimators from sampled rewards, and the store that keeps the samples. Baselines of a step's rewards."""

"""The fault campaign: what bad values do to a training run, by method, fault and share of the steps."""

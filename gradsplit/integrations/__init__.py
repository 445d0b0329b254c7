"""Adapters to other packages: the trainers Lightning, Transformers and Accelerate, and Keras and optax.

An adapter hands tensors, states and calls over. The rules themselves stand in `functional`, `splitter` and `optim`.
"""

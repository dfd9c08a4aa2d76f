"""Operators of the step, in shapes and forms that XLA and eager PyTorch both run well."""

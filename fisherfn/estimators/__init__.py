"""Estimators: transformations of a model that turn batches into Fisher information."""

"""Backbones and heads in Keras 3."""

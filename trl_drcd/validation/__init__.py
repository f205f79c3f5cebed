"""Validation of arguments, data and model files."""

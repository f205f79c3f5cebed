"""Checkpoints, exact resume, and the guard against bad batches."""

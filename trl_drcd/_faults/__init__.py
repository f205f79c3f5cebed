"""Interruptions, torn checkpoints, values that are not finite, processes that are lost: what training does then."""

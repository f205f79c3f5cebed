"""Workarounds for libraries, one file each: what for, which version, and which test says when it can go."""

"""The training scripts behind `trl-drcd train`."""

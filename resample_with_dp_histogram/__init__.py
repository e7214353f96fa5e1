"""Synthetic instructions whose distribution follows the private one, through a DP histogram."""

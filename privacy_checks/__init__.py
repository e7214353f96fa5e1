"""Checks of the privacy guarantee: the composed report, the empirical audit, neighbour replay."""

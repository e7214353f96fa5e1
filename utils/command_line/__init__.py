"""Flags and launch lines; only scripts and commands import this."""

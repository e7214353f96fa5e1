"""A run's folder, checkpoints, processes and end; imports nothing of texts, sampling or flags."""

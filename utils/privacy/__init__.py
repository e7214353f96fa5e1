"""The mechanism and its guarantee; imports nothing of texts, models, sampling, runs or flags."""

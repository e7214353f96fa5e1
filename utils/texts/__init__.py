"""From users' rows to tokens; imports nothing of privacy, models, sampling, runs or flags."""

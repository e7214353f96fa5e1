"""Base models, adapters, losses, memory; imports nothing of privacy, texts, sampling or runs."""

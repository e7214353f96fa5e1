"""Annotation: instructions to answers by GPT-3.5-Turbo or any OpenAI-compatible server."""

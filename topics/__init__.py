"""Topics of private rows: found in public texts, counted with noise, and prompts of a model."""

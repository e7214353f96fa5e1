"""Drawing texts, and the folder of what was drawn; imports nothing of privacy, texts or runs."""

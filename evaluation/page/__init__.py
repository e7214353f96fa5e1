"""The page of results: what it is made of, its sections, its charts."""

"""The measures: numbers of texts, embeddings and losses. No files, no flags."""

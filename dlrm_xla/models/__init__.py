"""Models over dense features and pooled embeddings."""

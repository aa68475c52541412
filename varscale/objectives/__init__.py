"""The training objectives, as pure functions of embeddings."""

"""The training objectives, as pure functions of embeddings: read `centroids`, then `varcon`; `vssl` stands alone."""

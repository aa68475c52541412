"""The training objectives, as pure functions of embeddings: read `centroids`, then `varcon`; `vssl` stands alone.

Of the baselines `contrast` and `gathering` hold what `supcon` (SimCLR's loss, too) and `mocov3` share; `byol` and
`cross_entropy` are plain means.
"""

"""`helio top`: a live view of a cluster, its runs and its endpoint."""

"""Which configuration is best: search spaces, the search and its study."""

"""Is pre-training worth it? The same protocol from the pre-trained backbone and from scratch, compared."""

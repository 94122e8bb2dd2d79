"""Image sources, shards, decoding, augmentation and the Ray Data stream."""

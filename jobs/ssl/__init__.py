"""Pre-training methods and the probes that watch them."""

"""Image sources: what they hold is listed lazily and read by workers, whatever it lies in."""

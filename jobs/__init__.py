"""What helio runs in batch: ingest, pre-train, fine-tune, export, and the whole pipeline."""

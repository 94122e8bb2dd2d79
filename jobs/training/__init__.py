"""The distributed step, schedules, checkpoints and fine-tuning."""

"""Training on: fine-tuning and distillation."""

"""Train a pruned network: fine-tuning with labels, distillation without."""

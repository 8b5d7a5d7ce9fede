"""Train a pruned network, with labels or without.

- `trainer`: the training loop; resumes from checkpoints.
- `training_data`: images, preprocessing and augmentation of a training.
- `loss`: the distillation loss: labels, mixed images and the teacher's outputs.
- `feature_distillation`: the teacher's feature maps as part of the loss.
- `lr_schedule`: learning rate by step.
- `checkpoint`: the state of a training in files, to resume from.
- `distill`: distillation on calibration images, without labels.
- `sync_batchnorm`: batch-norm statistics over all processes.
- `memory_check`: whether a training step fits into memory.
"""

"""Filter scores, from one pass over the calibration images.

- `scores`: the scores by every requested criterion (`score_filters`)
- `criteria/`: what makes a filter worth keeping (concept votes and the baselines)
- `concepts/`: which part of an image shows which concept (class evidence, saliency, factors, …)
- `feature_pass`: the pass that shows every criterion the feature maps
- `thresholds`: each filter's activation statistics: mean and threshold
- `iou`: the overlap of activations and concept masks
- `covariance`, `exact_sum`: sums that don't depend on the order of the images
- `channel_means`: from filters to channels
- `batching`: batches of one size
- `dissection`: each filter's best concept and top images
"""

"""secateur makes a trained convolutional network smaller and faster by what its filters see."""

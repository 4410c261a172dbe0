"""What AIM and ACM must know of the models: mean activations, mutual information."""

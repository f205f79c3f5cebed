"""What a training script is made of; public, for scripts of your own."""

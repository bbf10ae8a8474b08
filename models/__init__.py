"""DeepLab models."""

"""What onepass and its peers take, in time and memory: ``python -m onepass bench``."""

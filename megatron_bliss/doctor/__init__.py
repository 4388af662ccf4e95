"""`megatron-bliss doctor`: what this machine, file system and data are, and whether a run's settings can work here."""

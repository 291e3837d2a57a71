"""Parts that detectors share, named for their mechanism; each is imported from its own file."""

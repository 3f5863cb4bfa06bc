"""Training jobs that run as they are and are meant to be copied from."""

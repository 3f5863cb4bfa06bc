"""What the service and the trainer share: nouns, batch arithmetic, policies and replay.

No clock, no files, no network, no torch: every function here is pure and needs pydantic only.
"""

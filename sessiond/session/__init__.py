"""Sessions: what they are, where they are stored, what can be done to them. No FUSE, no D-Bus."""

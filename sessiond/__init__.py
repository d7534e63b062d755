"""sessiond: resettable, snapshottable, persistable root file systems for user sessions."""

__version__ = "0.1.0"

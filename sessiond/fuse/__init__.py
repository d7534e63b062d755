"""The overlay served over /dev/fuse by pyfuse3: one process, the worker, for each mount."""

from sessiond.fuse import data_path  # noqa: F401  (has to come before pyfuse3)

"""The overlay served over /dev/fuse by pyfuse3: one process, the worker, for each mount."""

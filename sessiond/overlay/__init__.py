"""Overlay semantics on plain directories: the kernel overlayfs's rules and on-disk format.

Standard library only, synchronous, without FUSE. Not thread-safe, except where a function says so.
"""

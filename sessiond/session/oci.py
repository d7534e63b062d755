"""What the archives of exported and imported snapshots have in common: tar, as OCI layers use it.

The format is that of "Image Layer Filesystem Changeset" of the OCI image specification: a tar with
what differs from the image, in which an empty file ``.wh.NAME`` says that NAME is gone, and
``.wh..wh..opq`` that a directory has nothing of what the image has in its place. Times in ns, long
names, large sizes and extended attributes are in PAX headers, the latter as GNU tar and others
write them: ``SCHILY.xattr.NAME``.
"""

from __future__ import annotations

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."
"""What else begins so means nothing here; some tools keep notes under such names."""
XATTR = b"SCHILY.xattr."
OVERLAY_XATTRS = b"trusted.overlay."
"""Notes of an overlay, of ours or of one that a user has stacked on it: never in an archive."""
BLOCK = 512
"""Bytes; the unit of a tar."""

"""Images: each mounted once, read-only, for all sessions that are built on it.

The mount of an image is ``RUNTIME/images/DIGEST``. One trio task tree calls this; what blocks is
done in threads, for one image at a time.
"""

from __future__ import annotations

import hashlib
import logging
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import trio

from sessiond.errors import ImageUnavailable
from sessiond.journal import Event, event
from sessiond.session import verity
from sessiond.session.faults import explained
from sessiond.session.model import ImageSource
from sessiond.session.mounts import Mounts

log = logging.getLogger(__name__)

_HEAD = 64 << 10
"""Bytes of an image file that its digest is made of; the superblocks are in them."""

_DAMAGE_SECONDS = 60.0
"""How often it is looked whether dm-verity has found something."""


@dataclass(frozen=True, slots=True)
class Image:
    """A mounted image."""

    digest: str
    source: ImageSource
    root: Path
    """Where it is mounted."""
    kind: str
    """``directory``, or the name of the file system in the file."""
    built: datetime | None = field(default=None, compare=False)
    """When the file system in the file was made or last written, as its superblock has it; None
    where that is unknown.
    """


class Images:
    """The images that are mounted now, with the number of sessions that use each."""

    def __init__(self, runtime: Path, mounts: Mounts) -> None:
        self._directory = runtime / "images"
        self._mounts = mounts
        self._users: dict[str, int] = {}
        self._paths: dict[str, Path] = {}
        """Of those with users: where the first one has found it."""
        self._found: set[str] = set()
        """Digests of those that another manager has mounted, and nobody uses yet."""
        self._damaged: set[str] = set()
        """Digests of those in which dm-verity has found a block that does not match."""
        self._lock = trio.Lock()

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of all mounted images."""
        return tuple(sorted(self._users))

    async def prepare(self) -> None:
        """Find what another manager has mounted: it can be used on. Raises `Failed`."""
        with explained("prepare the directory for images"):
            await trio.to_thread.run_sync(self._prepare)

    def _prepare(self) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for target in self._directory.iterdir():
            if self._mounts.file_system(target) is not None:
                self._found.add(target.name)
            else:
                self._tidy(target)

    async def unmount_unused(self) -> None:
        """Unmount what `prepare` has found, as far as nobody uses it."""
        async with self._lock:
            for digest in self._found:
                await trio.to_thread.run_sync(self._tidy, self._directory / digest)
            self._found.clear()

    def _tidy(self, target: Path) -> None:
        log.info("%s, where another sessiond mounted an image, is removed.", target)
        try:
            self._unmount(target)
        except OSError as error:
            log.warning("%s is left where images are mounted: %s.", target, error.strerror)

    async def acquire(self, source: ImageSource, *, known: str = "") -> Image:
        """Return the mounted image; `release` it once for each time.

        One with the digest `known` that is mounted still is used on, whatever is at `source` now.
        Raises `ImageUnavailable` when it is missing, corrupt, or cannot be mounted on this machine.
        """
        async with self._lock:
            if known and known in {*self._users, *self._found}:
                found = _Found(known, known.partition("-")[0])
            else:
                found = await trio.to_thread.run_sync(_inspect, source)
            return await self._acquire(source, found)

    async def acquire_old(self, digest: str, sources: Iterable[ImageSource]) -> Image | None:
        """Return the image of that digest if it is mounted still, or at one of `sources`; None if
        it is gone. `release` it as well.
        """
        async with self._lock:
            for source in sources:
                found = _Found(digest, digest.partition("-")[0])
                try:
                    if digest not in {*self._users, *self._found}:
                        found = await trio.to_thread.run_sync(_inspect, source)
                    if found.digest == digest:
                        return await self._acquire(source, found)
                except ImageUnavailable as error:
                    log.info("%s is not the image %s: %s", source.path, digest, error)
            return None

    async def inspect(self, source: ImageSource) -> str:
        """Return the digest of the image that is at `source` now. Raises `ImageUnavailable`."""
        return (await trio.to_thread.run_sync(_inspect, source)).digest

    async def _acquire(self, source: ImageSource, found: _Found) -> Image:
        root = self._directory / found.digest
        image = Image(found.digest, source, root, found.kind, found.built)
        if found.digest in self._found:
            self._found.remove(found.digest)
        elif found.digest not in self._users:
            # Not to be given up half-way: nobody would unmount it.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._mount, image, found.size)
        self._users[found.digest] = self._users.get(found.digest, 0) + 1
        self._paths.setdefault(found.digest, source.path)
        return image

    async def release(self, image: Image) -> None:
        """Unmount `image` if nobody else uses it. What cannot be unmounted is logged."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                self._users[image.digest] -= 1
                if self._users[image.digest]:
                    return
                del self._users[image.digest], self._paths[image.digest]
                self._damaged.discard(image.digest)
                try:
                    await trio.to_thread.run_sync(self._unmount, image.root)
                except OSError:
                    log.exception("Image %s could not be unmounted.", image.root)

    async def watch(self) -> None:
        """Tell of images that are damaged, as far as somebody has read what is. Does not end."""
        while True:
            await trio.sleep(_DAMAGE_SECONDS)
            async with self._lock:
                for digest, path in self._paths.items():
                    if digest not in self._damaged and await trio.to_thread.run_sync(
                        self._is_damaged, digest
                    ):
                        self._damaged.add(digest)
                        _tell_damaged(digest, path)

    def _is_damaged(self, digest: str) -> bool:
        name = _verity_name(self._directory / digest)
        try:
            return verity.path(name).exists() and verity.is_damaged(name)
        except OSError as error:
            log.warning("The state of device %s is not known: %s.", name, error.strerror)
            return False

    def _mount(self, image: Image, size: int) -> None:
        with explained(f"mount image {image.source.path}"):
            image.root.mkdir(mode=0o700, exist_ok=True)
            try:
                self._mount_at(image, size)
            except BaseException:
                self._unmount(image.root)
                raise

    def _mount_at(self, image: Image, size: int) -> None:
        source = image.source
        device = self._open_verity(image, size) or source.path
        try:
            if image.kind == "directory":
                self._mounts.mount_clone(source.path, image.root)
            else:
                self._mounts.mount_image(device, image.root, image.kind)
        except OSError as error:
            raise ImageUnavailable(self._why_not(image, error)) from error

    def _why_not(self, image: Image, error: OSError) -> str:
        source = image.source
        if image.kind == "directory":
            return f"The directory {source.path} cannot be used as an image: {error.strerror}."
        if str(error.filename).startswith("/dev/loop"):
            return (
                f"Image {source.path} cannot be mounted for want of a loop device: "
                f"{error.filename}: {error.strerror}. Load the module loop; in a container, let it "
                "have such devices."
            )
        if not self._mounts.supports(image.kind):
            return (
                f"Image {source.path} is {image.kind}, which this kernel does not support; load "
                f"the module {image.kind}, or convert the image."
            )
        if source.verity_root_hash is not None:
            return (
                f"Image {source.path} cannot be mounted through dm-verity: {error.strerror}. It is "
                "damaged, or verity_root_hash is that of another image."
            )
        return (
            f"Image {source.path} looks like {image.kind} but cannot be mounted: {error.strerror}. "
            "It is corrupt, or made with features that this kernel lacks."
        )

    def _open_verity(self, image: Image, size: int) -> Path | None:
        source = image.source
        if source.verity_root_hash is None:
            return None
        try:
            return verity.open_device(_verity_name(image.root), source, size)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise ImageUnavailable(
                f"Image {source.path} is protected by dm-verity, which cannot be set up: {where}"
                f"{error.strerror}. It is not mounted without that; install veritysetup and load "
                "the module dm_verity, or correct verity_root_hash and verity_hash_device."
            ) from error

    def _unmount(self, target: Path) -> None:
        self._mounts.detach(target)
        verity.close_device(_verity_name(target))
        target.rmdir()  # last, since it is by this directory that leftovers are found


def _tell_damaged(digest: str, path: Path) -> None:
    log.error(
        "Image %s is damaged: dm-verity has found a block that does not match the root hash. "
        "Programs get an error where they read it. Put an intact copy in its place; sessions use "
        "that once none of them uses the damaged one.",
        path,
        extra=event(Event.IMAGE_DAMAGED, image=digest),
    )


def _verity_name(target: Path) -> str:
    return f"sessiond-{target.name}"


@dataclass(frozen=True, slots=True)
class _Found:
    digest: str
    kind: str
    size: int = 0
    """Bytes that the file system takes in the file."""
    built: datetime | None = None


def _inspect(source: ImageSource) -> _Found:
    """Find out what `source` is. Raises `ImageUnavailable`."""
    path = source.path
    try:
        inode = path.stat()
        if stat.S_ISDIR(inode.st_mode):
            if source.verity_root_hash is not None:
                raise ImageUnavailable(
                    f"The directory {path} cannot be protected by dm-verity; use an image file, or "
                    "remove verity_root_hash."
                )
            return _Found(_digest("directory", path, inode.st_dev, inode.st_ino), "directory")
        if not (stat.S_ISREG(inode.st_mode) or stat.S_ISBLK(inode.st_mode)):
            raise ImageUnavailable(f"{path} is neither a directory nor a file with an image in it.")
        with path.open("rb") as file:
            head = file.read(_HEAD)
            size = file.seek(0, 2)
    except OSError as error:
        raise ImageUnavailable(
            f"Image {path} cannot be read: {error.strerror}. Put it there, or correct 'image' in "
            "its profile."
        ) from error
    kind, needed, built = _identify(path, head)
    if size < needed:
        raise ImageUnavailable(
            f"Image {path} is truncated: it has {size} bytes of {needed}. Copy it again."
        )
    facts: tuple[object, ...] = (source.verity_root_hash,)
    if source.verity_root_hash is None:
        facts = (hashlib.sha256(head).hexdigest(), size, inode.st_mtime_ns)
    moment = datetime.fromtimestamp(built, UTC) if 0 < built < 2**33 else None
    return _Found(_digest(kind, *facts), kind, needed, moment)


def digest_of(file: Path) -> str | None:
    """Return the digest of the image in `file`; None if there is none that could be used."""
    try:
        return _inspect(ImageSource(path=file)).digest
    except ImageUnavailable:
        return None


def _digest(kind: str, *facts: object) -> str:
    return f"{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"


def _identify(path: Path, head: bytes) -> tuple[str, int, int]:
    """Return the kind of file system by its superblock, the bytes it needs, and when it was made or
    last written, in seconds since 1970.

    A block size that makes no sense is for the kernel to refuse.
    """
    if head[:4] == b"hsqs" and len(head) >= 96:
        built, used = struct.unpack_from("<I28xQ", head, 8)
        return "squashfs", used, built
    if head[1024:1028] == b"\xe2\xe1\xf5\xe0" and len(head) >= 1152:
        built, blocks = struct.unpack_from("<Q4xI", head, 1024 + 24)
        return "erofs", blocks << min(head[1024 + 12], 16), built
    if head[1080:1082] == b"\x53\xef" and len(head) >= 2048:
        (blocks,) = struct.unpack_from("<I", head, 1024 + 4)
        (shift,) = struct.unpack_from("<I", head, 1024 + 24)
        (written,) = struct.unpack_from("<I", head, 1024 + 48)
        return "ext4", blocks << (10 + min(shift, 6)), written
    raise ImageUnavailable(
        f"{path} holds no squashfs, erofs or ext4 file system, or its first bytes are corrupt."
    )

"""The service on a machine that really starts: what its unit allows, what a power cut leaves."""

from __future__ import annotations

import pytest

from tests.support.virtual_machine import BOUND, VirtualMachine

PREPARE = """
mkdir -p /srv/content/etc /etc/sessiond
echo Welcome. >/srv/content/etc/motd
mksquashfs /srv/content /srv/image.squashfs -quiet -no-progress
veritysetup format /srv/image.squashfs /srv/hashes >/srv/told
root_hash=$(sed -n 's/^Root hash:[[:space:]]*//p' /srv/told)
rm /srv/told
cat >/etc/sessiond/sessiond.toml <<END
[profile.guest]
image = "/srv/image.squashfs"
size = "16M"
[profile.protected]
image = "/srv/image.squashfs"
size = "16M"
verity_root_hash = "$root_hash"
verity_hash_device = "/srv/hashes"
END
"""
ROOT = "/run/sessiond/sessions"
SLOW = """\
#!/bin/sh
echo part >"$2"
exec sleep 1000
"""

pytestmark = pytest.mark.timeout(4 * BOUND)


@pytest.fixture(scope="module")
def service(machine: VirtualMachine) -> VirtualMachine:
    """The machine with the service, and two profiles over one image."""
    machine.install()
    machine.run(PREPARE)
    machine.run("systemctl start sessiond")
    return machine


def test_dm_verity_is_allowed_by_the_unit(service: VirtualMachine) -> None:
    service.run("sessionctl create root protected --id checked")
    assert service.run(f"cat {ROOT}/checked/root/etc/motd") == "Welcome.\n"
    assert service.run("ls /dev/mapper | grep --count sessiond-") == "1\n"
    service.run("sessionctl close checked")
    assert service.run("ls /dev/mapper") == "control\n"


def test_a_power_cut_in_a_maintenance_ends_it(service: VirtualMachine) -> None:
    before = service.run("sha256sum /srv/image.squashfs")
    service.run("sessionctl maintenance begin guest")
    service.run(f"echo Changed. >{ROOT}/maintenance/root/etc/motd")
    tool = "/usr/local/bin/mksquashfs"
    service.run(f"echo '{SLOW}' >{tool}; chmod +x {tool}")
    service.run("systemd-run --quiet sessionctl maintenance finish")
    service.wait("test -s /srv/.image.squashfs.sessiond-new-*")
    service.run(f"rm {tool}; sync")
    service.cut_power()
    assert "sessiond-new" in service.run("ls -A /srv")
    service.run("systemctl start sessiond")
    assert service.run("sessionctl maintenance status --json") == "null\n"
    assert service.run("sha256sum /srv/image.squashfs") == before
    assert service.run("ls -A /srv").split() == ["content", "hashes", "image.squashfs"]
    assert service.run("ls /var/lib/sessiond/sessions") == ""
    service.run("sessionctl create root guest --id after")
    assert service.run(f"cat {ROOT}/after/root/etc/motd") == "Welcome.\n"

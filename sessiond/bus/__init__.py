"""The D-Bus face of sessiond: the only package that knows D-Bus, and that imports dbus_next."""

"""sessiond-reset: the reset button of a session, as a window, as notifications, and for scripts.

It runs in the distribution's Python, with its PyGObject, GTK 4 and libadwaita, and not in the
environment of the daemon: nothing here imports more than those, the standard library and
`sessiond.words`. All runs in one thread, on GLib's main loop.
"""

"""sessionctl: sessiond for people and for scripts, through D-Bus."""

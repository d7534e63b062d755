"""`python3 -m sessiond.desktop`, where the program is not installed."""

import sys

from sessiond.desktop.main import main

sys.exit(main())

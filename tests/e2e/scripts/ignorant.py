"""A script that neither makes a process group nor knows Stretto. usage: ignorant.py SECONDS"""

import sys
import time

time.sleep(float(sys.argv[1]))

"""``python -m sb3_dreamer_gpld.zoo`` is ``dreamer-gpld``."""

import sys

from sb3_dreamer_gpld.zoo.main import main

if __name__ == "__main__":
    sys.exit(main())

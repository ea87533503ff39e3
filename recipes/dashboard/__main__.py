"""python -m recipes.dashboard"""

import sys

from conf.schema import ConfigError
from recipes.dashboard.cli import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.strerror}: {error.filename}: choose another page with --output FILE")

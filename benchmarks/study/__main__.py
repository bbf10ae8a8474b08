"""``python -m benchmarks.study``."""

from .run import main

if __name__ == "__main__":  # the training processes import this module, too
    main()

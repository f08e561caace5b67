"""`python -m timm_tinyvit`: the console script `timm-tinyvit`."""

from .cli import main

if __name__ == '__main__':
    main()

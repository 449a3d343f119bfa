"""`python -m mixlab` is the command `mixlab`."""

from mixlab.cli import main

if __name__ == "__main__":
    main()

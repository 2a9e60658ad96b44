"""`python -m andromeda`, and what torchrun starts with `-m andromeda`."""

from andromeda.cli.main import main

if __name__ == "__main__":
    main()

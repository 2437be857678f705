"""`python -m nimhost` is `nimhost`."""

from nimhost.cli.main import main

if __name__ == "__main__":
    main()

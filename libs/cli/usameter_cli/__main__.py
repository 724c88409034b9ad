"""`python -m usameter_cli …`, the same as `usameter …`."""

from usameter_cli.main import main

if __name__ == "__main__":
    main()

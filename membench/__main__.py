"""`python -m membench`, for `accelerate launch -m membench train ...`."""

from membench.cli import main

if __name__ == "__main__":
    main()

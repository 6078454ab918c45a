"""The command fastentropy, also as `python -m fastentropy`."""

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        from fastentropy.cli import app
    except ModuleNotFoundError as error:
        from fastentropy._utils.optional import install_command

        print(f"Error: the command line needs {error.name}; install it with: {install_command('cli')}", file=sys.stderr)
        sys.exit(2)
    app(prog_name="fastentropy")


if __name__ == "__main__":
    main()

"""placeholder header; being written"""
import sys


class UserError(Exception):
    """Anything a user can cause or cure: one line that says what was found, what was expected, what to do."""


def cli(main):
    """Runs main(); a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main())
    except UserError as error:
        # A DataLoader worker hands its exception on as a whole traceback; the last line is the message.
        line = str(error).strip().splitlines()[-1].removeprefix("data.UserError: ").removeprefix("UserError: ")
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

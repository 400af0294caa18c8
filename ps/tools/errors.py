"""What a command on folders could not do. Every message says what, why, and what to do."""


class ToolError(Exception):
    """The command cannot do what it was asked for; nothing that looks complete is left behind."""

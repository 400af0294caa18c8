"""The tokens of these tests: by who has one, the token and its rule."""

TOKENS = {
    "reader": ("read-0123456789abcdef", "read open-*"),
    "train": ("train-0123456789abcdef", "train *"),
    "other": ("other-0123456789abcdef", "train other-*"),
    "admin": ("admin-0123456789abcdef", "admin *"),
}
WRONG = "wrong-0123456789abcdef"

"""A clock that stands still until it is moved."""


class Clock:
    def __init__(self) -> None:
        self.nanoseconds = 0

    def monotonic(self) -> float:
        return self.nanoseconds / 1e9

    def now(self) -> int:
        return self.nanoseconds

    def advance(self, seconds: float) -> None:
        self.nanoseconds += round(seconds * 1e9)

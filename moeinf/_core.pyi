from typing import Any

# The compiled module documents itself; to type checkers its names are Any.
def __getattr__(name: str) -> Any: ...
